"""Every flag of every train.py has its effect: most make another run of the same command, down to its weights."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimnist import datasets as multimnist
from mvae import checkpoint
from mvae.datasets.mnist import load_idx
from mvae.synthetic.__main__ import main as make

from helpers import assert_ended, environment, run_warm, same, stats, without_times

BASE = ["--epochs", 1, "--limit", 4, "--batch-size", 2, "--annealing-epochs", 2, "--n-latents", 4, "--lr", 1e-3]
"""Two steps."""

EVERY: dict[str, list[Any]] = {
    "--n-latents": [3],
    "--reconstruct": ["all"],
    "--annealing-epochs": [1],
    "--beta-hold": [1],
    "--lr": [2e-3],
    "--lr-schedule": ["late"],
    "--weight-decay": [0.5],
    "--iw-samples": [2],
    "--n-paired": [3],
    "--seed": [1],
    "--limit": [2],
}
"""Flags of every train.py, with a value unlike BASE's, which makes other weights."""

PAIRS = ["--n-paired", 3]
SHARED: dict[str, list[Any]] = {
    "--batch-size": [4],
    "--epochs": [2],
    "--warmup-epochs": [1],
    "--precision": ["bf16"],
    "--paired-fraction": [0.5],
    "--unpaired": ["both", *PAIRS],
    "--pairs-per-batch": [1, *PAIRS],
}
"""The same, for flags that no train.py itself reads: one experiment will do."""

TEXT: dict[str, list[Any]] = {"--lambda-image": [3], "--lambda-text": [3]}
OWN: dict[str, dict[str, list[Any]]] = {
    "mnist": {**TEXT, "--binarize": []},
    "fashionmnist": {**TEXT, "--binarize": []},
    "multimnist": TEXT,
    "celeba": {"--lambda-image": [3], "--lambda-attrs": [3]},
    "celeba19": {"--lambda-image": [3], "--lambda-attrs": [3], "--approx-m": [2], "--attr-missing": [0.5]},
    "vision": {
        **{f"--lambda-{name}": [3] for name in ("image", "gray", "edge", "mask", "obscured", "watermark")},
        **{f"--{name}-dir": ["other/celeba/img_align_celeba"] for name in ("image", "gray", "edge", "mask")},
        "--approx-m": [1],
        "--missing": [0.5],
    },
}
"""The flags that some train.py has beside, or wants another value of."""

ELSEWHERE = {
    "--help": "test_house",
    "--preset": "below",
    "--n-val": "below",
    "--canvas-dir": "below, and test_multimnist",
    "--data-dir": "below, and test_data",
    "--cache-dir": "test_celeba",
    "--workers": "test_picture_cache",
    "--allow-missing": "test_celeba",
    "--out-dir": "test_training_files",
    "--resume": "test_training_files",
    "--log-interval": "test_mnist_scripts",
    "--save-every": "test_training_files",
    "--cuda": "test_mnist_scripts",
    "--threads": "test_mnist_scripts",
    "--compile": "test_training_files",
}
"""The other flags, and the tests of their effect."""

CASES = [
    pytest.param(experiment, flag, values, id=f"{experiment}{flag}")
    for experiment, own in OWN.items()
    for flag, values in {**EVERY, **own, **(SHARED if experiment == "mnist" else {})}.items()
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, of made sets of all kinds, and `other`, of other faces. Runs write into it, too."""
    folder = tmp_path_factory.mktemp("flags")
    for name, seed in (("data", 0), ("other", 1)):
        faces = ["--train", "12", "--val", "4", "--test", "4", "--seed", str(seed)]
        assert make(["faces", str(folder / name), *faces]) == 0
    for command in ("digits", "fashion"):
        assert make([command, str(folder / "data"), "--train", "240", "--test", "24"]) == 0
    done = run_warm("multimnist/datasets.py", "--train", 240, "--test", 24, cwd=folder, env=environment_of(folder))
    assert_ended(done)
    return folder


FACES = "data/celeba/img_align_celeba"


def environment_of(root: Path) -> dict[str, str]:
    return environment(MVAE_DATA_DIR=str(root / "data"), MVAE_CACHE_DIR=str(root / "cache"))


def train(root: Path, experiment: str, *flags: object) -> Path:
    """Runs a train.py on the made data, with BASE and `flags`; gives its folder."""
    data: list[object] = [] if experiment in ("celeba", "celeba19", "vision") else ["--n-val", 20]
    if experiment == "vision":  # quick terms; and what is in the four folders is not the point here
        data = ["--reconstruct=given", *(f"--{name}-dir={FACES}" for name in ("image", "gray", "edge", "mask"))]
    out_dir = root / "runs" / re.sub(r"\W+", "_", " ".join(map(str, [experiment, *flags])))
    words = [*BASE, *data, *flags, "--out-dir", out_dir]
    assert_ended(run_warm(f"{experiment}/train.py", *words, cwd=root, env=environment_of(root)))
    return out_dir


base = functools.cache(train)
"""The same, made once: with no flags, the run with BASE alone."""


def weights(out_dir: Path, experiment: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(out_dir / checkpoint.LATEST, experiment)["model"]


@pytest.mark.parametrize("experiment", OWN)
def test_every_flag_is_tested(experiment: str, tmp_path: Path) -> None:
    said = run_warm(f"{experiment}/train.py", "-h", cwd=tmp_path).stdout
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", said, re.MULTILINE))
    assert "--epochs" in flags
    assert flags - ELSEWHERE.keys() == {*EVERY, *SHARED, *OWN[experiment]}


@pytest.mark.parametrize("experiment", OWN)
def test_same_command_gives_the_same_weights(experiment: str, root: Path) -> None:
    again = train(root, experiment, "--seed", 0)
    assert same(weights(again, experiment), weights(base(root, experiment), experiment))


@pytest.mark.parametrize(("experiment", "flag", "values"), CASES)
def test_flag_makes_other_weights(experiment: str, flag: str, values: list[Any], root: Path) -> None:
    changed = base(root, experiment, flag, *values)
    usual = base(root, experiment, *values[1:])  # with the flags that this one needs
    assert not same(weights(changed, experiment), weights(usual, experiment))


@pytest.mark.parametrize("experiment", OWN)
def test_preset_sets_the_defaults_and_given_flags_win(experiment: str, root: Path) -> None:
    settings = checkpoint.load(train(root, experiment, "--preset", "fast") / checkpoint.BEST, experiment)["settings"]
    usual = checkpoint.load(base(root, experiment) / checkpoint.BEST, experiment)["settings"]
    assert (usual["preset"], usual["lr_schedule"], usual["warmup_epochs"]) == ("paper", "constant", 0)
    assert (settings["preset"], settings["lr_schedule"]) == ("fast", "late over 1 epochs")
    assert settings["warmup_epochs"] > 0
    assert (settings["reconstruct"] != usual["reconstruct"]) == (experiment != "vision")  # its BASE gives the flag
    assert [settings[name] for name in ("epochs", "lr", "annealing_epochs")] == [1, 1e-3, 2]


@pytest.mark.parametrize("experiment", ["mnist", "fashionmnist", "multimnist"])
def test_n_val_is_the_number_of_validation_examples(experiment: str, root: Path) -> None:
    more, usual = train(root, experiment, "--n-val", 24), base(root, experiment)
    assert same(weights(more, experiment), weights(usual, experiment))
    (record,), (other) = without_times(stats(more)), without_times(stats(usual))[0]
    assert {name for name in record if record[name] != other[name]} >= {"validation/loss", "validation/joint/elbo"}
    assert record["train/loss"] == other["train/loss"]


@pytest.mark.parametrize("experiment", ["mnist", "celeba", "celeba19"])
def test_data_dir_says_where_the_data_are(experiment: str, root: Path) -> None:
    if experiment == "mnist":
        assert make(["digits", str(root / "other"), "--train", "240", "--test", "24", "--seed", "1"]) == 0
    changed = train(root, experiment, "--data-dir", "other")
    assert not same(weights(changed, experiment), weights(base(root, experiment), experiment))


def test_canvas_dir_says_where_the_canvases_are(root: Path) -> None:
    flags = ["--train", 240, "--test", 24, "--seed", 1, "--canvas-dir", "other/canvases"]
    assert_ended(run_warm("multimnist/datasets.py", *flags, cwd=root, env=environment_of(root)))
    changed = train(root, "multimnist", "--canvas-dir", "other/canvases")
    assert not same(weights(changed, "multimnist"), weights(base(root, "multimnist"), "multimnist"))


# What a validation split holds out.


def digits_shown(canvases: np.ndarray, known: dict[bytes, int]) -> set[int]:
    """The numbers of the digits on canvases (n, 50, 50), by their squares without what neighbours share."""
    corners = [(top, left) for top in (4, 23) for left in (4, 23)]
    squares = [canvas[top : top + 21, left : left + 21][2:19, 2:19] for canvas in canvases for top, left in corners]
    return {known[square.tobytes()] for square in squares if square.any()}


def test_validation_canvases_show_digits_that_no_training_canvas_shows(root: Path) -> None:
    images, _ = load_idx(root / "data", "MNIST", "train")
    squares = multimnist._scaled(images.numpy(), 21)[:, 2:19, 2:19]
    known = {square.tobytes(): number for number, square in enumerate(squares)}
    assert len(known) == len(images) == 240
    train, validation = multimnist.training_data(root / "data" / "MultiMNIST", n_val=20)
    trained, held_out = (digits_shown(part.tensors["image"].squeeze(1).numpy(), known) for part in (train, validation))
    assert len(trained) > 150
    assert len(held_out) > 5
    assert not trained & held_out
