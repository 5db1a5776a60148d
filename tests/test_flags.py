"""Every flag of every train.py has its effect: most make other weights of the same command."""

import dataclasses
import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import multimnist.datasets as multimnist
from mvae import Data, Objective
from mvae.data.mnist import load_idx
from mvae.run import checkpoint
from mvae.run.reports import Reports
from synthetic.__main__ import main as make

import numpy as np
import pytest
import torch

from helpers import ROOT, assert_ended, environment, run_warm, same, script
from reference import paper_terms

BASE = ["--epochs", 1, "--limit", 4, "--batch-size", 2, "--annealing-epochs", 2, "--n-latents", 4, "--lr", 1e-3]
"""Two steps."""

PAIRS = ["--n-paired", 3]
LABELS = ["--images-first", 1, "--n-paired", 40, "--limit", 40]
EVERY: dict[str, list[Any]] = {
    "n_latents": [3],
    "annealing_epochs": [1],
    "beta_hold": [1],
    "lr": [2e-3],
    "lr_schedule": ["late"],
    "weight_decay": [0.5],
    "iw_samples": [2],
    "n_paired": [3],
    "seed": [1],
    "limit": [2],
    "batch_size": [4],
    "epochs": [2],
    "warmup_epochs": [1],
    "paired_fraction": [0.5],
    "unpaired": ["both", *PAIRS],
    "pairs_per_batch": [1, *PAIRS],
    "lambda_image": [3],
}
"""Values of every train.py's flags that make other weights than BASE's; the rest are flags that they need."""

TWO_STAGES: dict[str, list[Any]] = {"reconstruct": ["all"], "images_first": [1], "shift": [1]}
INFERRED: list[Any] = [1, *LABELS]
TEXT = {**TWO_STAGES, "lambda_text": [3], "self_labels": INFERRED, "rounds": [2, "--self-labels", *INFERRED]}
FEW: list[Any] = [1, "--images-first", 1, "--n-paired", 9, "--limit", 12]
FACES = {**TWO_STAGES, "lambda_attrs": [3], "self_labels": FEW, "rounds": [2, "--self-labels", *FEW]}
OWN: dict[str, dict[str, list[Any]]] = {
    "mnist": {
        **TEXT,
        "binarize": [],
        "precision": ["bf16"],
        "self_labels_by": ["regression", "--self-labels", 1, *LABELS],
        "data_dir": ["other"],
    },
    "fashionmnist": {**TEXT, "binarize": []},
    "multimnist": {**TEXT, "canvas_dir": ["other/canvases"]},
    "celeba": {**FACES, "data_dir": ["other"]},
    "celeba19": {**FACES, "approx_m": [2], "attr_missing": [0.5]},
    "vision": {
        "reconstruct": ["image"],
        **{f"lambda_{name}": [3] for name in ("gray", "watermark")},
        **{f"{name}_dir": ["other/celeba/img_align_celeba"] for name in ("image", "mask")},
        "approx_m": [1],
        "missing": [0.5],
    },
}
"""The flags that some train.py has in addition."""

ELSEWHERE = {
    **dict.fromkeys(("init", "out_dir", "resume", "wait", "save_every"), "test_resume"),
    **dict.fromkeys(("select", "compile", "log_interval"), "test_run"),
    **dict.fromkeys(("cuda", "threads"), "test_mnist_scripts"),
    "images_dir": "test_supervision",
    "n_val": "below",
    "cache_dir": "test_celeba",
    "workers": "test_picture_cache",
    "allow_missing": "test_celeba_data",
    **dict.fromkeys(("precision", "self_labels_by", "data_dir"), "mnist's"),
    **dict.fromkeys(("lambda_edge", "lambda_mask", "lambda_obscured", "gray_dir", "edge_dir"), "another's"),
}
"""The other flags, and the tests of their effect."""

PICTURES = "data/celeba/img_align_celeba"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data`, synthetic data sets of all kinds, and `other`, with others. Runs write into it."""
    folder = tmp_path_factory.mktemp("flags")
    for name, seed in (("data", "0"), ("other", "1")):
        make(["faces", str(folder / name), "--train", "12", "--val", "4", "--test", "4", "--seed", seed])
        make(["digits", str(folder / name), "--train", "240", "--test", "24", "--seed", seed])
        env = environment(MVAE_DATA_DIR=str(folder / name))
        canvases = ["--train", 240, "--test", 24, "--seed", seed, "--canvas-dir", folder / name / "canvases"]
        assert_ended(run_warm("multimnist/datasets.py", *canvases, cwd=folder, env=env))
    make(["fashion", str(folder / "data"), "--train", "240", "--test", "24"])
    return folder


@pytest.fixture
def train(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a train.py on the synthetic data, with BASE and flags; return its weights.

    Unless `really`, return what it would train, stage by stage: checksums of objective, training and validation data,
    some pictures, and a digest of the weights. `train.objective` is then the last one.
    """
    monkeypatch.chdir(root)
    monkeypatch.setattr(Reports, "write", lambda *_: None)  # a fifth of the time
    n = 0

    def run(experiment: str, *flags: object, really: bool = False) -> Any:
        nonlocal n
        n += 1
        words = [*BASE, "--threads", 1, "--data-dir", "data", "--out-dir", tmp_path / str(n)]
        words += ["--n-val", 20] if "mnist" in experiment else ["--cache-dir", "cache"]
        words += ["--canvas-dir", "data/canvases"] if experiment == "multimnist" else []
        if experiment == "vision":
            words += ["--reconstruct", "given"]
            words += [word for name in ("image", "gray", "edge", "mask") for word in (f"--{name}-dir", PICTURES)]
        monkeypatch.setattr(sys, "argv", [f"{experiment}/train.py", *map(str, [*words, *flags])])
        stages = []

        def fit(config: Any, objective: Objective, train: Data, validation: Data, *others: Any, **more: Any) -> None:
            what = [getattr(config, "approx_m", 0), objective.checksum(), train.checksum(), validation.checksum()]
            torch.manual_seed(0)
            what.append(train.batch(torch.arange(4))[0]["image"])
            stages.append([*what, checkpoint.digest(objective.model.state_dict())])
            run.objective = objective  # type: ignore[attr-defined]

        with script(f"{experiment}/train.py") as module:
            if not really:
                monkeypatch.setattr(module, "fit", fit)
            module.main()
        return checkpoint.load(tmp_path / str(n) / checkpoint.LATEST, experiment)["model"] if really else stages

    return run


@pytest.mark.parametrize("experiment", OWN)
def test_every_flag_has_an_effect(experiment: str, train: Any) -> None:
    with script(f"{experiment}/train.py") as module:
        fields = {field.name for field in dataclasses.fields(module.Config)}
    assert fields == EVERY.keys() | OWN[experiment].keys() | (ELSEWHERE.keys() & fields)
    run = functools.cache(functools.partial(train, experiment, really=experiment == "mnist"))
    assert same(run(), run("--seed", 0))
    for name, (*values,) in {**(EVERY if experiment == "mnist" else {"seed": [1]}), **OWN[experiment]}.items():
        assert not same(run(f"--{name.replace('_', '-')}", *values), run(*values[1:])), name
    weights = []
    for seed in (0, 1):
        train(experiment, "--seed", seed)
        weights.append(dict(train.objective.model.named_parameters()))
    assert all((x - weights[1][name]).abs().max() > 0.02 for name, x in weights[0].items() if x.dim() > 1)


@pytest.mark.parametrize("experiment", OWN)
def test_terms_are_the_papers_with_what_reconstruct_adds_and_weighted_if_they_have_the_image(
    experiment: str, train: Any
) -> None:
    """Terms conditioned on a label alone aren't weighted: its posterior would become wide."""
    for choice in ("given", "all") if experiment == "mnist" else ("all",):
        train(experiment, "--reconstruct", choice)
        objective = train.objective
        names = objective.model.modalities
        also = {"given": (), "all": names}[choice]
        for term, expected in zip(objective.terms, paper_terms(names), strict=True):
            assert term.inputs == expected.inputs
            assert set(term.reconstructs) == {*term.inputs, *also}
        assert objective.model.modalities[objective.iw] == "image"
        if experiment in ("celeba19", "vision"):
            assert objective.subset_also == also


def test_the_others_use_the_flags_that_mnists_script_uses() -> None:
    used = {name: set(re.findall(r"config\.(\w+)", (ROOT / name / "train.py").read_text())) for name in OWN}
    common = used["mnist"] - {"n_val", "data_dir", "binarize", "lambda_text"}
    assert {"lr", "weight_decay", "annealing_epochs", "iw_samples", "pairs", "init", "images_first"} <= common
    assert "approx_m" in used["celeba19"] & used["vision"]
    for name, own in used.items():
        first_stage = {"images_first", "first_stage", "lambda_image", "stages_with_labels", "shift"}
        first_stage |= {"self_labels", "self_labels_by"}
        assert common - own <= (first_stage if name == "vision" else set()), name


def test_n_val_is_the_number_of_validation_examples(train: Any) -> None:
    for experiment in ("mnist", "fashionmnist", "multimnist"):
        (usual,), (more,) = train(experiment), train(experiment, "--n-val", 24)
        assert usual[2] == more[2]
        assert usual[3] != more[3]


# What validation and test splits hold out


def splits(experiment: str, root: Path) -> list[Data]:
    """Return the three splits of the synthetic data, as `examples` returns them."""
    datasets = importlib.import_module(f"{experiment}.datasets")
    folders = {f"{name}_dir": root / PICTURES for name in ("image", "gray", "edge", "mask")}
    folders |= {"data_dir": root / "data", "cache_dir": root / "cache", "canvas_dir": root / "data" / "canvases"}
    source = datasets.Source(
        **{f.name: folders[f.name] for f in dataclasses.fields(datasets.Source) if f.name in folders}
    )
    settings = {"n_val": 20, "binarize": False, "canvases": None}
    return [datasets.examples(split, source, settings) for split in ("train", "validation", "test")]


def test_the_three_splits_share_no_picture(root: Path) -> None:
    for experiment in OWN:
        parts = splits(experiment, root)
        assert [len(part) for part in parts] == ([220, 20, 24] if "mnist" in experiment else [12, 4, 4])
        pictures = [{picture.numpy().tobytes() for picture in part.tensors["image"]} for part in parts]
        if experiment == "multimnist":  # the empty canvas may be in all of them
            pictures = [part - {bytes(50 * 50)} for part in pictures]
        assert len(set().union(*pictures)) == sum(map(len, pictures)), experiment


def test_held_out_canvases_show_digits_that_no_training_canvas_shows(root: Path) -> None:
    def squares(part: str) -> list[bytes]:
        images, _ = load_idx(root / "data", "MNIST", part)
        return [square.tobytes() for square in multimnist._scaled(images.numpy(), 21)[:, 2:19, 2:19]]

    def digits_shown(data: Data) -> set[bytes]:
        """Return the squares of the digits, without what neighbours share."""
        corners = [(top, left) for top in (4, 23) for left in (4, 23)]
        canvases = data.tensors["image"].squeeze(1).numpy()
        parts = [canvas[top : top + 21, left : left + 21][2:19, 2:19] for canvas in canvases for top, left in corners]
        return {part.tobytes() for part in parts if np.any(part)}

    of_train, of_test = set(squares("train")), set(squares("t10k"))
    train, validation, test = map(digits_shown, splits("multimnist", root))
    assert (len(of_train), len(train) > 150, len(validation) > 5) == (240, True, True)
    assert train < of_train
    assert validation < of_train - train
    assert test <= of_test
