"""Metrics: how well a label is read off a picture by the model, and by a classifier off what the model draws."""

import json
from pathlib import Path

from mvae import MVAE, Bernoulli, Categorical, Gaussian, Likelihood
from mvae.metrics import attribute_accuracy, coherence, label_accuracy, prior_agreement

import torch
from torch import Tensor, nn

from helpers import Trained, assert_ended, assert_refused, environment, run

N_CLASSES = 3


class LabelEncoder(nn.Module):
    """A label's code is 1 for it and 0 for the others, almost surely."""

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        mu = nn.functional.one_hot(label, N_CLASSES).float()
        return mu * 1.0, torch.full_like(mu, -20.0)


def model_of_codes() -> MVAE:
    """The picture and the label's logits are z itself."""
    return MVAE(
        encoders={"image": nn.Identity(), "text": LabelEncoder()},
        likelihoods={"image": Gaussian(ToParameter()), "text": Categorical(ToParameter())},
        n_latents=N_CLASSES,
    ).eval()


class ToParameter(nn.Module):
    """The identity, with a parameter to tell the device by."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.scale


class Sure(nn.Module):
    """The code is x itself, almost surely."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float().flatten(1), torch.full_like(x.float().flatten(1), -20.0)


def model_of_two(other: Likelihood, n_latents: int) -> MVAE:
    """The picture is z itself; `other` reads z its own way, as a modality called `other`."""
    return MVAE(
        encoders={"image": Sure(), "other": Sure()},
        likelihoods={"image": Gaussian(ToParameter()), "other": other},
        n_latents=n_latents,
    ).eval()


def test_accuracy_of_a_label_is_that_of_the_class_read_off_the_picture_alone() -> None:
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    batch = {"image": image, "text": torch.tensor([0, 2, 2])}
    model = MVAE(
        encoders={"image": Sure(), "text": LabelEncoder()},
        likelihoods={"image": Gaussian(ToParameter()), "text": Categorical(ToParameter())},
        n_latents=N_CLASSES,
    ).eval()
    assert label_accuracy("text")(model, batch).tolist() == [1, 0, 1]
    assert label_accuracy("text", given=("text",))(model, batch).tolist() == [1, 1, 1]


def test_text_is_read_right_where_all_its_symbols_are() -> None:
    model = model_of_two(Gaussian(nn.Sequential(ToParameter(), nn.Unflatten(1, (2, 3)))), n_latents=6)
    image = torch.tensor([[1.0, 0, 0, 0, 1, 0]] * 3)  # reads as 0, 1
    other = torch.tensor([[0, 1], [0, 2], [2, 2]])
    assert label_accuracy("other")(model, {"image": image, "other": other}).tolist() == [1, 0, 0]


def test_accuracy_of_attributes_is_the_share_read_right_off_the_picture_alone() -> None:
    model = model_of_two(Bernoulli(ToParameter()), n_latents=4)
    image = torch.tensor([[1.0, 1, -1, -1]] * 3)  # reads as there, there, absent, absent
    other = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    assert attribute_accuracy(["other"])(model, {"image": image, "other": other}).tolist() == [1, 0.75, 0]


def largest(pictures: Tensor) -> Tensor:
    return pictures.argmax(dim=1)


def always_one(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), dtype=torch.long)


def test_coherence_is_1_where_the_picture_shows_its_label() -> None:
    found = coherence(model_of_codes(), largest, torch.arange(N_CLASSES), n=5)
    assert torch.equal(found, torch.ones(N_CLASSES, 5, dtype=torch.bool))


def test_coherence_has_a_row_for_each_label() -> None:
    found = coherence(model_of_codes(), always_one, torch.arange(N_CLASSES), n=5)
    assert found.float().mean(dim=1).tolist() == [0, 1, 0]


def model_of_two_attributes() -> MVAE:
    """z is (left, right): the picture is z itself, and each attribute one of the two, sure where its sign is."""

    class Half(nn.Module):
        def __init__(self, place: int):
            super().__init__()
            self.place = place

        def forward(self, there: Tensor) -> tuple[Tensor, Tensor]:
            signs = torch.zeros(len(there), 2)
            signs[:, self.place] = 20 * there - 10
            return signs, torch.full_like(signs, -20.0).where(signs != 0, 20.0)

    class Value(nn.Module):
        def __init__(self, place: int):
            super().__init__()
            self.place = place

        def forward(self, z: Tensor) -> Tensor:
            return z[:, self.place]

    return MVAE(
        encoders={"image": Sure(), "left": Half(0), "right": Half(1)},
        likelihoods={"image": Gaussian(ToParameter()), "left": Bernoulli(Value(0)), "right": Bernoulli(Value(1))},
        n_latents=2,
    ).eval()


def test_labels_of_several_modalities_are_given_and_read_side_by_side() -> None:
    def signs(pictures: Tensor) -> Tensor:
        return pictures > 0

    labels = torch.tensor([[0.0, 1], [1, 1], [1, 0]])
    found = coherence(model_of_two_attributes(), signs, labels, n=4, given=("left", "right"))
    assert torch.equal(found, torch.ones(3, 4, 2, dtype=torch.bool))
    swapped = coherence(model_of_two_attributes(), signs, labels, n=4, given=("right", "left"))
    assert swapped.float().mean(dim=(1, 2)).tolist() == [0, 1, 0]
    agreed = prior_agreement(model_of_two_attributes(), signs, n=50, labels=("left", "right"))
    assert torch.equal(agreed, torch.ones(50, 2, dtype=torch.bool))
    crossed = prior_agreement(model_of_two_attributes(), signs, n=300, labels=("right", "left"))
    assert abs(crossed.float().mean().item() - 0.5) < 0.1


def test_a_low_temperature_draws_nearer_to_the_mean() -> None:
    seen = []

    def left(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return pictures[:, :1] > 0

    for temperature in (1.0, 0.25):
        torch.manual_seed(0)
        coherence(model_of_two_attributes(), left, torch.ones(1, 1), n=50, given=("left",), temperature=temperature)
    torch.testing.assert_close(seen[1][:, 1], seen[0][:, 1] / 2)  # the right is as the prior has it


def test_prior_agreement_compares_the_picture_and_the_label_of_one_draw() -> None:
    torch.manual_seed(0)
    assert prior_agreement(model_of_codes(), largest, n=300).tolist() == [True] * 300
    some = prior_agreement(model_of_codes(), always_one, n=300).float().mean().item()
    assert abs(some - 1 / 3) < 0.1


def test_the_command_writes_what_it_prints_and_keeps_its_classifier(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    arguments = ["mnist", "--model", trained.out_dir / "model_best.pth.tar", "--data-dir", digits_dir]
    arguments += ["--n-pictures", "5", "--n-prior", "20", "--classifier", tmp_path / "classifier.pth.tar"]
    arguments += ["--json", tmp_path / "found.json"]
    first = run("benchmarks/coherence.py", *arguments, cwd=tmp_path)
    assert_ended(first)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["classifier"]["n_examples"] == 200
    assert found["n_pictures_per_label"] == 5
    for name, value in found["measures"].items():
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in first.stdout
    again = run("benchmarks/coherence.py", *arguments, "--classifier-epochs", "9", cwd=tmp_path)
    assert again.stdout == first.stdout


def test_another_experiments_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    model = trained.out_dir / "model_best.pth.tar"
    done = run("benchmarks/coherence.py", "fashionmnist", "--model", model, cwd=tmp_path, env=environment())
    assert_refused(done, 1, "a checkpoint of 'mnist', not of 'fashionmnist'")
