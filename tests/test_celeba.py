"""CelebA: its networks, attributes as conditions and as predictions, and the scripts on made faces."""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from celeba.datasets import CONTROLS
from celeba.model import build_model
from mvae import MVAE, checkpoint, metrics
from mvae.datasets import celeba
from mvae.datasets.celeba import ATTRIBUTES
from mvae.errors import UserError
from mvae.estimators import mean_and_error
from mvae.scripts import faces, kinds, sampling
from mvae.scripts.kinds import Attributes, HeldOut
from mvae.synthetic.faces import DRAWN

from helpers import RunHere, assert_ended, assert_refused, assert_same_run, environment, run_warm, stats

ATTRS = Attributes(ATTRIBUTES)
SHORT = ["--n-latents", "8", "--limit", "80", "--batch-size", "40", "--annealing-epochs", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def model() -> MVAE:
    torch.manual_seed(0)
    return build_model(100).eval()


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# model.py


def test_inference_networks_have_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders) == 4_447_504


def test_image_encoder_has_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders["image"]) == 4_070_472


@torch.no_grad()
def test_networks_give_a_posterior_a_face_and_18_probabilities(model: MVAE) -> None:
    mu, logvar = model.posterior({"image": torch.rand(5, 3, 64, 64), "attrs": torch.ones(5, 18)})
    assert mu.shape == logvar.shape == (5, 100)
    assert model.likelihood("image").mean(mu).shape == (5, 3, 64, 64)
    assert model.likelihood("attrs").mean(mu).shape == (5, 18)


@torch.no_grad()
def test_no_attribute_at_all_is_a_condition_too(model: MVAE) -> None:
    mu, logvar = model.posterior({"attrs": torch.zeros(1, 18)})
    assert mu.any()
    assert logvar.any()


# Attributes as conditions


def test_made_faces_show_the_attributes_that_are_used() -> None:
    assert DRAWN == ATTRIBUTES


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("Male", {"Male": True}),
        ("-Male", {"Male": False}),
        ("Male,Eyeglasses,-Smiling", {"Male": True, "Eyeglasses": True, "Smiling": False}),
        ("wearing_hat, -BALD", {"Wearing_Hat": True, "Bald": False}),
        ("Male,Male", {"Male": True}),
    ],
)
def test_attributes_are_named_and_negated(text: str, given: dict[str, bool]) -> None:
    assert ATTRS.values(text) == [given]


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("Glasses", "Eyeglasses"), ("Male,-smile", "Smiling"), ("Moustache", "Mustache"), ("Mal", "Male")],
)
def test_unknown_attribute_is_refused_with_the_list_and_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        ATTRS.values(text)
    assert f"nearest is {nearest}," in str(caught.value)
    assert ", ".join(ATTRIBUTES) in str(caught.value)


@pytest.mark.parametrize("text", ["", ",", "Male,", "--Male", "-", "Male Smiling"])
def test_what_is_no_list_of_attributes_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no attribute"):
        ATTRS.values(text)


def test_attribute_that_is_to_be_there_and_absent_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="Male to be there and to be absent"):
        ATTRS.values("Male,-Male")


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--condition-on-attrs", "-Male"], ["--condition-on-attrs=-Male"]),
        (["--condition-on-image", "-Male,Bald", "--cuda"], ["--condition-on-image=-Male,Bald", "--cuda"]),
        (["--condition-on-attrs", "Male,-Bald"], ["--condition-on-attrs", "Male,-Bald"]),
        (["--condition-on-attrs=-Male", "-h"], ["--condition-on-attrs=-Male", "-h"]),
        (["--condition-on-attrs", "--cuda"], ["--condition-on-attrs", "--cuda"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        ([], []),
    ],
)
def test_word_with_a_minus_after_a_condition_belongs_to_it(
    words: list[str], joined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    assert faces.arguments() == joined


def test_picture_is_a_file_that_is_there_before_it_is_an_attribute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kinds.values(CONTROLS, "image", "-Male") == [HeldOut("attrs", {"Male": False})]
    Path("Male").touch()
    assert kinds.values(CONTROLS, "image", "Male") == [Path("Male")]


@pytest.mark.parametrize("text", ["portrait.jpg", "", "x" * 300])
def test_neither_file_nor_attribute_is_refused_as_both(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"there is no file .*, and .* is no attribute"):
        kinds.values(CONTROLS, "image", text)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(37, 91), (301, 64), (1, 1)])
def test_picture_of_any_mode_and_size_is_a_condition(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    noise = torch.randint(256, (*size[::-1], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).convert(mode).save(path)
    image = CONTROLS["image"].tensor(path)
    assert image.shape == (1, 3, 64, 64)
    assert 0 <= image.min() <= image.max() <= 1
    assert (image[:, 0] == image[:, 1]).all() == (mode in ("L", "1"))


def test_random_picture_is_a_validation_example_with_the_attributes(faces_dir: Path) -> None:
    _, held_out = celeba.training_data(faces_dir, faces_dir / "cache", allow_missing=False, workers=1)
    torch.manual_seed(0)
    given = {"image": [HeldOut("attrs", {"Male": True, "Smiling": False})] * 8}
    drawn = [row.batch["image"] for row in sampling.conditions(given, None, CONTROLS, lambda: held_out)]
    images = held_out.tensors["image"].float() / 255
    rows = [int((images == image).flatten(1).all(dim=1).nonzero()) for image in drawn]
    assert len(set(rows)) > 1
    attrs = held_out.tensors["attrs"][rows]
    assert attrs[:, ATTRIBUTES.index("Male")].all()
    assert not attrs[:, ATTRIBUTES.index("Smiling")].any()


# Attributes as text, and how well they are predicted


def test_line_names_the_attributes_that_are_there() -> None:
    there = torch.zeros(3, 18, dtype=torch.bool)
    there[0, [17, 9]] = True
    there[2] = True
    assert ATTRS.lines(there) == ["Male Wearing_Hat", "", " ".join(ATTRIBUTES)]


def predictions(n: int = 200) -> tuple[Tensor, Tensor]:
    """Probabilities and truths (n, 18), in which nobody has Mustache, all have Male, and one has Bald."""
    rng = torch.Generator().manual_seed(0)
    truth = (torch.rand(n, 18, generator=rng) < 0.2).float()
    truth[:, ATTRIBUTES.index("Mustache")] = 0
    truth[:, ATTRIBUTES.index("Male")] = 1
    truth[:, ATTRIBUTES.index("Bald")] = (torch.arange(n) == 3).float()
    return (0.6 * torch.rand(n, 18, generator=rng) + 0.4 * truth), truth


def test_accuracy_is_the_share_of_right_predictions() -> None:
    probabilities, truth = predictions()
    found = metrics.accuracies(probabilities, truth, ATTRIBUTES)
    right = (probabilities > 0.5) == (truth == 1)
    for i, name in enumerate(ATTRIBUTES):
        assert found[f"accuracy of {name}"].mean() == pytest.approx(right[:, i].double().mean())
    overall = found["accuracy of an attribute predicted from the image"]
    assert overall.shape == (200,)
    assert overall.mean() == pytest.approx(right.double().mean())


def test_even_chances_predict_that_an_attribute_is_absent() -> None:
    found = metrics.accuracies(torch.full((2, 18), 0.5), torch.eye(2, 18), ATTRIBUTES)
    assert found["accuracy of Bald"].tolist() == [0, 1]


def test_balanced_accuracy_is_the_mean_of_those_with_and_without() -> None:
    """Its standard error is that of a mean of two independent shares."""
    probabilities, truth = predictions()
    found = metrics.accuracies(probabilities, truth, ATTRIBUTES)
    for i, name in enumerate(ATTRIBUTES):
        if name in ("Mustache", "Male"):
            continue
        here = truth[:, i] == 1
        n1, n0 = int(here.sum()), int((~here).sum())
        p1, p0 = ((probabilities[part, i] > 0.5).double().mean().item() for part in (here, ~here))
        mean, error = mean_and_error(found[f"balanced accuracy of {name}"])
        assert mean == pytest.approx((p1 + 1 - p0) / 2)
        expected = math.sqrt(p1 * (1 - p1) / n1 + p0 * (1 - p0) / n0) / 2
        assert error == pytest.approx(expected * math.sqrt(200 / 199), abs=1e-12)


def test_attribute_that_all_or_none_have_has_no_balanced_accuracy() -> None:
    found = metrics.accuracies(*predictions(), ATTRIBUTES)
    names = [name for name in ATTRIBUTES if f"balanced accuracy of {name}" not in found]
    assert names == ["Male", "Mustache"]
    of_all = torch.stack([found[f"balanced accuracy of {name}"] for name in ATTRIBUTES if name not in names])
    torch.testing.assert_close(found["balanced accuracy of an attribute"], of_all.mean(dim=0))
    none = metrics.accuracies(torch.rand(3, 18), torch.zeros(3, 18), ATTRIBUTES)
    assert not any(name.startswith("balanced") for name in none)


# The scripts


@pytest.fixture(scope="module")
def trained(faces_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two epochs, of two steps each, has written."""
    folder = tmp_path_factory.mktemp("celeba")
    env = environment(MVAE_DATA_DIR=str(faces_dir), MVAE_CACHE_DIR=str(faces_dir / "cache"))
    done = run_warm("celeba/train.py", *SHORT, "--lambda-attrs", "10.", "--epochs", 2, cwd=folder, env=env)
    assert_ended(done)
    return folder / "trained_models"


def test_training_lowers_the_loss_of_the_official_validation_split(trained: Path) -> None:
    first, second = stats(trained)
    assert second["validation/loss"] < first["validation/loss"]
    assert 0 < second["validation/attribute_accuracy"] < 1
    assert [name for name in second if name.endswith("/elbo") and name.startswith("validation/")] == [
        "validation/joint/elbo",
        "validation/image/elbo",
        "validation/attrs/elbo",
    ]


def test_a_resumed_run_is_the_run(run_here: RunHere, trained: Path, tmp_path: Path) -> None:
    assert_ended(run_here("celeba/train.py", *SHORT, "--out-dir", tmp_path, "--epochs", 1))
    assert_ended(run_here("celeba/train.py", *SHORT, "--out-dir", tmp_path, "--epochs", 2, "--resume"))
    assert_same_run(tmp_path, trained, "celeba")


def test_there_is_no_n_val_where_the_data_have_a_validation_split(run_here: RunHere) -> None:
    done = run_here("celeba/train.py", "--n-val", 5)
    assert done.returncode == 2
    assert "unrecognized arguments: --n-val 5" in done.stderr


def test_datasets_says_how_much_is_there(run_here: RunHere, faces_dir: Path) -> None:
    done = run_here("celeba/datasets.py")
    assert_ended(done)
    assert "train 240 of 240 images, validation 60 of 60 images, test 60 of 60 images" in done.stdout
    assert str(faces_dir / "cache") in done.stdout


Sample = Callable[..., tuple[bytes, list[str]]]


@pytest.fixture
def draw(run_here: RunHere, trained: Path) -> RunHere:
    """Runs sample.py under conditions, for 8 faces."""
    return functools.partial(run_here, "celeba/sample.py", trained / checkpoint.BEST, "--n-samples", 8)


@pytest.fixture
def sample(draw: RunHere, tmp_path: Path) -> Sample:
    """Draws 8 faces under conditions: the bytes of their grid, and their lines of attributes."""

    def drawn(*condition: object) -> tuple[bytes, list[str]]:
        assert_ended(draw(*condition))
        return (tmp_path / "sample_image.png").read_bytes(), (tmp_path / "sample_attrs.txt").read_text().split("\n")

    return drawn


def test_sample_writes_a_grid_and_its_lines_of_attributes(draw: RunHere, tmp_path: Path) -> None:
    assert_ended(draw("--condition-on-attrs", "-Male", "--n-samples", 10))
    with Image.open(tmp_path / "sample_image.png") as grid:
        assert grid.height == 2 * 66 + 2
        assert json.loads(grid.info["mvae"])["given"] == ["attrs -Male"]
    lines = (tmp_path / "sample_attrs.txt").read_text().split("\n")[:-1]
    assert len(lines) == 10
    assert {name for line in lines for name in line.split()} <= set(ATTRIBUTES)


def test_every_condition_gives_other_faces(sample: Sample) -> None:
    conditions = ["Male", "-Male", "Male,Eyeglasses,-Smiling"]
    drawn = [sample(), *(sample("--condition-on-attrs", condition) for condition in conditions)]
    assert len({picture for picture, _ in drawn}) == 4
    assert drawn[0] == sample("--seed", 0)


@pytest.mark.parametrize("condition", ["Male,Eyeglasses,-Smiling", "-Male,Bald"])
def test_condition_is_a_word_of_its_own_or_stands_behind_an_equals_sign(sample: Sample, condition: str) -> None:
    assert sample("--condition-on-attrs", condition) == sample(f"--condition-on-attrs={condition}")


def test_attributes_that_are_not_named_are_absent(sample: Sample) -> None:
    others = ",".join(f"-{name}" for name in ATTRIBUTES if name != "Male")
    assert sample("--condition-on-attrs", "Male") == sample("--condition-on-attrs", f"Male,{others}")


def test_own_picture_is_a_condition_alone_and_beside_attributes(sample: Sample, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.new("RGBA", (81, 50), (200, 150, 120, 128)).save(own)
    drawn = [sample("--condition-on-image", own), sample("--condition-on-image", own, "--condition-on-attrs", "Male")]
    assert len({sample()[0], *(picture for picture, _ in drawn)}) == 3


def test_random_held_out_picture_is_a_condition_and_chosen_by_the_seed(sample: Sample) -> None:
    drawn = [sample("--condition-on-image", "-Male", "--seed", seed) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert drawn[0][0] not in (drawn[1][0], sample()[0])


@pytest.mark.parametrize("flag", faces.CONDITIONS)
def test_unknown_attribute_ends_sample_with_status_2(draw: RunHere, tmp_path: Path, flag: str) -> None:
    done = draw(flag, "Glasses")
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert all(words in said for words in (flag, "'Glasses'", "nearest is Eyeglasses", *ATTRIBUTES))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no picture\n", b"\x89PNG\r\n\x1a\n cut short"])
def test_what_is_no_picture_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^can't read .*own.png as a picture: it is none, or damaged$"):
        CONTROLS["image"].tensor(path)


def test_condition_that_cannot_be_had_ends_sample_in_one_line(draw: RunHere, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    own.touch()
    assert_refused(draw("--condition-on-image", own), 1, own, "as a picture")
    nobody = draw("--condition-on-image", "Bald,Wearing_Hat,-Male")
    assert_refused(nobody, 1, "none of the 60 held-out examples shows attrs 'Bald, Wearing_Hat, -Male'")
    assert list(tmp_path.iterdir()) == [own]


def test_loglike_prints_each_attributes_accuracies(
    run_here: RunHere, trained: Path, faces_dir: Path, tmp_path: Path
) -> None:
    few = ["--limit", 40, "--n-samples", 5, "--json", "found.json"]
    done = run_here("celeba/loglike.py", trained / checkpoint.BEST, *few)
    assert_ended(done)
    found = json.loads((tmp_path / "found.json").read_text())
    quantities = {"image", "image, attrs", "image | attrs", "attrs | image", "attrs"}
    assert {row["quantity"] for row in found["log_likelihood"]} == {f"log p({name})" for name in quantities}
    assert all(row["mean"] < 0 < row["standard_error"] for row in found["log_likelihood"])

    attrs = celeba.test_data(faces_dir, faces_dir / "cache", allow_missing=False, workers=1).tensors["attrs"][:40]
    both = {name for name, here in zip(ATTRIBUTES, attrs.T, strict=True) if 0 < here.sum() < 40}
    wanted = {f"accuracy of {name}" for name in ATTRIBUTES} | {f"balanced accuracy of {name}" for name in both}
    wanted |= {"accuracy of an attribute predicted from the image", "balanced accuracy of an attribute"}
    assert set(found["measures"]) == wanted
    for name, value in found["measures"].items():
        assert 0 <= value["mean"] <= 1
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in done.stdout.splitlines()


def test_balanced_coherence_is_of_each_attribute_and_of_all(run_here: RunHere, trained: Path, tmp_path: Path) -> None:
    few = ["--n-labels", 12, "--n-pictures", 3, "--n-prior", 5, "--classifier-epochs", 1, "--json", "found.json"]
    assert_ended(run_here("benchmarks/coherence.py", "celeba", "--model", trained / checkpoint.BEST, *few))
    found = json.loads((tmp_path / "found.json").read_text())
    means = {name.removeprefix("balanced coherence of "): value["mean"] for name, value in found["measures"].items()}
    of_each = [means[name] for name in ATTRIBUTES if name in means]
    assert of_each
    assert means["an attribute"] == pytest.approx(sum(of_each) / len(of_each))
    assert 0 <= found["classifier"]["balanced"] <= 1
