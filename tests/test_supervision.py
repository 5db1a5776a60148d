"""Weak supervision: which examples keep what, batches of one composition, and labels for the other examples."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist.model import build_model as build_digits
from multimnist.model import build_model as build_canvases
from mvae import Data, UsageError
from mvae.data.augment import shifted
from mvae.data.dataset import binarize, permuted_rows, pictures_and_labels
from mvae.data.supervision import (
    components,
    composed_rows,
    drop,
    keep_pairs,
    most_confident,
    neighbour_graph,
    regressed,
    relabelled,
    self_labelled,
    share_pairs,
    spread,
)
from mvae.run import checkpoint
from mvae.run.config import TwoStages

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import assert_ended, assert_refused, run_warm, stats

N = 300
NAMES = ("image", "text")


def labelled(n: int = N) -> Data:
    return Data(tensors={"image": torch.rand(n, 2), "text": torch.arange(n) % 10})


def masks(data: Data) -> tuple[Tensor, Tensor]:
    assert data.present is not None
    return data.present["image"], data.present["text"]


# Which examples keep what


def test_pairs_are_spread_over_the_classes_and_the_others_keep_the_image() -> None:
    data = labelled()
    image, text = masks(keep_pairs(data, 53, NAMES, seed=0, classes=data.tensors["text"]))
    assert image.all()
    counts = data.tensors["text"][text].bincount(minlength=10)
    assert counts.sum() == 53
    assert counts.max() - counts.min() == 1
    again, other = (masks(keep_pairs(data, 53, NAMES, seed=seed))[1] for seed in (0, 1))
    assert not torch.equal(again, other)


def test_either_side_is_kept_whatever_the_class() -> None:
    """Nine tenths of the examples have one class."""
    classes = (torch.arange(3000) % 10 == 0).long()
    data = Data(tensors={"image": torch.rand(3000, 2), "text": classes})
    image, text = masks(keep_pairs(data, 20, NAMES, unpaired="both", seed=0, classes=classes))
    assert [int(some.sum()) for some in (image & text, image & ~text, text & ~image)] == [20, 1490, 1490]
    shares = [classes[some].double().mean().item() for some in (image & ~text, text & ~image)]
    assert shares == pytest.approx([0.1, 0.1], abs=0.03)


def test_pairs_are_shared_between_training_and_validation_data() -> None:
    """In proportion, but at most a fifth for validation; spread evenly over the classes."""
    data = labelled()
    parts, same = (share_pairs(data[:180], data[180:], n, NAMES, unpaired="both", seed=0) for n in (50, 1 / 6))
    for part, again, pairs, others in zip(parts, same, (40, 10), (70, 55), strict=True):
        image, text = masks(part)
        assert part.checksum() == again.checksum()
        assert [int(some.sum()) for some in (image & text, image & ~text, text & ~image)] == [pairs, others, others]
        assert part.tensors["text"][image & text].bincount(minlength=10).unique().tolist() == [pairs // 10]
    assert [part.present for part in share_pairs(data[:180], data[180:], None, NAMES, seed=0)] == [None, None]
    few = share_pairs(data[:280], data[280:], 2, NAMES, seed=0)
    assert [int(masks(part)[1].sum()) for part in few] == [1, 1]
    for fraction, n in ((0.0119, 4), (0.0111, 3)):  # of 300, to the nearest
        some = share_pairs(data[:180], data[180:], fraction, NAMES, seed=0)
        assert sum(int(masks(part)[1].sum()) for part in some) == n


def test_drop_takes_from_each_modality_independently_and_restores_nothing() -> None:
    kept = keep_pairs(labelled(), 100, NAMES, seed=0)
    image, text = masks(drop(kept, 0.5, ["text"], seed=1))
    assert image.all()
    assert 25 < text.sum() < 75
    assert not (text & ~masks(kept)[1]).any()

    def here(seed: int) -> Tensor:
        return torch.stack(masks(drop(labelled(), 0.25, NAMES, seed=seed)))

    assert here(0).double().mean(dim=1).tolist() == pytest.approx([0.75, 0.75], abs=0.1)
    assert here(0).all(dim=0).double().mean().item() == pytest.approx(0.75**2, abs=0.1)
    assert torch.equal(here(0), here(0))
    assert not torch.equal(here(0), here(1))


# Batches


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
    many = keep_pairs(labelled(), 240, NAMES, seed=0)  # keep their fraction of a batch
    assert {int(masks(many)[1][rows].sum()) for rows in composed_rows(many, 20, 5, seed=0)} == {16}
    for some, pairs in ((labelled(), 0), (keep_pairs(labelled(), N, NAMES, seed=0), 5)):
        found, expected = composed_rows(some, 20, pairs, seed=0), permuted_rows(some, 20, seed=0)
        assert torch.equal(torch.stack(found), torch.stack(expected))


# Labels for the other examples


def two_moons() -> tuple[Tensor, Tensor]:
    """Return 200 points on two interleaved half circles, and the half of each."""
    angle = torch.linspace(0, math.pi, 100)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    noise = 0.02 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    return torch.cat([upper, lower]) + noise, torch.arange(200) // 100


def plain_graph(points: np.ndarray, k: int) -> np.ndarray:
    """Return the normalised graph of neighbours, point by point."""
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))
    nearest = [[j for j in np.argsort(row) if j != i][:k] for i, row in enumerate(distances)]
    sigma = np.mean([distances[i, j] for i, some in enumerate(nearest) for j in some])
    graph = np.zeros_like(distances)
    for i, some in enumerate(nearest):
        for j in some:
            weight = math.exp(-(distances[i, j] ** 2) / (2 * sigma**2))
            graph[i, j] += weight
            graph[j, i] += weight
    degrees = graph.sum(axis=1)
    return graph / np.sqrt(degrees[:, None] * degrees[None])


def test_graph_and_spread_labels_are_those_of_the_papers_formulas() -> None:
    points, truth = two_moons()
    graph, known = neighbour_graph(points, k=5), torch.arange(200) % 3 == 0
    expected = plain_graph(points.double().numpy(), 5)
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-9, atol=1e-15)
    labels = truth + (torch.arange(200) % 7 == 0)  # three classes of different sizes
    start = np.eye(3)[labels] * known.numpy()[:, None]
    found = 0.1 * np.linalg.solve(np.eye(200) - 0.9 * expected, start)  # to what the rounds converge
    found *= start.sum(axis=0) / found.sum(axis=0)
    found /= found.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(spread(graph, labels, known, alpha=0.9), found, rtol=1e-6)
    places = torch.stack([truth, labels], dim=1)  # each spreads on its own
    np.testing.assert_allclose(spread(graph, places, known, alpha=0.9)[:, 1], found, rtol=1e-6)


def test_features_side_by_side_count_alike_whatever_their_units() -> None:
    points, _ = two_moons()
    one, other = points[:, :1], points[:, 1:]
    graph = neighbour_graph(one, other).toarray()
    np.testing.assert_allclose(neighbour_graph(one * 1000, other / 7).toarray(), graph, rtol=1e-4, atol=1e-6)
    assert abs(neighbour_graph(one).toarray() - graph).max() > 0.1


def test_labels_are_spread_over_ten_neighbours_200_times_with_α_099() -> None:
    points, truth = two_moons()
    labels, known = truth + (torch.arange(200) % 7 == 0), torch.arange(200) % 3 == 0
    graph = plain_graph(points.double().numpy(), 10)
    found = start = np.eye(3)[labels] * known.numpy()[:, None]
    for _ in range(200):
        found = 0.99 * graph @ found + 0.01 * start
    found = found * start.sum(axis=0) / found.sum(axis=0)
    found /= found.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(spread(neighbour_graph(points), labels, known), found, rtol=1e-6)


def test_a_distant_point_and_unknown_labels_do_not_matter() -> None:
    points, truth = two_moons()
    known = torch.arange(201) % 20 == 0
    far, labels = torch.cat([points, torch.tensor([[1e4, 1e4]])]), torch.cat([truth, torch.tensor([0])])
    graph = neighbour_graph(far, k=5)
    assert np.isfinite(graph.toarray()).all()
    found = spread(graph, labels, known)
    assert (found[:200].argmax(dim=-1) == truth).all()
    for anything in (255, -1):
        assert torch.equal(found, spread(graph, labels.masked_fill(~known, anything), known))
        assert torch.equal(regressed(far, labels.masked_fill(~known, anything), known), regressed(far, labels, known))


@pytest.mark.parametrize("how", [{}, {"penalty": 2.0}])
def test_regression_is_at_the_minimum_of_its_loss(how: dict[str, float]) -> None:
    """Where the gradient is 0, each weight is a sum of the known points times their errors."""
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    known = torch.arange(60) < 40
    found = regressed(points, labels, known, **how)
    assert found.shape == (60, 3)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(60).double())
    errors = found[known] - torch.nn.functional.one_hot(labels[known], 3)
    assert errors.sum(dim=0).abs().max() < 1e-2  # the biases have no penalty
    weight = -points[known].T.double() @ errors / how.get("penalty", 1)
    for c in (1, 2):
        log_odds = (found[:, c] / found[:, 0]).log()
        expected = points.double() @ (weight[:, c] - weight[:, 0])
        torch.testing.assert_close(log_odds - log_odds[0], expected - expected[0], rtol=0, atol=2e-2)


def test_regression_has_its_own_weights_for_each_place_of_a_label() -> None:
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    truth = (points[:, :4] > 0).long()
    truth[:, 3] = 1  # nothing to regress
    known = torch.arange(400) < 100
    found = regressed(points, truth, known)
    assert found.shape == (400, 4, 2)
    assert (found.argmax(dim=-1) == truth)[~known].float().mean() > 0.93
    assert torch.equal(found[:, :1], regressed(points, truth[:, :1], known))


def test_the_most_confident_are_those_without_a_label_of_the_highest_probability() -> None:
    probabilities = (4 * torch.rand(N, 4, 10, generator=torch.Generator().manual_seed(0))).softmax(dim=-1)
    known = torch.arange(N) < 100
    chosen = most_confident(probabilities, known, 0.25)
    assert chosen.sum() == 50
    assert not (chosen & known).any()
    confidence = probabilities.amax(dim=-1).prod(dim=1)
    assert confidence[chosen].min() >= confidence[~chosen & ~known].max()


def test_other_labels_are_in_the_batches_and_the_pairs_stay_as_they_were() -> None:
    data, present = keep_pairs(labelled(), 100, NAMES, seed=0), torch.arange(N) < 200
    found = relabelled(data, {"text": torch.full((N,), 7)}, {"text": present})
    batch, here = found.batch(torch.tensor([3, 250]))
    assert here is not None
    assert batch["text"].tolist() == [7, 7]
    assert here["text"].tolist() == [True, False]
    assert found.checksum() != data.checksum()
    assert {int(masks(data)[1][rows].sum()) for rows in composed_rows(found, 20, 8, seed=0)} == {8}


def pictures(n: int) -> Data:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (n, 1, 28, 28), generator=rng, dtype=torch.uint8)
    return Data(tensors={"image": image, "text": torch.arange(n) % 10}, transform=pictures_and_labels)


@pytest.mark.parametrize("by", ["neighbours", "regression"])
def test_self_labels_are_found_from_the_means_of_the_images_that_are_there(by: Any) -> None:
    model, data = build_digits(4), keep_pairs(pictures(80), 30, NAMES, unpaired="both", seed=0)
    image, text = masks(data)
    hidden: Any = model.encoders["image"].hidden
    hidden.append(torch.nn.Dropout())  # only in training mode
    found = self_labelled(model.train(), data, ("text",), share=0.5, by=by)
    assert all(module.training for module in model.modules())
    batch, here = found.batch(torch.arange(80))
    assert here is not None
    assert here["text"].sum() == text.sum() + (~text).sum() // 2
    assert not (text & ~here["text"]).any()
    assert torch.equal(batch["text"][text], data.tensors["text"][text])
    with torch.no_grad():
        points, _ = model.eval().posterior({"image": batch["image"][image]})
    pixels = components(batch["image"][image].flatten(1))
    labels, known = data.tensors["text"][image], text[image]
    probabilities = regressed(points, labels, known)
    if by == "neighbours":
        probabilities = spread(neighbour_graph(points, pixels), labels, known)
    chosen = most_confident(probabilities, known, 0.5)
    assert torch.equal(here["text"][image], known | chosen)
    assert torch.equal(batch["text"][image][chosen], probabilities.argmax(dim=-1)[chosen])


def test_self_labels_of_drawn_pixels_do_not_depend_on_earlier_draws() -> None:
    """Otherwise the processes of a run would train on different labels."""
    data, model, found = binarize(keep_pairs(pictures(60), 20, NAMES, seed=0), "image"), build_digits(4), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(self_labelled(model, data, ("text",), share=0.5, by="neighbours").checksum())
    assert found[0] == found[1] != data.checksum()


def test_a_string_that_continues_after_its_end_is_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are inferred place by place."""
    texts = torch.tensor([[1, 2, 10, 10], [1, 10, 3, 10], [10, 10, 10, 10], [10, 0, 10, 10]]).repeat(5, 1)
    monkeypatch.setattr(
        "mvae.data.supervision.regressed",
        lambda points, labels, known: torch.nn.functional.one_hot(texts, 11).double(),
    )
    picture = torch.zeros(20, 1, 50, 50, dtype=torch.uint8)
    data = Data(tensors={"image": picture, "text": texts}, transform=pictures_and_labels)
    few = keep_pairs(data, 4, NAMES, seed=0)
    found = self_labelled(build_canvases(8), few, ("text",), share=1.0, by="regression")
    possible = torch.tensor([True, False, True, False]).repeat(5)
    assert torch.equal(masks(found)[1], possible | masks(few)[1])


def test_what_cannot_be_is_refused() -> None:
    data = labelled()
    few = keep_pairs(data, 12, NAMES, seed=0)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: keep_pairs(data, N + 1, NAMES, seed=0), "n must be from 1 to 300, the number of examples, got 301"),
        (lambda: share_pairs(data, data, 1, NAMES, seed=0), "complete examples must be from 2 to 600.*got 1"),
        (lambda: share_pairs(data, data, 601, NAMES, seed=0), "from 2 to 600.*got 601"),
        (lambda: composed_rows(data, 20, 5, seed=0), "pairs_per_batch needs examples that lack a modality"),
        (lambda: composed_rows(few, 20, 20, seed=0), "pairs_per_batch must be smaller than batch_size, got 20 and 20"),
    ]
    for call, said in calls:
        with pytest.raises(UsageError, match=said):
            call()


# Two stages


def test_self_labels_without_missing_labels_are_refused_in_one_line(digits_dir: Path, tmp_path: Path) -> None:
    words = ["--data-dir", digits_dir, "--n-val", 200, "--images-first", 1, "--self-labels", 0.5]
    assert_refused(run_warm("mnist/train.py", *words, cwd=tmp_path), 2, "set n_paired or paired_fraction")
    assert not [*tmp_path.rglob(checkpoint.LATEST)]


def test_images_first_then_labels_that_are_inferred_anew_in_each_round(digits_dir: Path, tmp_path: Path) -> None:
    words: list[object] = ["--data-dir", digits_dir, "--n-val", 200, "--batch-size", 50, "--n-latents", 8, "--lr", 2e-3]
    words += ["--annealing-epochs", 1, "--beta-hold", 6, "--weight-decay", 0.5, "--lambda-text", 50, "--epochs", 2]
    words += ["--reconstruct", "text", "--n-paired", 120, "--images-first", 6, "--self-labels", 0.9, "--out-dir", "run"]
    done = run_warm("mnist/train.py", *words, "--rounds", 2, "--shift", 1, cwd=tmp_path)
    assert_ended(done)
    assert done.stdout.count("\nlabels: 100 given + 810 inferred of 1,000\n") == 2
    first, second, last = (stats(tmp_path / "run" / name) for name in ("images", "round-1", "."))
    assert not [name for name in first[-1] if "text" in name or "joint" in name or "accuracy" in name]
    assert first[-1]["train/image/elbo"] > first[0]["train/image/elbo"]
    assert second[0]["train/loss"] < first[0]["train/loss"] * 2  # it continues from the first stage's weights
    assert 0.3 < second[-1]["validation/label_accuracy"] < last[-1]["validation/label_accuracy"]
    torch.manual_seed(0)
    drawn = build_digits(8).state_dict()
    learnt = checkpoint.load(tmp_path / "run" / "images" / checkpoint.LATEST, "mnist")["model"]
    unchanged = [name for name, weight in drawn.items() if torch.equal(learnt[name], weight)]
    assert unchanged == [name for name in drawn if ".text." in name]  # the first stage has no labels


def test_each_round_draws_batches_and_noise_of_its_own() -> None:
    config = TwoStages(images_first=1, self_labels=1, rounds=3, seed=7)
    seeds = [stage.seed for stage in config.stages_with_labels()]
    assert len(set(seeds)) == 3
    assert seeds[-1] == 7


def test_pictures_are_shifted_by_every_distance_up_to_the_most() -> None:
    torch.manual_seed(0)
    image = torch.zeros(500, 1, 5, 6)
    image[:, :, 2, 3] = 1
    batch, _ = shifted(Data(tensors={"image": image}), "image", 2).batch(torch.arange(500))
    places = batch["image"].flatten(1).argmax(dim=1)
    assert batch["image"].shape == image.shape
    assert batch["image"].sum() == 500
    assert sorted({(int(i) // 6, int(i) % 6) for i in places}) == [(y, x) for y in range(5) for x in range(1, 6)]
    torch.testing.assert_close(
        shifted(Data(tensors={"image": image}), "image", 0).batch(torch.arange(2))[0]["image"], image[:2]
    )
