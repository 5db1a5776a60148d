"""FashionMNIST: its networks, its classes by number and name, and the scripts as a user runs them."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fashionmnist import datasets
from fashionmnist.model import build_model
from mvae import MVAE, checkpoint
from mvae.layers import FoldConvTranspose2d, Permute
from mvae.synthetic import __main__ as synthetic

from helpers import ROOT, assert_ended, assert_same_run, run_warm, stats

SHORT = ["--n-val", "50", "--batch-size", "50", "--annealing-epochs", "4"]


@pytest.fixture(scope="module")
def model() -> MVAE:
    torch.manual_seed(0)
    return build_model(64)


@pytest.fixture(scope="module")
def fashion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 250 + 50 made garments."""
    folder = tmp_path_factory.mktemp("fashion")
    synthetic.main(["fashion", str(folder), "--train", "250", "--test", "50"])
    return folder


def train(data_dir: Path, out_dir: Path, *flags: object) -> None:
    arguments = ["--data-dir", data_dir, "--out-dir", out_dir, *SHORT, *flags]
    assert_ended(run_warm("fashionmnist/train.py", *arguments, cwd=out_dir.parent))


@pytest.fixture(scope="module")
def trained(fashion_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two epochs, of four steps each, has written."""
    out_dir = tmp_path_factory.mktemp("fashion_run") / "trained"
    train(fashion_dir, out_dir, "--epochs", 2)
    return out_dir


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# model.py


def test_inference_networks_have_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders) == 3_742_976


def test_image_encoder_has_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders["image"]) == 3_409_536


def test_layers_are_those_of_the_paper_and_none_has_batch_norm(model: MVAE) -> None:
    kinds = {type(layer) for layer in model.modules() if not any(True for _ in layer.children())}
    layers = {nn.Conv2d, nn.ConvTranspose2d, FoldConvTranspose2d, nn.Linear, nn.SiLU, nn.Embedding}
    assert kinds == layers | {nn.Flatten, nn.Unflatten, Permute}


def test_networks_give_a_posterior_a_picture_and_ten_probabilities(model: MVAE) -> None:
    mu, logvar = model.posterior({"image": torch.rand(5, 1, 28, 28), "text": torch.arange(5)})
    assert mu.shape == logvar.shape == (5, 64)
    assert model.likelihood("image").mean(mu).shape == (5, 1, 28, 28)
    torch.testing.assert_close(model.likelihood("text").mean(mu).sum(dim=1), torch.ones(5))


# datasets.py


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("9", 9), ("Ankle boot", 9), ("TROUSER", 1), ("t-shirt/top", 0)]
)
def test_class_is_given_by_number_or_name_in_any_case(text: str, number: int) -> None:
    assert datasets.CONTROLS["text"].values(text) == [number]


@pytest.mark.parametrize("text", ["10", "-1", "boot", "", "1.0"])
def test_other_words_are_no_class(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"0 T-shirt/top, 1 Trouser, .*, 9 Ankle boot$"):
        datasets.CONTROLS["text"].values(text)


def test_pictures_lie_in_0_to_1_and_classes_are_indices(fashion_dir: Path) -> None:
    training, validation = datasets.training_data(fashion_dir, n_val=50, limit=100)
    assert (len(training), len(validation)) == (100, 50)
    batch, _ = training.batch(torch.arange(7))
    assert batch["image"].shape == (7, 1, 28, 28)
    assert (batch["image"].min(), batch["image"].max()) == (0, 1)
    assert (batch["text"].shape, batch["text"].dtype) == ((7,), torch.int64)


def test_binary_test_pictures_are_drawn_once(fashion_dir: Path) -> None:
    def pictures() -> Tensor:
        return datasets.test_data(fashion_dir, binarize=True).batch(torch.arange(50))[0]["image"]

    assert set(pictures().unique().tolist()) == {0, 1}
    assert torch.equal(pictures(), pictures())


def test_real_fashionmnist_is_read() -> None:
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"))
    if not (folder / "FashionMNIST").is_dir():
        pytest.skip(f"real FashionMNIST is not in {folder}: MVAE_DATA_DIR names the folder that holds it")
    test = datasets.test_data(folder)
    assert test.tensors["text"].bincount().tolist() == [1000] * 10
    assert datasets.CLASSES[test.tensors["text"][0]] == "Ankle boot"


# train.py


def test_training_lowers_the_loss(trained: Path) -> None:
    first, second = stats(trained)
    assert second["validation/loss"] < first["validation/loss"]
    assert (first["beta"], second["beta"]) == (1 / 4, 2 / 4)
    assert 0 <= second["validation/label_accuracy"] <= 1


def test_resumed_run_is_the_run(trained: Path, fashion_dir: Path, tmp_path: Path) -> None:
    train(fashion_dir, tmp_path / "resumed", "--epochs", 1)
    train(fashion_dir, tmp_path / "resumed", "--epochs", 2, "--resume")
    assert_same_run(tmp_path / "resumed", trained, "fashionmnist")


# sample.py


def test_sample_takes_a_number_and_a_name_and_writes_names(trained: Path, fashion_dir: Path, tmp_path: Path) -> None:
    arguments = [trained / checkpoint.BEST, "--data-dir", fashion_dir, "--n-samples", 16]
    arguments += ["--condition-on-image", 0, "--condition-on-text", "ankle boot"]
    assert_ended(run_warm("fashionmnist/sample.py", *arguments, cwd=tmp_path))
    width, height = Image.open(tmp_path / "sample_image.png").size
    assert height == 2 * 30 + 2
    assert width > 9 * 30 + 2  # what is given, in words and as a picture, and eight columns
    names = (tmp_path / "sample_text.txt").read_text().splitlines()
    assert len(names) == 16
    assert set(names) <= set(datasets.CLASSES)


def test_wrong_name_is_refused_and_the_right_ones_are_listed(trained: Path, tmp_path: Path) -> None:
    done = run_warm("fashionmnist/sample.py", trained / checkpoint.BEST, "--condition-on-image", "Hat", cwd=tmp_path)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert all(words in said for words in ("--condition-on-image", "'Hat'", *datasets.CLASSES))
    assert list(tmp_path.iterdir()) == []


# loglike.py


def test_loglike_writes_every_quantity(trained: Path, fashion_dir: Path, tmp_path: Path) -> None:
    arguments = [trained / checkpoint.BEST, "--data-dir", fashion_dir, "--n-samples", 10, "--limit", 20]
    done = run_warm("fashionmnist/loglike.py", *arguments, "--json", tmp_path / "numbers.json", cwd=tmp_path)
    assert_ended(done)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["n_examples"], numbers["n_samples"]) == (20, 10)
    quantities = {"image", "image, text", "image | text", "text | image", "text"}
    assert {row["quantity"] for row in numbers["log_likelihood"]} == {f"log p({name})" for name in quantities}
    assert all(row["mean"] < 0 < row["standard_error"] for row in numbers["log_likelihood"])
