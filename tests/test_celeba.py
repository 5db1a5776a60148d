"""CelebA and CelebA-19: how well attributes are predicted, and the scripts on synthetic faces."""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import celeba.datasets
import celeba.model
import celeba19.datasets
import celeba19.model
from mvae.data.celeba import ATTRIBUTES
from mvae.run import checkpoint, metrics
from mvae.run.evaluate import mean_and_error

import pytest
import torch
from PIL import Image

from helpers import RunHere, assert_ended, assert_refused, assert_same_run, environment, run_warm, stats

SHORT = ["--n-latents", 6, "--limit", 80, "--batch-size", 40, "--annealing-epochs", 2, "--lr", 1e-3]
SHORT += ["--lambda-attrs", "10.", "--reconstruct", "attrs"]
ALL = {"celeba": ("image", "attrs"), "celeba19": ("image", *ATTRIBUTES)}
FOLDERS = {"celeba": (celeba.datasets, celeba.model), "celeba19": (celeba19.datasets, celeba19.model)}


class Experiment(NamedTuple):
    """A trained experiment: its name, its run's folder, and its scripts, run in the test's own folder."""

    name: str
    out_dir: Path
    run: Callable[..., Any]


@pytest.fixture(scope="module", params=ALL)
def trained(faces_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Train for two epochs of two steps each; return the folder, named by the experiment."""
    folder = tmp_path_factory.mktemp("faces") / request.param
    env = environment(MVAE_DATA_DIR=str(faces_dir), MVAE_CACHE_DIR=str(faces_dir / "cache"))
    words = [*SHORT, "--epochs", 2, "--out-dir", folder]
    assert_ended(run_warm(f"{request.param}/train.py", *words, cwd=folder.parent, env=env))
    return folder


@pytest.fixture
def experiment(trained: Path, run_here: RunHere) -> Experiment:
    return Experiment(trained.name, trained, lambda script, *words: run_here(f"{trained.name}/{script}", *words))


Sample = Callable[..., tuple[bytes, list[str]]]


@pytest.fixture
def sample(experiment: Experiment, tmp_path: Path) -> Sample:
    """Draw 8 faces under conditions; return the pixels of their row, and their lines of attributes."""

    def drawn(*condition: object) -> tuple[bytes, list[str]]:
        assert_ended(experiment.run("sample.py", experiment.out_dir / checkpoint.BEST, "--n-samples", 8, *condition))
        with Image.open(tmp_path / "sample_image.png") as grid:
            faces = grid.crop((grid.width - 8 * 66, 0, grid.width, grid.height)).tobytes()
        return faces, (tmp_path / "sample_attrs.txt").read_text().splitlines()

    return drawn


# How well attributes are predicted


def test_accuracies_are_fractions_of_right_predictions_and_balanced_ones_of_both_groups() -> None:
    """A balanced accuracy's standard error is that of a mean of two independent fractions."""
    rng = torch.Generator().manual_seed(0)
    truth = (torch.rand(200, 18, generator=rng) < 0.2).float()
    male, bald, mustache = map(ATTRIBUTES.index, ("Male", "Bald", "Mustache"))
    truth[:, male], truth[:, mustache], truth[:, bald] = 1, 0, (torch.arange(200) == 3).float()
    probabilities = 0.6 * torch.rand(200, 18, generator=rng) + 0.4 * truth
    found = metrics.accuracies(probabilities, truth, ATTRIBUTES)
    right, balanced = ((probabilities > 0.5) == (truth == 1)).double(), []
    assert found["accuracy of an attribute predicted from the image"].mean() == pytest.approx(right.mean())
    for i, name in enumerate(ATTRIBUTES):
        assert found[f"accuracy of {name}"].mean() == pytest.approx(right[:, i].mean())
        if i in (male, mustache):  # one of the two groups is empty
            assert f"balanced accuracy of {name}" not in found
            continue
        here = truth[:, i] == 1
        p1, p0 = (right[group, i].mean().item() for group in (here, ~here))
        balanced.append((p1 + p0) / 2)
        mean, error = mean_and_error(found[f"balanced accuracy of {name}"])
        assert mean == pytest.approx(balanced[-1])
        expected = math.sqrt(p1 * (1 - p1) / int(here.sum()) + p0 * (1 - p0) / int((~here).sum())) / 2
        assert error == pytest.approx(expected * math.sqrt(200 / 199), abs=1e-12)
    assert found["balanced accuracy of an attribute"].mean() == pytest.approx(sum(balanced) / 16)
    none = metrics.accuracies(torch.full((2, 18), 0.5), torch.zeros(2, 18), ATTRIBUTES)
    assert none["accuracy of Bald"].tolist() == [1, 1]  # even chances predict that an attribute is absent


# train.py and datasets.py


def test_a_run_reports_each_term_and_is_resumed_exactly(experiment: Experiment, tmp_path: Path) -> None:
    first, second = stats(experiment.out_dir)
    assert second["train/image/log_prob/image"] > first["train/image/log_prob/image"]
    assert 0 < second["validation/attribute_accuracy"] < 1
    names = ALL[experiment.name]
    subsets = ["subset"] if experiment.name == "celeba19" else []  # --approx-m is 1 by default
    for part, terms in (("validation", ["joint", *names]), ("train", ["joint", *names, *subsets])):
        elbos = {name: value for name, value in second.items() if name.startswith(part) and name.endswith("/elbo")}
        assert list(elbos) == [f"{part}/{term}/elbo" for term in terms]
        assert all(map(math.isfinite, elbos.values()))
    for term in names:  # every term reconstructs all attributes
        scored = {name.split("/")[-1] for name in second if name.startswith(f"train/{term}/log_prob/")}
        assert scored == {term, *names[1:]}
    if experiment.name == "celeba19":  # one of them will do
        return
    assert_ended(experiment.run("train.py", *SHORT, "--epochs", 1))
    assert_ended(experiment.run("train.py", *SHORT, "--epochs", 2, "--resume"))
    assert_same_run(tmp_path / "trained_models", experiment.out_dir, experiment.name)


def test_datasets_says_how_many_images_there_are(run_here: RunHere, faces_dir: Path) -> None:
    done = run_here("celeba/datasets.py")
    assert_ended(done)
    assert re.search("train 240.* validation 60.* test 60.*images", done.stdout)
    assert str(faces_dir / "cache") in done.stdout


# sample.py


def test_every_condition_gives_other_faces(experiment: Experiment, sample: Sample, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.new("RGBA", (81, 50), (200, 150, 120, 128)).save(own)
    conditions: list[list[object]] = [
        [],
        ["--condition-on-attrs", "-Male,Bald"],
        ["--condition-on-image", own],
        ["--condition-on-image=-Male"],
    ]
    drawn = [sample(*condition)[0] for condition in conditions]
    assert len(set(drawn)) == len(conditions)
    # In a vector the attributes that aren't named are absent; as modalities they are inferred.
    others = ",".join(f"-{name}" for name in ATTRIBUTES if name != "Male")
    some, named = (sample("--condition-on-attrs", text, "--seed", 3) for text in ("Male", f"Male,{others}"))
    assert (some == named) == (experiment.name == "celeba")
    # An attribute of a sample is one that is more probable than not.
    (datasets, networks), path = FOLDERS[experiment.name], experiment.out_dir / checkpoint.BEST
    model, _ = checkpoint.load_model(path, experiment.name, networks.build_model)
    attrs = datasets.CONTROLS["attrs"]
    torch.manual_seed(3)
    with torch.no_grad():
        z = model.draw(attrs.batch("attrs", attrs.values("Male")[0].x), 8)
        means = model.mean(z, attrs.modalities("attrs"))
    assert some[1] == attrs.lines(attrs.join(means, "attrs"))
    assert {name for line in some[1] for name in line.split()} <= set(ATTRIBUTES)


def test_a_condition_that_is_not_there_is_refused_in_one_line(experiment: Experiment, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    own.write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    draw = functools.partial(experiment.run, "sample.py", experiment.out_dir / checkpoint.BEST)
    if experiment.name == "celeba":
        assert_refused(draw("--condition-on-image", own), 1, own)
        nobody = draw("--condition-on-image", "Bald,Wearing_Hat,-Male")
        assert_refused(nobody, 1, "none of the 60 held-out examples shows", "Bald, Wearing_Hat, -Male")
    glasses = draw("--condition-on-attrs", "Glasses")
    assert_refused(glasses, 2, "'Glasses'", "did you mean Eyeglasses", *ATTRIBUTES)
    assert list(tmp_path.iterdir()) == [own]


# loglike.py and benchmarks/quality.py


def test_loglike_reports_every_quantity_and_each_attributes_accuracy(experiment: Experiment, tmp_path: Path) -> None:
    words = [experiment.out_dir / checkpoint.BEST, "--limit", 40, "--n-samples", 5, "--json", "found.json"]
    done = experiment.run("loglike.py", *words)
    assert_ended(done)
    found = json.loads((tmp_path / "found.json").read_text())
    attrs, both = "attrs", "image, attrs"
    if experiment.name == "celeba19":
        attrs, both = "Bald, Bangs, ..., Wearing_Hat", "image, Bald, ..., Wearing_Hat"
    means = {(row["quantity"], row["proposal"]): row["mean"] for row in found["log_likelihood"]}
    names = {"image", both, f"image | {attrs}", f"{attrs} | image", attrs}
    assert {quantity for quantity, _ in means} == {f"log p({name})" for name in names}
    assert all(mean < 0 for mean in means.values())
    for proposal in ("q(z | image)", f"q(z | {both})"):
        difference = means[f"log p({both})", proposal] - means[f"log p(image | {attrs})", proposal]
        assert difference == pytest.approx(means[f"log p({attrs})", "p(z)"], abs=1e-6)
    expected = {f"accuracy of {name}" for name in ATTRIBUTES} | {"balanced accuracy of an attribute"}
    assert expected <= set(found["measures"])
    for name, value in found["measures"].items():
        assert 0 <= value["mean"] <= 1
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in done.stdout.splitlines()


@pytest.mark.parametrize("trained", ["celeba19"], indirect=True)
def test_quality_is_of_each_attribute_and_of_all(experiment: Experiment, run_here: RunHere, tmp_path: Path) -> None:
    few = ["--n-labels", 1, "--n-draws", 30, "--classifier-epochs", 1, "--json", "found.json"]
    words = [experiment.name, experiment.out_dir / checkpoint.BEST, *few]
    assert_ended(run_here("benchmarks/quality.py", *words))
    drawn = json.loads((tmp_path / "found.json").read_text())["drawn"]
    for row in [drawn["real images"], *(row for row in drawn.values() if "balanced" in row)]:
        of_each = [value["mean"] for value in row["of each"].values()]
        assert all(0 <= mean <= 1 for mean in [row["mean"], *of_each])
        assert set(row["of each"]) <= set(ATTRIBUTES)
        assert row["balanced"]["mean"] == pytest.approx(sum(of_each) / len(of_each))
