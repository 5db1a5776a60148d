"""Every flag of every train.py has its effect: most make another run of the same command, down to its weights."""

import argparse
import dataclasses
import functools
import importlib
import re
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from multimnist import datasets as multimnist
from mvae import checkpoint
from mvae.data import Data
from mvae.datasets.mnist import load_idx
from mvae.errors import UserError
from mvae.estimators import Quantity, evaluate
from mvae.scripts import training
from mvae.synthetic.__main__ import main as make

from helpers import ROOT, assert_ended, environment, run_warm, same, stats, without_times

T = TypeVar("T")

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
    "--images-first": [1],
    "--seed": [1],
    "--limit": [2],
}
"""Flags of every train.py, with a value unlike BASE's, which makes other weights. They are tried with mnist's."""

PAIRS = ["--n-paired", 3]
SHARED: dict[str, list[Any]] = {
    "--batch-size": [4],
    "--epochs": [2],
    "--warmup-epochs": [1],
    "--precision": ["bf16"],
    "--paired-fraction": [0.5],
    "--unpaired": ["both", *PAIRS],
    "--pairs-per-batch": [1, *PAIRS],
    "--self-labels": [1, "--images-first", 1, "--n-paired", 40, "--limit", 40],
    "--self-labels-by": ["regression", "--self-labels", 1, "--images-first", 1, "--n-paired", 40, "--limit", 40],
}
"""The same, for flags that no train.py itself reads: one experiment will do."""

FEW_FACES = {"--self-labels": [1, "--images-first", 1, "--n-paired", 9, "--limit", 12]}
TEXT: dict[str, list[Any]] = {"--lambda-image": [3], "--lambda-text": [3]}
OWN: dict[str, dict[str, list[Any]]] = {
    "mnist": {**TEXT, "--binarize": []},
    "fashionmnist": {**TEXT, "--binarize": []},
    "multimnist": {**TEXT, "--self-labels": SHARED["--self-labels"]},
    "celeba": {"--lambda-image": [3], "--lambda-attrs": [3], **FEW_FACES},
    "celeba19": {
        "--lambda-image": [3],
        "--lambda-attrs": [3],
        "--approx-m": [2],
        "--attr-missing": [0.5],
        **FEW_FACES,
    },
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
    "--select": "below",
    "--canvas-dir": "below, and test_multimnist",
    "--data-dir": "below, and test_data",
    "--cache-dir": "test_celeba",
    "--workers": "test_picture_cache",
    "--allow-missing": "test_celeba",
    "--out-dir": "test_training_files",
    "--images-dir": "test_supervision",
    "--resume": "test_training_files",
    "--log-interval": "test_mnist_scripts",
    "--save-every": "test_training_files",
    "--cuda": "test_mnist_scripts",
    "--threads": "test_mnist_scripts",
    "--compile": "test_training_files",
    "--sync-batchnorm": "test_training",
}
"""The other flags, and the tests of their effect."""

CASES = [
    pytest.param(experiment, flag, values, id=f"{experiment}{flag}")
    for experiment, own in OWN.items()
    for flag, values in {**({**EVERY, **SHARED} if experiment == "mnist" else {}), **own}.items()
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, of made sets of all kinds, and `other`, of other faces. Runs write into it, too."""
    folder = tmp_path_factory.mktemp("flags")
    for name, seed in (("data", 0), ("other", 1)):
        faces = ["--train", "12", "--val", "4", "--test", "4", "--seed", str(seed)]
        make(["faces", str(folder / name), *faces])
    for command in ("digits", "fashion"):
        make([command, str(folder / "data"), "--train", "240", "--test", "24"])
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


def test_every_option_of_a_run_is_its_flags() -> None:
    numbers: dict[str, Any] = {"n_latents": 1, "batch_size": 1, "epochs": 1, "annealing_epochs": 1, "lr": 1.0}
    parser = training.parser("", modalities=("image", "text"), lambdas={}, approx_m=0, **numbers)
    wanted = {
        "epochs": 7,
        "batch_size": 31,
        "pairs_per_batch": 4,
        "seed": 5,
        "select": "joint",
        "precision": "bf16",
        "compile": True,
        "resume": True,
        "log_interval": 9,
        "save_every": 0.5,
        "out_dir": Path("elsewhere"),
    }
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in wanted.items()]
    found = training.options(parser.parse_args([*words, "--threads=1"]))
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert training.options(parser.parse_args(["--approx-m=3", "--threads=1"])).approx_m == 3
    assert training.options(parser.parse_args(["--sync-batchnorm", "--threads=1"])).sync_batchnorm
    few = [training.options(parser.parse_args([*words, "--batch-size=31"])) for words in ([], ["--n-paired=5"])]
    assert [options.pairs_per_batch for options in few] == [0, 10]
    others = {field.name for field in dataclasses.fields(found)} - wanted.keys()
    assert others == {"approx_m", "sync_batchnorm", "device"}  # the device is that of --cuda


@pytest.mark.parametrize("experiment", OWN)
def test_same_command_gives_the_same_weights(experiment: str, root: Path) -> None:
    again = train(root, experiment, "--seed", 0)
    assert same(weights(again, experiment), weights(base(root, experiment), experiment))


@pytest.mark.parametrize("experiment", OWN)
def test_seed_decides_the_first_weights(experiment: str, root: Path) -> None:
    """Two steps of this rate hardly move them."""
    one, other = (weights(base(root, experiment, *seed), experiment) for seed in ([], ["--seed", 1]))
    drawn = [name for name, weight in one.items() if weight.dim() > 1]
    assert drawn
    assert all((one[name] - other[name]).abs().max() > 0.02 for name in drawn)


def read_by(experiment: str) -> set[str]:
    """What a train.py takes of its flags: `args.NAME`, or a function that is given all of them."""
    source = (ROOT / experiment / "train.py").read_text()
    return {"".join(found) for found in re.findall(r"args\.(\w+)|(\w+\.\w+)\(\s*args", source)}


@pytest.mark.parametrize("experiment", [name for name in OWN if name != "mnist"])
def test_what_mnists_script_takes_of_its_flags_the_others_take_too(experiment: str) -> None:
    own = {"lambda_image", "lambda_text", "n_val", "binarize", "data_dir", "datasets.training_data"}
    taken = read_by("mnist") - own
    assert {"iw_samples", "lr", "weight_decay", "training.beta_schedule", "stages.images_first"} <= taken
    assert taken <= read_by(experiment)


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


def test_select_says_which_epochs_model_is_the_best(root: Path) -> None:
    learning = ["--epochs", 6, "--limit", 40, "--lr", 0.02, "--lambda-text", 1000, "--images-first", 1]
    usual, joint = (train(root, "mnist", *learning, *select) for select in ([], ["--select", "joint"]))
    assert same(weights(usual, "mnist"), weights(joint, "mnist"))
    records = stats(usual)
    least = min(records, key=lambda record: record["validation/loss"])["epoch"]
    greatest = max(records, key=lambda record: record["validation/joint/elbo"])["epoch"]
    assert least != greatest
    assert [checkpoint.load(run / checkpoint.BEST, "mnist")["epoch"] for run in (usual, joint)] == [least, greatest]


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
        make(["digits", str(root / "other"), "--train", "240", "--test", "24", "--seed", "1"])
    changed = train(root, experiment, "--data-dir", "other")
    assert not same(weights(changed, experiment), weights(base(root, experiment), experiment))


def test_canvas_dir_says_where_the_canvases_are(root: Path) -> None:
    flags = ["--train", 240, "--test", 24, "--seed", 1, "--canvas-dir", "other/canvases"]
    assert_ended(run_warm("multimnist/datasets.py", *flags, cwd=root, env=environment_of(root)))
    changed = train(root, "multimnist", "--canvas-dir", "other/canvases")
    assert not same(weights(changed, "multimnist"), weights(base(root, "multimnist"), "multimnist"))


# loglike.py, which each folder has.


def data_of(experiment: str, split: str, root: Path, settings: dict[str, Any]) -> Data:
    """What the experiment's `examples` gives of the made data."""
    folders = {f"{name}_dir": root / FACES for name in ("image", "gray", "edge", "mask")}
    folders |= {"data_dir": root / "data", "cache_dir": root / "cache", "canvas_dir": root / "data" / "MultiMNIST"}
    args = argparse.Namespace(**folders, allow_missing=False, workers=1)
    return importlib.import_module(f"{experiment}.datasets").examples(split, args, settings)


def pixels(data: Data) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in data.tensors["image"]}


@pytest.mark.parametrize("experiment", OWN)
def test_loglike_is_of_the_split_examples_draws_and_seed_asked_for(experiment: str, root: Path) -> None:
    path = base(root, experiment) / checkpoint.BEST
    words = [path, "--split", "validation", "--limit", 3, "--n-samples", 5, "--seed", 7, "--per-example", "each.npz"]
    words += [f"--{name}-dir={FACES}" for name in ("image", "gray", "edge", "mask") if experiment == "vision"]
    assert_ended(run_warm(f"{experiment}/loglike.py", *words, cwd=root, env=environment_of(root)))
    found = np.load(root / "each.npz")
    assert found["example"].tolist() == [0, 1, 2]
    build = importlib.import_module(f"{experiment}.model").build_model
    model, trained = checkpoint.load_model(path, experiment, build, torch.device("cpu"))
    held_out = data_of(experiment, "validation", root, trained["settings"])[:3]
    quantity, given = Quantity(("image",)), ("image",)
    expected = evaluate(model, held_out, quantities={quantity: [given]}, n_samples=5, seed=7).estimates[quantity, given]
    (column,) = ((found["quantity"] == "log p(image)") & (found["proposal"] == "q(z | image)")).nonzero()[0]
    np.testing.assert_allclose(found["log_p"][:, column], expected.log_p, rtol=1e-5)
    np.testing.assert_allclose(found["log_weight_variance"][:, column], expected.log_weight_variance, rtol=1e-3)


@pytest.mark.parametrize("experiment", OWN)
def test_the_three_splits_share_no_picture(experiment: str, root: Path) -> None:
    """Where pictures are all different; and the test split is the one that the data have for it."""
    settings = checkpoint.load(base(root, experiment) / checkpoint.BEST, experiment)["settings"]
    parts = [data_of(experiment, split, root, settings) for split in ("train", "validation", "test")]
    train, validation, test = (pixels(part) for part in parts)
    if experiment == "multimnist":  # the empty canvas may be in all of them
        empty = {bytes(50 * 50)}
        train, validation, test = train - empty, validation - empty, test - empty
    assert not train & validation
    assert not train & test
    assert not validation & test
    counts = {"celeba": [12, 4, 4], "celeba19": [12, 4, 4], "vision": [12, 4, 4]}.get(experiment, [220, 20, 24])
    assert [len(part) for part in parts] == counts


# What a validation split holds out.


def test_test_canvases_show_test_digits_in_a_layout_of_their_own(root: Path) -> None:
    test = multimnist.test_data(root / "data" / "MultiMNIST")
    known: dict[bytes, str] = {}
    for part in ("train", "t10k"):
        images, _ = load_idx(root / "data", "MNIST", part)
        squares = multimnist._scaled(images.numpy(), 21)[:, 2:19, 2:19]
        known |= {square.tobytes(): part for square in squares}
    assert set(digits_shown(test.tensors["image"].squeeze(1).numpy(), known)) == {"t10k"}
    train, _ = multimnist.training_data(root / "data" / "MultiMNIST", n_val=20)
    lengths = [(part.tensors["text"][:24] != multimnist.FILL).sum(dim=1).tolist() for part in (train, test)]
    assert lengths[0] != lengths[1]


def digits_shown(canvases: np.ndarray, known: dict[bytes, T]) -> set[T]:
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


def test_settings_that_train_does_not_record_are_named() -> None:
    assert training.recorded({"n_val": 5}, "n_val", int) == 5
    for settings in ({}, {"n_val": "5"}, {"n_val": True}):
        with pytest.raises(UserError, match=r"settings have .* for n_val, and .* of type int"):
            training.recorded(settings, "n_val", int)
