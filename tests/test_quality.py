"""Metrics: labels predicted from images by the model; and how good its draws are, as a classifier sees them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from mvae import MVAE, Bernoulli, Categorical, Gaussian, Likelihood
from mvae.run.metrics import attribute_accuracy, label_accuracy

import pytest
import torch
from torch import Tensor, nn

from helpers import ROOT, Trained, assert_ended, run_warm

sys.path.insert(0, str(ROOT / "benchmarks"))
from quality import Pictures, Viewer, frechet


class ToParameter(nn.Module):
    """The identity, or one place of z; with a parameter to tell the device by."""

    def __init__(self, place: int | None = None) -> None:
        super().__init__()
        self.scale, self.place = nn.Parameter(torch.ones(())), place

    def forward(self, z: Tensor) -> Tensor:
        return z * self.scale if self.place is None else z[:, self.place]


class Certain(nn.Module):
    """x itself, almost surely; of a class, its one-hot code."""

    def __init__(self, n_classes: int = 0) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = nn.functional.one_hot(x, self.n_classes) if self.n_classes else x.flatten(1)
        return mu.float(), torch.full(mu.shape, -20.0)


class Sign(nn.Module):
    """One place of z has the attribute's sign, and the others are unknown."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, there: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.zeros(len(there), 2)
        signs[:, self.place] = 20 * there - 10
        return signs, torch.full_like(signs, -20.0).where(signs != 0, 20.0)


def model(n_latents: int, likelihoods: Mapping[str, Likelihood], encoders: Mapping[str, nn.Module]) -> MVAE:
    """A model whose image is z itself, almost surely."""
    return MVAE(
        encoders={"image": Certain(), **encoders},
        likelihoods={"image": Gaussian(ToParameter()), **likelihoods},
        n_latents=n_latents,
    ).eval()


def model_of_classes() -> MVAE:
    return model(3, {"text": Categorical(ToParameter())}, {"text": Certain(3)})


def model_of_two_attributes() -> MVAE:
    """z is (left, right), and an attribute is there where its place is positive."""
    sides = {"left": 0, "right": 1}
    likelihoods = {name: Bernoulli(ToParameter(place)) for name, place in sides.items()}
    return model(2, likelihoods, {name: Sign(place) for name, place in sides.items()})


def test_label_accuracy_is_that_of_the_class_predicted_from_the_inputs() -> None:
    batch = {"image": torch.eye(3), "text": torch.tensor([0, 2, 2])}
    assert label_accuracy("text")(model_of_classes(), batch).tolist() == [1, 0, 1]
    assert label_accuracy("text", given=("text",))(model_of_classes(), batch).tolist() == [1, 1, 1]


def test_a_text_is_right_if_all_its_symbols_are() -> None:
    text = Gaussian(nn.Sequential(ToParameter(), nn.Unflatten(1, (2, 3))))
    batch = {"image": torch.tensor([[1.0, 0, 0, 0, 1, 0]] * 3), "text": torch.tensor([[0, 1], [0, 2], [2, 2]])}
    assert label_accuracy("text")(model(6, {"text": text}, {"text": Certain()}), batch).tolist() == [1, 0, 0]


def test_attribute_accuracy_is_the_fraction_predicted_from_the_image() -> None:
    attrs = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    batch = {"image": torch.tensor([[1.0, 1, -1, -1]] * 3), "attrs": attrs}
    small = model(4, {"attrs": Bernoulli(ToParameter())}, {"attrs": Certain()})
    assert attribute_accuracy(["attrs"])(small, batch).tolist() == [1, 0.75, 0]


def signs(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of images whose values are their labels' logits."""
    return images, images


def always_one(images: Tensor) -> tuple[Tensor, Tensor]:
    return images, torch.tensor([0.0, 1, 0]).expand(len(images), 3)


def agreement(pictures: Pictures) -> float:
    return pictures.measures(torch.randn(50, pictures.features.shape[1], dtype=torch.float64))["mean"]


def given(viewer: Viewer, labels: Tensor, n: int = 5, temperature: float = 1.0) -> Pictures:
    return viewer.given(labels, lambda one: viewer.model.draw(one, n, temperature))


def test_agreement_is_with_the_label_that_is_given() -> None:
    assert agreement(given(Viewer(model_of_classes(), signs), torch.arange(3))) == 1
    found = given(Viewer(model_of_classes(), always_one), torch.arange(3))
    assert (found.read == found.labels).view(3, 5).float().mean(dim=1).tolist() == [0, 1, 0]


def test_agreement_is_with_the_most_probable_label_of_the_same_draw() -> None:
    z = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert agreement(Viewer(model_of_classes(), signs).drawn(z)) == 1
    assert agreement(Viewer(model_of_classes(), always_one).drawn(z)) == pytest.approx(1 / 3, abs=0.1)


def test_attributes_are_given_and_read_in_order() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[False, True], [True, True], [True, False]])
    right = Viewer(model_of_two_attributes(), signs, ("left", "right"), binary=True)
    swapped = Viewer(model_of_two_attributes(), signs, ("right", "left"), binary=True)
    for viewer, shares in ((right, [1, 1, 1]), (swapped, [0, 1, 0])):
        found = given(viewer, labels, 4)
        assert (found.read == found.labels).double().view(3, -1).mean(dim=1).tolist() == shares
    z = torch.randn(300, 2)
    assert (right.drawn(z).read == right.drawn(z).labels).all()
    assert (swapped.drawn(z).read == swapped.drawn(z).labels).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_distance_is_that_of_two_gaussians() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 20_000, 3, dtype=torch.float64)
    scale = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b * scale + 2) == pytest.approx(3 * 4 + 0 + 1 + 4, rel=0.03)  # of equal axes: Σ (σ - σ')²


def test_variance_is_that_within_a_label() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(1000)
    spread = torch.tensor([1.0, 2], dtype=torch.float64) * torch.randn(3000, 2, dtype=torch.float64)
    pictures = Pictures(100 * labels.unsqueeze(1) + spread, labels, labels)
    assert pictures.measures(torch.randn(9, 2, dtype=torch.float64))["variance"] == pytest.approx(5, rel=0.1)


def test_the_error_is_over_strings_that_are_given() -> None:
    """Of 20 strings half are always read, and half never: 0.5 ± 0.5 / √20 or so, however many pictures of each."""
    labels = torch.arange(20).repeat_interleave(100).unsqueeze(1)
    features = torch.randn(2000, 2, dtype=torch.float64)
    found = Pictures(features, torch.where(labels < 10, labels, 0), labels, n_given=20).measures(features)
    assert found["mean"] == 0.5
    assert found["standard_error"] == pytest.approx(0.5 / 20**0.5, rel=0.1)


def test_the_command_writes_what_it_prints(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    words = ["mnist", trained.out_dir / "model_best.pth.tar", "--data-dir", digits_dir, "--n-draws", 50]
    words += ["--n-samples", 2, "--classifier-epochs", 1, "--json", "found.json"]
    done = run_warm("benchmarks/quality.py", *words, cwd=tmp_path)
    assert_ended(done)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["split"], found["n_real"], found["n_labels"]) == ("validation", 200, 10)
    for name, row in found["drawn"].items():
        assert f"{name}: agreement {row['mean']:.4f} ± {row['standard_error']:.4f}" in done.stdout
    assert found["training"]["command"].startswith("python mnist/train.py")
    log_p = {name: one["mean"] for name, one in found["log_p"].items()}
    assert log_p["gain"] == pytest.approx(log_p["fitted prior"] - log_p["N(0, I)"]) != 0
