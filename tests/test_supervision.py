"""Weak supervision: which examples keep what, and batches of one composition."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnist.model import build_model as build_digits
from multimnist.model import build_model
from mvae import MVAE, checkpoint
from mvae.data import Data, binarize, pictures_and_labels
from mvae.errors import UsageError
from mvae.scripts import stages, training
from mvae.scripts.training import supervised
from mvae.supervision import composed_rows, drop, keep_pairs, neighbour_graph, regressed, relabelled, spread, surest

from helpers import assert_refused, assert_same_run, fit_small, run_warm, same, small_data, stats

N = 300
NAMES = ("image", "text")


def labelled() -> Data:
    return Data(tensors={"image": torch.rand(N, 2), "text": torch.arange(N) % 10})


def masks(data: Data) -> tuple[Tensor, Tensor]:
    assert data.present is not None
    return data.present["image"], data.present["text"]


def test_pairs_are_spread_over_the_classes_and_others_keep_the_image() -> None:
    data = keep_pairs(labelled(), 53, NAMES, seed=0, classes=labelled().tensors["text"])
    image, text = masks(data)
    assert image.all()
    counts = labelled().tensors["text"][text].bincount(minlength=10)
    assert counts.sum() == 53
    assert counts.max() - counts.min() == 1


def test_both_sides_of_different_examples() -> None:
    image, text = masks(keep_pairs(labelled(), 20, NAMES, unpaired="both", seed=0))
    assert (image & text).sum() == 20
    assert (image & ~text).sum() == (text & ~image).sum() == 140


def test_which_side_an_example_keeps_has_nothing_to_do_with_its_class() -> None:
    """Of examples nine tenths of which are of one class."""
    classes = (torch.arange(3000) % 10 == 0).long()
    data = Data(tensors={"image": torch.rand(3000, 2), "text": classes})
    image, text = masks(keep_pairs(data, 20, NAMES, unpaired="both", seed=0, classes=classes))
    shares = [classes[some].double().mean().item() for some in (image & ~text, text & ~image)]
    assert shares == pytest.approx([0.1, 0.1], abs=0.03)


def test_the_seed_decides_which() -> None:
    first, again, other = (masks(keep_pairs(labelled(), 20, NAMES, seed=seed))[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [0, N + 1])
def test_pairs_that_are_not_there(n: int) -> None:
    with pytest.raises(UsageError, match="`n_paired`"):
        keep_pairs(labelled(), n, NAMES, seed=0)


@pytest.mark.parametrize("asked", [{"n_paired": 50}, {"paired_fraction": 1 / 6}])
def test_pairs_are_shared_out_between_training_and_validation(asked: dict[str, float]) -> None:
    """Each in proportion, spread evenly over the classes; half of the other examples keep each side."""
    flagged = {"n_paired": None, "paired_fraction": None, "unpaired": "both", "seed": 0, **asked}
    parts = supervised(argparse.Namespace(**flagged), labelled()[:180], labelled()[180:], NAMES)
    for data, pairs, others in zip(parts, (30, 20), (75, 50), strict=True):
        image, text = masks(data)
        assert [int(some.sum()) for some in (image & text, image & ~text, text & ~image)] == [pairs, others, others]
        assert data.tensors["text"][image & text].bincount(minlength=10).unique().tolist() == [pairs // 10]


def test_drop_leaves_out_what_was_there_and_nothing_comes_back() -> None:
    data = drop(keep_pairs(labelled(), 100, NAMES, seed=0), 0.5, ["text"], seed=1)
    image, text = masks(data)
    assert image.all()
    assert 25 < text.sum() < 75
    assert not (text & ~masks(keep_pairs(labelled(), 100, NAMES, seed=0))[1]).any()


def test_drop_takes_each_modality_apart_and_by_its_seed() -> None:
    def here(seed: int) -> Tensor:
        return torch.stack(masks(drop(labelled(), 0.25, NAMES, seed=seed)))

    assert here(0).double().mean(dim=1).tolist() == pytest.approx([0.75, 0.75], abs=0.1)
    assert here(0).all(dim=0).double().mean().item() == pytest.approx(0.75**2, abs=0.1)
    assert torch.equal(here(0), here(0))
    assert not torch.equal(here(0), here(1))


def test_each_batch_has_its_pairs_and_an_epoch_its_length() -> None:
    data = keep_pairs(labelled(), 12, NAMES, seed=0)
    text = masks(data)[1]
    batches = composed_rows(data, 20, 5, seed=0)
    assert len(batches) == N // 20
    assert {tuple(text[rows].tolist()) for rows in batches} == {(True,) * 5 + (False,) * 15}
    rows = torch.cat(batches)
    assert rows[text[rows]].bincount(minlength=N)[text].min() == 6  # of 75 places for 12, in permutations
    assert rows[~text[rows]].bincount().max() == 1
    assert not torch.equal(rows, torch.cat(composed_rows(data, 20, 5, seed=1)))


def test_many_pairs_keep_their_share() -> None:
    data = keep_pairs(labelled(), 240, NAMES, seed=0)
    assert {int(masks(data)[1][rows].sum()) for rows in composed_rows(data, 20, 5, seed=0)} == {16}
    whole = keep_pairs(labelled(), N, NAMES, seed=0)
    assert torch.cat(composed_rows(whole, 20, 5, seed=0)).unique().numel() == N


def test_no_place_for_the_others() -> None:
    with pytest.raises(UsageError, match="`pairs_per_batch` 20"):
        composed_rows(keep_pairs(labelled(), 12, NAMES, seed=0), 20, 20, seed=0)


def test_what_is_missing_touches_nothing(tmp_path: Path) -> None:
    data = keep_pairs(small_data(24, seed=0), 8, ["image", "attrs", "label"], unpaired="both", seed=0)
    assert data.present is not None
    spoilt = {
        name: torch.where(data.present[name].view(-1, *[1] * (x.dim() - 1)), x, 2 if name == "label" else math.nan)
        for name, x in data.tensors.items()
    }
    runs = []
    for name, some in (("as it was", data), ("spoilt", dataclasses.replace(data, tensors=spoilt))):
        fit_small(tmp_path / name, train=some, pairs_per_batch=2)
        runs.append(checkpoint.load(tmp_path / name / checkpoint.LATEST, "small"))
    assert all(runs[0][part] == runs[1][part] for part in ("epoch", "best"))
    assert same(runs[0]["model"], runs[1]["model"])
    assert same(runs[0]["optimizer"], runs[1]["optimizer"])


def test_a_run_of_composed_batches_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    data = keep_pairs(small_data(24, seed=0), 8, ["image", "attrs", "label"], seed=0)
    fit_small(tmp_path / "straight", train=data, pairs_per_batch=3, epochs=3)
    fit_small(tmp_path / "parts", train=data, pairs_per_batch=3, epochs=1)
    fit_small(tmp_path / "parts", train=data, pairs_per_batch=3, epochs=3, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "parts", "small")
    fit_small(tmp_path / "by chance", train=data, epochs=3)
    weights = [
        checkpoint.load(tmp_path / name / checkpoint.LATEST, "small")["model"] for name in ("straight", "by chance")
    ]
    assert not same(*weights)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n-paired", 10**6], "--n-paired is from 2 to 1200"),
        (["--n-paired", 20, "--pairs-per-batch", 100], "--pairs-per-batch 100"),
        (["--n-paired", 20, "--self-labels", 0.5], "--images-first"),
        (["--images-first", 1, "--self-labels", 0.5, "--limit", 100, "--n-latents", 2], "--n-paired"),
    ],
)
def test_pairs_that_cannot_be_are_refused(flags: list[object], said: str, digits_dir: Path, tmp_path: Path) -> None:
    done = run_warm("mnist/train.py", "--data-dir", digits_dir, "--n-val", 200, *flags, cwd=tmp_path)
    assert_refused(done, UsageError("").status, said)


def test_images_first_then_labels_of_their_neighbours(digits_dir: Path, tmp_path: Path) -> None:
    def train(*flags: object) -> str:
        small = [
            "--n-val",
            200,
            "--batch-size",
            50,
            "--n-latents",
            8,
            "--lr",
            2e-3,
            "--annealing-epochs",
            1,
            "--beta-hold",
            6,
        ]
        few = [
            "--lambda-text",
            50,
            "--n-paired",
            120,
            "--images-first",
            6,
            "--images-dir",
            "images",
            "--self-labels",
            0.9,
        ]
        done = run_warm("mnist/train.py", "--data-dir", digits_dir, *small, *few, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = train("--epochs", 2, "--out-dir", "straight", "--reconstruct", "text")
    assert said.startswith("first stage, in images: the images alone\n")
    assert "\nsecond stage, in straight: 910 of the 1000 labels, 100 of them given\n" in said
    first, second = stats(tmp_path / "images"), stats(tmp_path / "straight")
    assert len(first) == 6
    assert not [name for name in first[-1] if "text" in name or "joint" in name]
    assert [record["beta"] for record in (*first, *second)] == [0] * 6 + [1] * 2
    assert first[-1]["train/image/elbo"] > first[0]["train/image/elbo"]
    assert second[0]["train/loss"] < first[0]["train/loss"] * 2  # it went on with what the first stage had learnt
    assert second[-1]["validation/label_accuracy"] > 0.4

    assert "nothing is left to do: images holds a run of 6 epochs" in train(
        "--epochs", 1, "--out-dir", "parts", "--reconstruct", "text"
    )
    train("--epochs", 2, "--out-dir", "parts", "--reconstruct", "text", "--resume")
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def two_moons() -> tuple[Tensor, Tensor]:
    """200 points on two half circles that reach into each other, and which half each is on."""
    angle = torch.linspace(0, math.pi, 100)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    noise = 0.02 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    return torch.cat([upper, lower]) + noise, torch.arange(200) // 100


def test_a_graph_is_symmetric_and_has_no_loops() -> None:
    graph = neighbour_graph(two_moons()[0], k=5).to_dense()
    assert torch.equal(graph, graph.T)
    assert not graph.diagonal().any()
    assert (graph > 0).sum(dim=1).min() >= 5
    assert torch.linalg.eigvalsh(graph).abs().max() == pytest.approx(1, abs=1e-4)


def test_labels_spread_along_the_points_rather_than_straight_across() -> None:
    points, truth = two_moons()
    known = torch.zeros(200, dtype=torch.bool)
    known[[5, 195]] = True
    found = spread(neighbour_graph(points, k=5), truth.masked_fill(~known, 0), known)
    assert found.shape == (200, 2)
    assert torch.allclose(found.sum(dim=-1), torch.ones(200))
    assert (found.argmax(dim=-1) == truth).all()
    nearest = torch.cdist(points, points[known]).argmin(dim=1)
    assert (nearest == truth).float().mean() < 0.95  # what distance alone would give


def test_labels_of_several_places_spread_place_by_place() -> None:
    points, half = two_moons()
    truth = torch.stack([half, 1 - half], dim=1)
    known = torch.zeros(200, dtype=torch.bool)
    known[[5, 195]] = True
    found = spread(neighbour_graph(points, k=5), truth, known)
    assert found.shape == (200, 2, 2)
    assert (found.argmax(dim=-1) == truth).all()


def test_classes_keep_their_share_of_the_known_labels() -> None:
    """Points in no order: nothing but the shares is to be known of the others."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(2000) % 10 == 0).long()
    known = torch.arange(2000) < 400
    found = spread(neighbour_graph(torch.randn(2000, 8, generator=generator)), labels, known)
    assert found[:, 1].mean().item() == pytest.approx(0.1, abs=0.03)


def test_an_unknown_label_may_hold_anything() -> None:
    points, truth = two_moons()
    known = torch.arange(200) % 20 == 0
    graph = neighbour_graph(points, k=5)
    for anything in (255, -1):
        found = spread(graph, truth.masked_fill(~known, anything), known)
        assert torch.equal(found, spread(graph, truth, known))


def test_labels_spread_although_a_point_is_far_from_all_others() -> None:
    points, truth = two_moons()
    far = torch.cat([points, torch.tensor([[1e4, 1e4]])])
    known = torch.arange(201) % 20 == 0
    graph = neighbour_graph(far, k=5)
    assert graph.to_dense().isfinite().all()
    found = spread(graph, torch.cat([truth, torch.tensor([0])]), known)
    assert (found[:200].argmax(dim=-1) == truth).all()


def test_regression_is_at_the_minimum_of_its_loss() -> None:
    """Where the gradient is 0, each weight is a sum of the known points times their errors."""
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    known = torch.arange(60) < 40
    found = regressed(points, labels, known, penalty=2.0)
    assert found.shape == (60, 3)
    assert torch.allclose(found.sum(dim=-1), torch.ones(60))
    errors = found[known] - torch.nn.functional.one_hot(labels[known], 3)
    assert errors.sum(dim=0).abs().max() < 1e-2  # the biases have no penalty
    weight = -points[known].T @ errors / 2
    for c in (1, 2):
        against = (found[:, c] / found[:, 0]).log()
        wanted = points @ (weight[:, c] - weight[:, 0])
        torch.testing.assert_close(against - against[0], wanted - wanted[0], rtol=0, atol=2e-2)


def test_regression_tells_each_place_of_a_label() -> None:
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    truth = (points[:, :4] > 0).long()
    known = torch.arange(400) < 100
    found = regressed(points, truth, known)
    assert found.shape == (400, 4, 2)
    assert (found.argmax(dim=-1) == truth)[~known].float().mean() > 0.93
    assert torch.equal(found, regressed(points, truth.masked_fill(~known[:, None], 255), known))


def test_the_surest_are_those_of_the_highest_probability_and_not_the_known_ones() -> None:
    probabilities = torch.rand(N, 4, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    known = torch.arange(N) < 100
    chosen = surest(probabilities, known, 0.25)
    assert chosen.sum() == 50
    assert not (chosen & known).any()
    sure = probabilities.amax(dim=-1).prod(dim=1)
    assert sure[chosen].min() >= sure[~chosen & ~known].max()


def pictures(n: int) -> Data:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (n, 1, 28, 28), generator=rng, dtype=torch.uint8)
    return Data(tensors={"image": image, "text": torch.arange(n) % 10}, transform=pictures_and_labels)


def stage(out_dir: Path, train: Data, *words: str) -> tuple[MVAE, Data]:
    """MNIST's model after the first stage of one epoch, and the second stage's training data."""
    sizes: dict[str, Any] = {"n_latents": 4, "batch_size": 20, "epochs": 1, "annealing_epochs": 1, "lr": 1e-3}
    parser = training.parser("", modalities=NAMES, lambdas={"image": 1.0, "text": 1.0}, **sizes)
    args = parser.parse_args(["--images-first=1", f"--out-dir={out_dir}", "--threads=1", *words])
    torch.manual_seed(0)
    model = build_digits(4)
    options = training.options(args)
    return model, stages.images_first(args, model, train, train, options, experiment="mnist", labels=["text"])


def test_first_stage_knows_no_label(tmp_path: Path) -> None:
    """What stands where a label isn't known may be anything, and the labels' networks stay as they were drawn."""
    data = keep_pairs(pictures(60), 20, NAMES, seed=0)
    unknown = data.tensors["text"].masked_fill(~masks(data)[1], 255)
    model, _ = stage(tmp_path / "known", data, "--weight-decay=0.5")
    other, _ = stage(tmp_path / "unknown", relabelled(data, {"text": unknown}, {}), "--weight-decay=0.5")
    assert same(model.state_dict(), other.state_dict())
    torch.manual_seed(0)
    drawn = build_digits(4)
    for name, stays in (("image", False), ("text", True)):
        for one, first in zip(*((m.encoders[name], m.likelihood(name)) for m in (model, drawn)), strict=True):
            assert same(one.state_dict(), first.state_dict()) == stays


def test_labels_of_drawn_pixels_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    """Else the processes of a run would go on with different labels."""
    data = binarize(keep_pairs(pictures(60), 20, NAMES, seed=0), "image")
    model = build_digits(4)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(stages._self_labelled(model, data, ["text"], 0.5, "neighbours").checksum())
    assert found[0] == found[1] != data.checksum()


def test_a_text_that_goes_on_after_its_end_is_no_label() -> None:
    model = build_model(8)
    texts = torch.tensor([[1, 2, 10, 10], [1, 10, 3, 10], [10, 10, 10, 10], [10, 0, 10, 10]]).repeat(300, 1)
    found = stages._possible(model, "text", texts, torch.randn(1200, 8))
    assert found.tolist() == [True, False, True, False] * 300


def test_other_labels_where_they_are_said_to_be() -> None:
    data = keep_pairs(labelled(), 100, NAMES, seed=0)
    present = torch.arange(N) < 200
    found = relabelled(data, {"text": torch.full((N,), 7)}, {"text": present})
    rows = torch.tensor([3, 250])
    batch, here = found.batch(rows)
    assert batch["text"].tolist() == [7, 7]
    assert torch.equal(batch["image"], data.batch(rows)[0]["image"])
    assert here is not None
    assert here["text"].tolist() == [True, False]
    assert here["image"].all()
    assert found.checksum() != data.checksum()
    assert masks(data)[1].sum() == 100  # the data that were given are not changed
    assert {int(masks(data)[1][rows].sum()) for rows in composed_rows(found, 20, 8, seed=0)} == {8}


@pytest.mark.parametrize("n", [3, 10])
def test_a_graph_needs_more_points_than_neighbours(n: int) -> None:
    with pytest.raises(UsageError, match=f"only {n} points"):
        neighbour_graph(torch.rand(n, 2))


def test_nothing_comes_from_nothing() -> None:
    points, none = torch.rand(20, 2), torch.zeros(20, dtype=torch.bool)
    with pytest.raises(UsageError, match="no label is `known`"):
        spread(neighbour_graph(points), torch.zeros(20), none)
    with pytest.raises(UsageError, match="no label is `known`"):
        regressed(points, torch.zeros(20), none)
