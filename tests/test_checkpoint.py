"""Checkpoints: what is saved is read back, and anything else is refused in one line and never run."""

import os
import pickle
import random
import warnings
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


def test_truncated_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for n in (0, len(content) // 1000, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:n])
        assert "damaged" in refusal(saved)


def test_no_flipped_bit_is_loaded(saved: Path) -> None:
    content, rng = saved.read_bytes(), random.Random(0)
    weight = content.index(small_model().state_dict()["encoders.image.linear.weight"].numpy().tobytes())
    refused = []
    for place in [weight + 3, *(rng.randrange(len(content)) for _ in range(75))]:
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        try:  # the zip's padding and dates don't matter
            assert same(checkpoint.load(saved, "small")["model"], small_model().state_dict())
        except UserError as error:
            refused.append(str(error))
    assert "digest" in refused[0]
    assert len(refused) > 20


def test_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth.tar"
    for text in (b"These are not weights.\n", b"\x80\x02}q\x00.", b"PK\x03\x04"):
        path.write_bytes(text)
        assert "not a checkpoint" in refusal(path)
    others: list[tuple[Any, str]] = [
        ({"state_dict": torch.zeros(2)}, "has format 'None', expected 'mvae checkpoint 3'"),
        (torch.zeros(3), "has format"),
        ({"format": "mvae checkpoint 1", "experiment": "small"}, "has format 'mvae checkpoint 1'"),
        ({"format": checkpoint.FORMAT, "experiment": "small"}, "its digest is wrong"),
        (nn.Linear(2, 2), "not a checkpoint"),
    ]
    for content, said in others:
        torch.save(content, path)
        assert said in refusal(path)


def test_digest_tells_shapes_types_and_names_apart() -> None:
    zero = torch.zeros(2, 2)
    contents = [{"a": zero}, {"b": zero}, {"a": zero.view(4)}, {"a": zero.int()}, {"a": [zero]}, {"a": 0}, {"a": False}]
    assert len({checkpoint.digest(content) for content in contents}) == len(contents)


def test_missing_file_folder_and_other_experiment_are_refused(saved: Path) -> None:
    assert "no checkpoint" in refusal(saved.with_name("absent"))
    assert f"can't read {saved.parent}: Is a directory" in refusal(saved.parent)
    assert "is a checkpoint of 'small', not of 'celeba'" in refusal(saved, "celeba")


def test_malicious_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path, malicious = tmp_path / "malicious.pth.tar", Malicious(tmp_path / "marker")
    content = {"format": checkpoint.FORMAT, "experiment": "small", "model": malicious}
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refusal(path)
    path.write_bytes(pickle.dumps(malicious))
    assert_refused(run_warm("mnist/sample.py", path, cwd=tmp_path), 1, path)
    assert os.listdir(tmp_path) == [path.name]


def test_value_that_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    for value in (Path("a"), np.float64(1), {1}):
        said = f"can't write .*: .* tensors and plain values only, but got a {type(value).__name__}"
        with pytest.raises(UserError, match=said):
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


def test_weights_of_other_networks_are_refused(tmp_path: Path) -> None:
    path, weights = tmp_path / "unfit.pth.tar", small_model().state_dict()
    others = {"weight": torch.zeros(2)}, {name: torch.zeros(1) for name in weights}
    contents: list[dict[str, Any]] = [{"model": other, "n_latents": 2} for other in others]
    for content in [*contents, {"model": weights, "n_latents": 3}, {"model": weights}]:
        checkpoint.save(path, "small", {**content, "settings": {}})
        with pytest.raises(UserError, match=f"{path}.* fit ") as caught:
            checkpoint.load_model(path, "small", small_model, CPU)
        assert "\n" not in str(caught.value)


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
