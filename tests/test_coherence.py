"""Metrics: labels predicted from images by the model, and read from generated images by a classifier."""

import json
from collections.abc import Mapping
from pathlib import Path

from mvae import MVAE, Bernoulli, Categorical, Gaussian, Likelihood
from mvae.run.metrics import attribute_accuracy, coherence, label_accuracy, prior_agreement

import pytest
import torch
from torch import Tensor, nn

from helpers import Trained, assert_ended, assert_refused, run_warm


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


def largest(images: Tensor) -> Tensor:
    return images.argmax(dim=1)


def always_one(images: Tensor) -> Tensor:
    return torch.ones(len(images), dtype=torch.long)


def signs(images: Tensor) -> Tensor:
    return images > 0


def test_coherence_is_where_the_image_shows_its_label_in_a_row_per_label() -> None:
    assert coherence(model_of_classes(), largest, torch.arange(3), n=5).tolist() == [[True] * 5] * 3
    found = coherence(model_of_classes(), always_one, torch.arange(3), n=5)
    assert found.float().mean(dim=1).tolist() == [0, 1, 0]


def test_prior_agreement_compares_the_image_and_the_label_of_one_draw() -> None:
    torch.manual_seed(0)
    assert prior_agreement(model_of_classes(), largest, n=300).tolist() == [True] * 300
    some = prior_agreement(model_of_classes(), always_one, n=300).float().mean().item()
    assert abs(some - 1 / 3) < 0.1


def test_labels_of_several_modalities_are_given_and_read_in_order() -> None:
    torch.manual_seed(0)
    both, labels = model_of_two_attributes(), torch.tensor([[0.0, 1], [1, 1], [1, 0]])
    found = coherence(both, signs, labels, n=4, given=("left", "right"))
    assert torch.equal(found, torch.ones(3, 4, 2, dtype=torch.bool))
    swapped = coherence(both, signs, labels, n=4, given=("right", "left"))
    assert swapped.float().mean(dim=(1, 2)).tolist() == [0, 1, 0]
    agreed = prior_agreement(both, signs, n=50, labels=("left", "right"))
    assert torch.equal(agreed, torch.ones(50, 2, dtype=torch.bool))
    crossed = prior_agreement(both, signs, n=300, labels=("right", "left"))
    assert abs(crossed.float().mean().item() - 0.5) < 0.1


def test_the_temperature_multiplies_the_variance_of_z() -> None:
    seen = []

    def left(images: Tensor) -> Tensor:
        seen.append(images)
        return images[:, 0] > 0

    for temperature in (1.0, 0.25):
        torch.manual_seed(0)
        coherence(model_of_two_attributes(), left, torch.ones(1), n=50, given=("left",), temperature=temperature)
    torch.testing.assert_close(seen[1][:, 1], seen[0][:, 1] / 2)  # the right is as in the prior


@pytest.fixture
def best(trained: Trained) -> Path:
    return trained.out_dir / "model_best.pth.tar"


def test_the_command_writes_what_it_prints_and_keeps_its_classifier(
    best: Path, digits_dir: Path, tmp_path: Path
) -> None:
    arguments = ["mnist", best, "--data-dir", digits_dir, "--n-pictures", 5, "--n-prior", 20]
    arguments += ["--classifier", "classifier.pth.tar", "--json", "found.json"]
    first = run_warm("benchmarks/coherence.py", *arguments, cwd=tmp_path)
    assert_ended(first)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["classifier"]["n_examples"], found["n_pictures_per_label"]) == (200, 5)
    for name, value in found["measures"].items():
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in first.stdout
    again = run_warm("benchmarks/coherence.py", *arguments, "--classifier-epochs", 9, cwd=tmp_path)
    assert again.stdout == first.stdout


def test_another_experiments_checkpoint_is_refused(best: Path, tmp_path: Path) -> None:
    done = run_warm("benchmarks/coherence.py", "fashionmnist", best, cwd=tmp_path)
    assert_refused(done, 1, "a checkpoint of 'mnist', not of 'fashionmnist'")
