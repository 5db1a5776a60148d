"""Weak supervision: examples that lack modalities, and batches in which the complete ones have their share.

The protocol is the paper's (Wu & Goodman 2018, section 5.3): the number of examples stays, a share of them is paired,
and each of the others shows one side alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Data, permuted_rows
from .errors import UsageError

Unpaired = Literal["image", "both"]

TINY = 1e-30  # in place of 0 in a denominator


def keep_pairs(
    data: Data,
    n: int,
    modalities: Sequence[str],
    *,
    unpaired: Unpaired = "image",
    seed: int,
    classes: Tensor | None = None,
) -> Data:
    """`data` in which n examples keep all of their modalities, and each of the others a part.

    Args:
        modalities: their names. One side is the first of them, the picture; the other side is all others.
        unpaired: "image" leaves the picture to each other example; "both" leaves to one half of them the picture, and
            to the other half the other side.
        seed: decides which.
        classes: (N,) whole numbers. The n are then spread evenly over the classes.

    Raises UsageError if n is not from 1 to N.
    """
    if not 1 <= n <= len(data):
        raise UsageError(f"`n_paired` {n} is not from 1 to {len(data)}, the number of examples")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    if classes is not None:
        order = _taking_turns(order, classes.cpu())
    pairs, rest = order[:n], order[n:]
    one_sided = rest[torch.randperm(len(rest), generator=generator)]
    cut = len(rest) if unpaired == "image" else len(rest) // 2
    first, others = torch.zeros(2, len(data), dtype=torch.bool)
    first[pairs] = others[pairs] = True
    first[one_sided[:cut]] = others[one_sided[cut:]] = True
    return _limited(data, {name: others if m else first for m, name in enumerate(modalities)})


def drop(data: Data, share: float, names: Sequence[str], *, seed: int) -> Data:
    """`data` in which each example lacks each of the modalities `names` with probability `share`."""
    generator = torch.Generator().manual_seed(seed)
    return _limited(data, {name: torch.rand(len(data), generator=generator) >= share for name in names})


def composed_rows(data: Data, batch_size: int, pairs: int, seed: int) -> list[Tensor]:
    """The rows of an epoch's batches, all of one composition: so many complete examples, and then so many others.

    Complete are those that lack nothing, or `data.pairs`: `pairs` of a batch, or their share of the data where that is
    more. Both kinds come in permutations, each begun anew when it ends; an epoch has as many batches as
    `permuted_rows` gives. Where all examples are complete, or none, or `pairs` is 0, the batches are those of
    `permuted_rows`.

    Raises UsageError if `pairs` leaves no place for the others.
    """
    if pairs >= batch_size:
        raise UsageError(f"`pairs_per_batch` {pairs} leaves the other examples no place in a batch of {batch_size}")
    if not pairs or not data.present:
        return permuted_rows(data, batch_size, seed)
    complete = complete_examples(data.present) if data.pairs is None else data.pairs
    whole, rest = complete.nonzero().flatten(), (~complete).nonzero().flatten()
    if not len(whole) or not len(rest):
        return permuted_rows(data, batch_size, seed)
    n_batches = max(1, len(data) // batch_size)
    by_chance = min(round(batch_size * len(whole) / len(data)), batch_size - 1)
    generator = torch.Generator().manual_seed(seed)
    some = _over_and_over(whole, n_batches, max(pairs, by_chance), generator)
    others = _over_and_over(rest, n_batches, batch_size - max(pairs, by_chance), generator)
    return list(torch.cat([some, others], dim=1))


def neighbour_graph(points: Tensor, k: int = 10) -> Tensor:
    """The graph of each point's k nearest others: sparse (N, N), symmetric, normalised as `spread` takes it.

    An edge weighs exp(-d² / 2σ²), where d is its length and σ the mean length; one that both ends have counts twice.

    Args:
        points: (N, dimensions), such as the means of q(z | image).

    Raises UsageError if there are not more than k points.
    """
    n = len(points)
    if n <= k:
        raise UsageError(f"a point's {k} nearest others are wanted, and there are only {n} points")
    squares = points.square().sum(dim=1)
    distances, ends = [], []
    for start in range(0, n, 1000):  # a thousand rows of the (N, N) distances at a time
        some = slice(start, min(start + 1000, n))
        between = squares[some, None] - 2 * points[some] @ points.T + squares
        between[torch.arange(len(between)), torch.arange(some.start, some.stop)] = torch.inf  # not its own neighbour
        nearest = between.topk(k, largest=False)
        distances.append(nearest.values.clamp(min=0))
        ends.append(nearest.indices)
    d2 = torch.cat(distances).flatten()
    weights = torch.exp(-d2 / (2 * d2.sqrt().mean().square()).clamp(min=1e-12))
    edges = torch.stack([torch.arange(n, device=points.device).repeat_interleave(k), torch.cat(ends).flatten()])
    both_ways = torch.cat([edges, edges.flip(0)], dim=1)
    degree = torch.zeros(n, device=points.device).index_add_(0, both_ways[0], weights.repeat(2))
    # Each end's root apart: the product of two small degrees may be 0, and so may the degree of a point far from all.
    scale = degree.clamp(min=TINY).rsqrt()
    normalised = weights.repeat(2) * (scale[both_ways[0]] * scale[both_ways[1]])
    return torch.sparse_coo_tensor(both_ways, normalised, (n, n), check_invariants=False).coalesce()


def spread(graph: Tensor, labels: Tensor, known: Tensor, *, alpha: float = 0.99, rounds: int = 200) -> Tensor:
    """Every example's label, from the known ones: probabilities, (N, *label, classes).

    The known labels spread over the graph: F <- α S F + (1 - α) Y, from F = Y, the known ones as one-hot rows (Zhou et
    al. 2004). A class's mass over all examples is then made its share of the known labels (Zhu et al. 2003, section 4).

    Args:
        graph: (N, N), S of `neighbour_graph`.
        labels: whole numbers, (N,), or (N, places) for a label of several places, each of which spreads for itself.
        known: bool (N,): where `labels` holds one.

    Raises UsageError if no label is known.
    """
    if not known.any():
        raise UsageError("no label is `known`, and one or more are wanted")
    classes = int(labels[known].max()) + 1
    # A label that isn't known may hold any value.
    one_hot = F.one_hot(labels.long().clamp(0, classes - 1), classes).float()
    one_hot[~known] = 0
    start = found = one_hot.flatten(1)
    for _ in range(rounds):
        found = alpha * torch.sparse.mm(graph, found) + (1 - alpha) * start
    mass = found.view_as(one_hot)
    mass = mass * one_hot.sum(dim=0) / mass.sum(dim=0).clamp(min=TINY)
    return mass / mass.sum(dim=-1, keepdim=True).clamp(min=TINY)


def regressed(points: Tensor, labels: Tensor, known: Tensor, *, penalty: float = 1.0) -> Tensor:
    """Every example's label by logistic regression on its point: probabilities, (N, *label, classes).

    The summed cross-entropy of the known labels and penalty / 2 times the squared weights are minimised together, by
    L-BFGS from 0. Each place of a label has weights for itself.

    Args:
        points: (N, ...), such as the means of q(z | image).
        labels: whole numbers, (N, *label).
        known: bool (N,): where `labels` holds one.

    Raises UsageError if no label is known.
    """
    if not known.any():
        raise UsageError("no label is `known`, and one or more are wanted")
    points, targets = points.flatten(1), labels[known].long()
    event, classes = targets.shape[1:], int(targets.max()) + 1
    weight = points.new_zeros(points.shape[1], event.numel() * classes, requires_grad=True)
    bias = points.new_zeros(event.numel() * classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    some = points[known]

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (some @ weight + bias).view(-1, classes)
        value = F.cross_entropy(logits, targets.flatten(), reduction="sum") + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (points @ weight + bias).detach().view(len(points), *event, classes).softmax(dim=-1)


def surest(probabilities: Tensor, known: Tensor, share: float) -> Tensor:
    """bool (n,): the examples of those not `known` whose most probable label is surest, `share` of them.

    A label's probability, the product over its places if there are several, says how sure it is.

    Args:
        probabilities: (n, *label, classes), as `spread` gives them.
        known: bool (n,).
    """
    best = probabilities.amax(dim=-1)
    sure = best.flatten(1).prod(dim=1) if best.dim() > 1 else best
    chosen = torch.zeros_like(known)
    chosen[sure.masked_fill(known, -1).topk(round(share * int((~known).sum()))).indices] = True
    return chosen


def relabelled(data: Data, labels: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Data:
    """`data` with other labels: (N, ...) by modality, as batches have them, where bool (N,) of `present` says.

    Its pairs are the complete examples of `data`.
    """
    stored = {name: f"label {name}" for name in labels}

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = data.transform({name: rows[name] for name in data.tensors})
        return {**batch, **{name: rows[key] for name, key in stored.items()}}

    tensors = {**data.tensors, **{key: labels[name] for name, key in stored.items()}}
    before = data.present or {}
    pairs = complete_examples(before) if before and data.pairs is None else data.pairs
    return dataclasses.replace(data, tensors=tensors, transform=transform, present={**before, **present}, pairs=pairs)


def complete_examples(present: Mapping[str, Tensor]) -> Tensor:
    """bool (N,): the examples that lack nothing."""
    return torch.stack(list(present.values())).all(dim=0)


def _over_and_over(rows: Tensor, n_batches: int, size: int, generator: torch.Generator) -> Tensor:
    """(n_batches, size) of the rows, in as many permutations as that takes."""
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(-(-n_batches * size // len(rows)))]
    return rows[torch.cat(orders)[: n_batches * size].to(rows.device)].view(n_batches, size)


def _limited(data: Data, present: dict[str, Tensor]) -> Data:
    """`data` in which a modality is present where it was and where `present` says so, too."""
    before = data.present or {}
    here = {name: mask.to(data.stored_on) for name, mask in present.items()}
    return dataclasses.replace(
        data, present={**before, **{name: mask & before.get(name, mask) for name, mask in here.items()}}
    )


def _taking_turns(order: Tensor, classes: Tensor) -> Tensor:
    """The same rows in rounds, with one of each class in a round while there are any."""
    of_row = classes[order]
    rounds = torch.empty_like(order)
    for one in of_row.unique():
        where = (of_row == one).nonzero().flatten()
        rounds[where] = torch.arange(len(where))
    return order[rounds.argsort(stable=True)]
