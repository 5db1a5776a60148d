"""Checkpoints: what is read back, and what is refused without being run."""

import math
import os
import pickle
import random
import signal
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvae import checkpoint
from mvae.errors import UsageError, UserError
from mvae.files import write_atomically
from mvae.likelihoods import Bernoulli
from mvae.model import MVAE
from mvae.run import STATE
from mvae.training import Stopped

from helpers import SmallEncoder, assert_same_run, at_call, fit_small, same, small_data, small_model


def with_weight(value: float) -> dict[str, torch.Tensor]:
    """The small model's weights, one of them `value`."""
    weights = small_model().state_dict()
    weights["encoders.image.linear.weight"][0, 0] = value
    return weights


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
    model, trained = checkpoint.load_model(saved, "small", small_model, torch.device("cpu"))
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
    assert_load_refuses(path, "refused" if packed else "no checkpoint")
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
    assert_load_refuses(path, "'mvae checkpoint 1'", "this version reads 'mvae checkpoint 3'", "train it again")


def test_checkpoint_of_another_experiment_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"saved\.pth\.tar is a checkpoint of 'small', not of 'celeba'"):
        checkpoint.load(saved, "celeba")


def test_no_flipped_bit_is_loaded(saved: Path) -> None:
    content, rng = saved.read_bytes(), random.Random(0)
    before = checkpoint.load(saved, "small")
    said = []
    for _ in range(200):
        place = rng.randrange(len(content))
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        try:
            assert same(checkpoint.load(saved, "small"), before)  # the zip's padding and dates say nothing
        except UserError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all(str(saved) in words and "\n" not in words for words in said)


def test_flipped_bit_of_a_weight_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    weight = small_model().state_dict()["encoders.image.linear.weight"].numpy().tobytes()
    place = content.index(weight) + 3  # the exponent of the first
    saved.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    assert_load_refuses(saved, "damaged", "digest")


def test_tensor_larger_than_its_file_is_refused_unread(saved: Path) -> None:
    content = {"format": checkpoint.FORMAT, "experiment": "small", "model": torch.zeros(1).expand(10**13)}
    torch.save({**content, "digest": "0"}, saved)
    assert_load_refuses(saved, "damaged")


def test_packed_file_that_unpacks_to_more_is_refused_unread(saved: Path) -> None:
    small = saved.with_name("small")
    torch.save(torch.zeros(10_000_000), small)
    with zipfile.ZipFile(small) as loose, zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in loose.namelist():
            packed.writestr(name, loose.read(name))
    assert saved.stat().st_size < 10**6
    assert_load_refuses(saved, "damaged")


def test_values_that_hold_each_other_without_end_are_refused(saved: Path) -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    torch.save({"format": checkpoint.FORMAT, "experiment": "small", "settings": endless, "digest": "0"}, saved)
    assert_load_refuses(saved, "damaged")


@pytest.mark.parametrize(
    "value", [Path("a"), np.float64(1), {1, 2}, b"a", object()], ids=lambda value: type(value).__name__
)
def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=f"can't write .*/new, .*: a {type(value).__name__} is no plain value"):
        checkpoint.save(tmp_path / "new", "small", {"settings": [value]})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"`settings`.*plain value"):
        fit_small(tmp_path / "run", settings={"value": value})
    assert not (tmp_path / "run" / checkpoint.LATEST).exists()


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}, "n_latents": 2, "settings": {}},
        {"model": {name: torch.zeros(1) for name in small_model().state_dict()}, "n_latents": 2, "settings": {}},
        {"model": [1, 2], "n_latents": 2, "settings": {}},
        {"model": small_model().state_dict(), "settings": {}},
        {"model": small_model().state_dict(), "n_latents": 2},
        {"n_latents": 2, "settings": {}},
        {"model": small_model().double().state_dict(), "n_latents": 2, "settings": {}},
        {"model": with_weight(math.nan), "n_latents": 2, "settings": {}},
        {"model": with_weight(math.inf), "n_latents": 2, "settings": {}},
        {"model": small_model().state_dict(), "n_latents": True, "settings": {}},
        {"model": small_model().state_dict(), "n_latents": -1, "settings": {}},
        {"model": small_model().state_dict(), "n_latents": 2, "settings": {1: 2}},
        {"model": small_model().state_dict(), "n_latents": 2, "settings": {"a": torch.zeros(1)}},
        {"model": small_model().state_dict(), "n_latents": 2, "settings": {}, "epoch": "1"},
        {"model": small_model().state_dict(), "n_latents": 2, "settings": {}, "validation_loss": math.nan},
    ],
    ids=[
        *("other names", "other shapes", "no weights", "no n_latents", "no settings", "no model", "other type"),
        *("not a number", "infinite", "n_latents no int", "no latents", "setting without name", "setting a tensor"),
        *("epoch no number", "loss not a number"),
    ],
)
def test_content_that_makes_no_model_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "unfit.pth.tar"
    checkpoint.save(path, "small", content)
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(path, "small", small_model, torch.device("cpu"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_latents", [10**6, 10**12, 10**30])
def test_networks_larger_than_the_file_are_not_built(tmp_path: Path, n_latents: int) -> None:
    def build(n_latents: int) -> MVAE:
        encoder = SmallEncoder(36, n_latents)
        assert encoder.linear.weight.is_meta or n_latents == 2
        return MVAE(
            encoders={"x": encoder}, likelihoods={"x": Bernoulli(nn.Linear(n_latents, 36))}, n_latents=n_latents
        )

    path = tmp_path / "large.pth.tar"
    checkpoint.save(path, "small", {"model": build(2).state_dict(), "n_latents": n_latents, "settings": {}})
    with pytest.raises(UserError, match="don't fit the networks"):
        checkpoint.load_model(path, "small", build, torch.device("cpu"))


def test_networks_whose_making_reads_a_value_are_loaded(saved: Path) -> None:
    def build(n_latents: int) -> MVAE:
        assert torch.linspace(0, 1, 2).tolist() == [0, 1]
        return small_model(n_latents)

    model, _ = checkpoint.load_model(saved, "small", build, torch.device("cpu"))
    assert same(model.state_dict(), small_model().state_dict())


# A run's latest state is checked whole before anything of it is used.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped within its second epoch. Not to be written to."""

    def stop(rows: dict[str, Any]) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return rows

    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        fit_small(folder, train=small_data(24, seed=0, transform=at_call(6, stop)), approx_m=1)
    return folder / checkpoint.LATEST


def test_latest_state_says_which_epoch_it_ends_its_loss_and_the_time(tmp_path: Path, stopped: Path) -> None:
    history = fit_small(tmp_path)
    _, latest = checkpoint.load_model(tmp_path / checkpoint.LATEST, "small", small_model, torch.device("cpu"))
    _, within = checkpoint.load_model(stopped, "small", small_model, torch.device("cpu"))
    for trained in (latest, within):
        assert trained.pop("settings")
    seconds = sum(record["seconds"] for record in history)
    loss = history[-1]["validation/loss"]
    assert latest == {"epoch": len(history), "validation_loss": loss, "training_seconds": seconds}
    assert within == {"epoch": 2}


@pytest.mark.parametrize("history", [[1], [{}], 1], ids=["no record", "a record without fields", "no list"])
def test_latest_state_whose_history_is_damaged_makes_no_model(tmp_path: Path, history: Any) -> None:
    content = {"model": small_model().state_dict(), "n_latents": 2, "settings": {}, "step": 0, "history": history}
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", content)
    with pytest.raises(UserError, match="its history"):
        checkpoint.load_model(tmp_path / checkpoint.LATEST, "small", small_model, torch.device("cpu"))


def changed(content: Any, path: tuple[Any, ...], change: Callable[[Any], Any] | None) -> Any:
    """`content` with another value in place of that at `path`; without it if `change` is None."""
    if not path:
        assert change
        return change(content)
    pairs = dict(enumerate(content)) if isinstance(content, list) else dict(content)
    if change is None and len(path) == 1:
        del pairs[path[0]]
    else:
        pairs[path[0]] = changed(pairs.get(path[0]), path[1:], change)
    return list(pairs.values()) if isinstance(content, list) else pairs


def becomes(value: Any) -> Callable[[Any], Any]:
    return lambda old: value


STATE_OF_A_WEIGHT = ("optimizer", "state", 0)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        *[((name,), change) for name in ("settings", "model", "optimizer", *STATE) for change in (None, becomes("a"))],
        (("settings", "lr"), becomes("0.01")),
        (("settings", "lr"), becomes(-0.01)),
        (("settings", "lr"), becomes([0.01, 0.01])),
        (("settings", "batch_size"), becomes(0)),
        (("settings", "batch_size"), becomes(True)),
        (("settings", "changes"), becomes([{"epoch": "1"}])),
        (("settings", 1), becomes(1)),
        (("n_latents",), becomes(3)),
        (("model", "encoders.image.linear.weight"), torch.Tensor.double),
        (("model", "encoders.image.linear.weight"), lambda weight: weight[:-1]),
        (("model", "encoders.image.linear.weight"), lambda weight: weight * math.nan),
        (("model", "encoders.image.linear.weight"), None),
        (("model", "more"), becomes(torch.zeros(1))),
        (("optimizer", "state"), becomes({})),
        (("optimizer", "state", 99), becomes({})),
        ((*STATE_OF_A_WEIGHT, "exp_avg"), lambda average: average[:1]),
        ((*STATE_OF_A_WEIGHT, "exp_avg"), lambda average: average.flatten()),
        ((*STATE_OF_A_WEIGHT, "exp_avg_sq"), torch.Tensor.double),
        ((*STATE_OF_A_WEIGHT, "exp_avg_sq"), lambda average: average * math.nan),
        ((*STATE_OF_A_WEIGHT, "exp_avg_sq"), None),
        ((*STATE_OF_A_WEIGHT, "step"), becomes(4)),
        ((*STATE_OF_A_WEIGHT, "step"), becomes(torch.zeros(2))),
        (("optimizer", "param_groups"), becomes([])),
        (("optimizer", "param_groups", 0), becomes(None)),
        (("optimizer", "param_groups", 0, "params"), lambda params: params[::-1]),
        (("optimizer", "param_groups", 0, "params"), lambda params: params[:-1]),
        (("epoch",), becomes(10**30)),
        (("epoch",), becomes(1)),
        (("step",), becomes(0)),
        (("step",), becomes(5)),
        (("step",), becomes(-1)),
        (("best",), becomes(math.nan)),
        (("best",), becomes(-1e9)),
        (("seconds",), becomes(math.nan)),
        (("history",), becomes([])),
        (("history", 0), becomes(None)),
        (("history", 0, "epoch"), becomes(2)),
        (("history", 0, "beta"), None),
        (("history", 0, "train/joint/kl"), becomes("1")),
        (("history", 0, "validation/joint/kl"), becomes(math.nan)),
        (("history", 0, "changed"), becomes({"lr": 1})),
        (("sums",), lambda sums: sums[:-1]),
        (("sums",), torch.Tensor.float),
        (("sums",), lambda sums: sums / 0),
    ],
)
def test_state_that_is_not_whole_is_refused(
    stopped: Path, tmp_path: Path, path: tuple[Any, ...], change: Callable[[Any], Any] | None
) -> None:
    content = checkpoint.load(stopped, "small")
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", changed(content, path, change))
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    with pytest.raises(UserError, match=f"{checkpoint.LATEST} (doesn't hold a run|was made with other)") as refused:
        fit_small(tmp_path, resume=True, approx_m=1)
    assert "\n" not in str(refused.value)
    assert (tmp_path / checkpoint.LATEST).read_bytes() == before


def test_whole_state_is_gone_on_from(stopped: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", checkpoint.load(stopped, "small"))
    assert [record["epoch"] for record in fit_small(tmp_path, resume=True, approx_m=1)] == [1, 2]


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adamax", "NAdam", "Adafactor"])
def test_state_of_other_optimisers_is_gone_on_from(name: str, tmp_path: Path) -> None:
    def optimizer(weights: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(weights, lr, **({"momentum": 0.9} if name == "SGD" else {}))

    fit_small(tmp_path / "straight", optimizer=optimizer)
    fit_small(tmp_path / "run", optimizer=optimizer, epochs=1)
    fit_small(tmp_path / "run", optimizer=optimizer, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


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
    model, trained = checkpoint.load_model(tmp_path / checkpoint.BEST, "small", small_model, torch.device("cpu"))
    assert model.n_latents == 2
    assert trained["settings"]["lr"] == 0.01
    best = min(records, key=lambda record: record["validation/loss"])
    assert (trained["epoch"], trained["validation_loss"]) == (best["epoch"], best["validation/loss"])
    seconds = [record["seconds"] for record in records[: best["epoch"]]]
    assert trained["training_seconds"] == pytest.approx(sum(seconds))
