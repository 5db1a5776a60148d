"""Checkpoints: what is saved is read back, and anything else is refused in one line and never run."""

import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

from mvae import UserError
from mvae.files import write_atomically
from mvae.run import checkpoint

import numpy as np
import pytest
import torch
from torch import nn

from helpers import assert_refused, run_small, run_warm, same, small_model

CPU = torch.device("cpu")
SETTINGS = {"lr": 1e-3, "names": ["a", "b"], "limit": None}


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the small model."""
    path = tmp_path / "saved.pth.tar"
    checkpoint.save(path, "small", {"model": small_model().state_dict(), "n_latents": 2, "settings": SETTINGS})
    return path


def refusal(path: Path, experiment: str = "small") -> str:
    """Return the error of loading a file: one line with its name, and no warning."""
    with warnings.catch_warnings(action="error"), pytest.raises(UserError) as caught:
        checkpoint.load(path, experiment)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_read_back(saved: Path) -> None:
    content = checkpoint.load(saved, "small")
    assert same(content["model"], small_model().state_dict())
    assert content["settings"] == SETTINGS
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_truncated_file_is_refused(saved: Path, fraction: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: min(int(fraction * len(content)), len(content) - 1)])
    assert "damaged" in refusal(saved)


def test_no_flipped_bit_is_loaded(saved: Path) -> None:
    content, rng = saved.read_bytes(), random.Random(0)
    weight = content.index(small_model().state_dict()["encoders.image.linear.weight"].numpy().tobytes())
    refused = []
    for place in [weight + 3, *(rng.randrange(len(content)) for _ in range(150))]:
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        try:  # the zip's padding and dates don't matter
            assert same(checkpoint.load(saved, "small")["model"], small_model().state_dict())
        except UserError as error:
            refused.append(str(error))
    assert "digest" in refused[0]
    assert len(refused) > 40


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"These are not weights.\n", "not a checkpoint"),
        (b"\x80\x02}q\x00.", "not a checkpoint"),
        (b"PK\x03\x04", "not a checkpoint"),
        ({"state_dict": torch.zeros(2)}, "has format 'None', expected 'mvae checkpoint 3'"),
        ([1, 2], "has format"),
        (torch.zeros(3), "has format"),
        ({"format": "mvae checkpoint 1", "experiment": "small"}, "has format 'mvae checkpoint 1'"),
        ({"format": checkpoint.FORMAT, "experiment": "small"}, "its digest is wrong"),
        ({"format": checkpoint.FORMAT, "digest": "0", "x": torch.zeros(1).expand(10**13)}, "damaged"),
        (nn.Linear(2, 2), "holds more than tensors and plain values: refused"),
    ],
    ids=str,
)
def test_file_that_is_not_a_checkpoint_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert said in refusal(path)


def test_missing_file_folder_and_other_experiment_are_refused(saved: Path) -> None:
    assert "no checkpoint" in refusal(saved.with_name("absent"))
    assert "can't read" in refusal(saved.parent)
    assert "is a checkpoint of 'small', not of 'celeba'" in refusal(saved, "celeba")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_malicious_file_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    path, malicious = tmp_path / "malicious.pth.tar", Malicious(tmp_path / "marker")
    if how == "pickle":
        path.write_bytes(pickle.dumps(malicious))
    else:
        content = {"format": checkpoint.FORMAT, "experiment": "small", "model": malicious}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refusal(path)
    assert os.listdir(tmp_path) == [path.name]


def test_archive_that_unpacks_to_more_than_its_size_is_refused_unread(saved: Path) -> None:
    loose = saved.with_name("loose")
    torch.save(torch.zeros(10_000_000), loose)
    with zipfile.ZipFile(loose) as source, zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert saved.stat().st_size < 10**6
    assert "damaged" in refusal(saved)


def test_values_that_contain_themselves_are_refused(saved: Path) -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    torch.save({"format": checkpoint.FORMAT, "experiment": "small", "settings": endless, "digest": "0"}, saved)
    assert "damaged" in refusal(saved)


@pytest.mark.parametrize("value", [Path("a"), np.float64(1), {1}, b"a", object()], ids=lambda x: type(x).__name__)
def test_value_that_could_not_be_read_again_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"can't write .*: .* tensors and plain values only, but got a {type(value).__name__}"
    ):
        checkpoint.save(tmp_path / "new", "small", {"settings": [value]})
    assert not list(tmp_path.iterdir())


# Models


def test_a_model_is_rebuilt_with_what_is_known_of_its_training(tmp_path: Path) -> None:
    history = run_small(tmp_path, epochs=3, lr=1e-2).history
    best = min(history, key=lambda record: record["validation/loss"])
    for name, record in ((checkpoint.BEST, best), (checkpoint.LATEST, history[-1])):
        model, trained = checkpoint.load_model(tmp_path / name, "small", small_model, CPU)
        assert same(model.state_dict(), checkpoint.load(tmp_path / name, "small")["model"])
        assert not model.training
        assert (trained["settings"]["lr"], trained["settings"]["n_train"]) == (1e-2, 24)
        assert (trained["epoch"], trained["validation_loss"]) == (record["epoch"], record["validation/loss"])
        assert trained["training_seconds"] == sum(some["seconds"] for some in history[: record["epoch"]])


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}, "n_latents": 2, "settings": {}},
        {"model": {name: torch.zeros(1) for name in small_model().state_dict()}, "n_latents": 2, "settings": {}},
        {"model": small_model().state_dict(), "n_latents": 3, "settings": {}},
        {"model": small_model().state_dict(), "settings": {}},
    ],
    ids=["other names", "other shapes", "other latents", "no latents"],
)
def test_weights_of_other_networks_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "unfit.pth.tar"
    checkpoint.save(path, "small", content)
    with pytest.raises(UserError, match=f"{path}.* fit ") as caught:
        checkpoint.load_model(path, "small", small_model, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script", ["sample.py", "loglike.py"])
def test_scripts_refuse_a_file_that_is_not_a_checkpoint_in_one_line(
    script: str, digits_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.pth.tar"
    torch.save(Malicious(tmp_path / "marker") if script == "sample.py" else {"state_dict": torch.zeros(2)}, path)
    assert_refused(run_warm(f"mnist/{script}", path, "--data-dir", digits_dir, cwd=tmp_path), 1, path)
    assert os.listdir(tmp_path) == [path.name]


# Files


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"can't write .*file: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
