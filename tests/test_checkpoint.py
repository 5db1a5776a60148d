"""Checkpoints: what is read back, and what is refused without being run."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvae import checkpoint
from mvae.errors import UserError
from mvae.files import write_atomically

from helpers import fit_small, same, small_model


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the small model."""
    path = tmp_path / "saved.pth.tar"
    model = small_model()
    settings = {"lr": 1e-3, "names": ["a", "b"], "limit": None}
    checkpoint.save(path, "small", {"model": model.state_dict(), "n_latents": 2, "settings": settings})
    return path


def assert_load_refuses(path: Path, *said: str) -> None:
    """Loading fails with one line, which has the file's name and all of `said` in it, and without a warning."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(UserError) as caught:
            checkpoint.load(path, "small")
    assert not warned
    message = str(caught.value)
    assert "\n" not in message
    for words in (str(path), *said):
        assert words in message


def test_load_gives_back_what_was_saved(saved: Path) -> None:
    content = checkpoint.load(saved, "small")
    assert same(content["model"], small_model().state_dict())
    assert content["settings"] == {"lr": 1e-3, "names": ["a", "b"], "limit": None}


def test_save_leaves_no_other_file(saved: Path) -> None:
    assert os.listdir(saved.parent) == [saved.name]


def test_load_model_rebuilds_the_model_for_evaluation(saved: Path) -> None:
    model, trained = checkpoint.load_model(saved, "small", lambda n_latents: small_model(), torch.device("cpu"))
    assert same(model.state_dict(), small_model().state_dict())
    assert not model.training
    assert trained == {"settings": {"lr": 1e-3, "names": ["a", "b"], "limit": None}}


def test_absent_file_is_refused(tmp_path: Path) -> None:
    assert_load_refuses(tmp_path / "absent.pth.tar", "no checkpoint", "train.py")


def test_folder_is_refused(tmp_path: Path) -> None:
    assert_load_refuses(tmp_path, "can't read")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert_load_refuses(saved)


def test_file_that_lacks_its_last_byte_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    assert_load_refuses(saved)


@pytest.mark.parametrize("content", [b"These are not weights.\n", b"\x80\x02}q\x00.", b"PK\x03\x04", bytes(1000)])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pth.tar"
    path.write_bytes(content)
    assert_load_refuses(path)


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "legacy"])
def test_malicious_object_is_refused_and_not_run(tmp_path: Path, packed: bool) -> None:
    path, marker = tmp_path / "malicious.pth.tar", tmp_path / "marker"
    content = {"format": checkpoint.FORMAT, "experiment": "small", "model": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=packed)
    assert_load_refuses(path, "refused")
    assert not marker.exists()


def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "malicious.pth.tar", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Malicious(marker)))
    assert_load_refuses(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, [1, 2], torch.zeros(3)])
def test_file_of_another_program_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pth.tar"
    torch.save(content, path)
    assert_load_refuses(path, "not a checkpoint written by this program")


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pth.tar"
    torch.save(nn.Linear(2, 2), path)
    assert_load_refuses(path, "refused")


def test_checkpoint_of_an_earlier_format_is_refused_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "earlier.pth.tar"
    torch.save({"format": "mvae checkpoint 1", "experiment": "small"}, path)
    assert_load_refuses(path, "'mvae checkpoint 1'", "this version reads 'mvae checkpoint 2'", "train it again")


def test_checkpoint_of_another_experiment_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"saved\.pth\.tar is a checkpoint of small, not of celeba"):
        checkpoint.load(saved, "celeba")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}, "n_latents": 2, "settings": {}},
        {"model": {name: torch.zeros(1) for name in small_model().state_dict()}, "n_latents": 2, "settings": {}},
        {"model": [1, 2], "n_latents": 2, "settings": {}},
        {"model": small_model().state_dict(), "settings": {}},
        {"model": small_model().state_dict(), "n_latents": 2},
        {"n_latents": 2, "settings": {}},
    ],
    ids=["other names", "other shapes", "no weights", "no n_latents", "no settings", "no model"],
)
def test_content_that_makes_no_model_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "unfit.pth.tar"
    checkpoint.save(path, "small", content)
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(path, "small", lambda n_latents: small_model(), torch.device("cpu"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"can't write .*file: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_makes_the_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"


def test_write_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"can't write .*file/new"):
        write_atomically(tmp_path / "file" / "new", b"content")


def test_best_model_is_rebuilt_from_a_run(tmp_path: Path) -> None:
    records = fit_small(tmp_path, settings={"lr": 0.01})
    model, trained = checkpoint.load_model(
        tmp_path / checkpoint.BEST, "small", lambda n_latents: small_model(), torch.device("cpu")
    )
    assert model.n_latents == 2
    assert trained["settings"]["lr"] == 0.01
    best = min(records, key=lambda record: record["validation/loss"])
    assert (trained["epoch"], trained["validation_loss"]) == (best["epoch"], best["validation/loss"])
    seconds = [record["seconds"] for record in records[: best["epoch"]]]
    assert trained["training_seconds"] == pytest.approx(sum(seconds))
