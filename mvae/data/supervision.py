"""Weak supervision: examples that lack modalities, batches with enough complete ones, and labels for the others.

The protocol is the paper's (Wu & Goodman 2018, section 5.3): the number of examples stays, a fraction of them is
complete, and each of the others shows one side.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ..errors import UsageError
from ..likelihoods import Bernoulli
from ..model import MVAE, evaluating
from .dataset import Data, consecutive_rows, permuted_rows

log = logging.getLogger(__name__)

Unpaired = Literal["image", "both"]
Method = Literal["neighbours", "regression"]

TINY = 1e-30  # in place of 0 in a denominator


def share_pairs(
    train: Data,
    validation: Data,
    paired: int | float | None,
    modalities: Sequence[str],
    *,
    unpaired: Unpaired = "image",
    seed: int,
) -> tuple[Data, Data]:
    """Let only `paired` examples keep all modalities, in proportion of training and validation data.

    So nothing that is counted or chosen knows more labels. Validation has at most a fifth of them, unless training is
    too small for the others. They are spread evenly over the classes if a modality is a class.

    paired: a number of examples, or a float, a fraction of them; None: all. Others: see `keep_pairs`.

    Raises UsageError for fewer than two, or more than there are.
    """
    if paired is None:
        return train, validation
    total = len(train) + len(validation)
    n = paired if isinstance(paired, int) else round(total * paired)
    if not 2 <= n <= total:
        raise UsageError(f"complete examples must be from 2 to {total} (training and validation data), got {n}")
    in_proportion = round(n * len(validation) / total)
    most = max(n // 5, n - len(train) // 2)  # a fifth; more where training can't hold the others
    held_out = max(1, min(in_proportion, most))
    log.info("complete examples: %d for training, %d for validation", n - held_out, held_out)
    parts = []
    for data, pairs, offset in ((train, n - held_out, 0), (validation, held_out, 1)):
        classes = next((tensor for tensor in data.tensors.values() if tensor.dim() == 1), None)
        parts.append(keep_pairs(data, pairs, modalities, unpaired=unpaired, seed=seed + offset, classes=classes))
    return parts[0], parts[1]


def keep_pairs(
    data: Data,
    n: int,
    modalities: Sequence[str],
    *,
    unpaired: Unpaired = "image",
    seed: int,
    classes: Tensor | None = None,
) -> Data:
    """Let n examples keep all of their modalities, and each of the others a part.

    Args:
        modalities: one side is the first of them, the image; the other side is all others.
        unpaired: "image" leaves the image to each other example; "both" leaves the image to one half of them, and the
            other side to the other half.
        classes: (N,) integers; the n are spread evenly over them.

    Raises UsageError if n is not from 1 to N.
    """
    if not 1 <= n <= len(data):
        raise UsageError(f"n must be from 1 to {len(data)}, the number of examples, got {n}")
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
    """Let each example lack each of the modalities `names` with probability `share`."""
    generator = torch.Generator().manual_seed(seed)
    return _limited(data, {name: torch.rand(len(data), generator=generator) >= share for name in names})


def complete_examples(present: Mapping[str, Tensor]) -> Tensor:
    """Return which examples lack nothing, bool (N,)."""
    return torch.stack(list(present.values())).all(dim=0)


def composed_rows(data: Data, batch_size: int, pairs: int, seed: int) -> list[Tensor]:
    """Return the rows of an epoch's batches, each with `pairs` complete examples first, then incomplete ones.

    Complete examples are those that lack nothing, or `data.pairs`. A batch has more of them if their fraction of the
    data is larger. Both kinds come in permutations, each started anew when it ends; an epoch has as many batches as
    `permuted_rows` gives, whose batches these are if `pairs` is 0 or there is only one kind.

    Raises UsageError if all examples are complete, or a batch has no room for others.
    """
    if not pairs:
        return permuted_rows(data, batch_size, seed)
    if not data.present:
        raise UsageError("pairs_per_batch needs examples that lack a modality: set n_paired or paired_fraction")
    if pairs >= batch_size:
        raise UsageError(f"pairs_per_batch must be smaller than batch_size, got {pairs} and {batch_size}")
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


def self_labelled(
    model: MVAE, train: Data, labels: Sequence[str], *, share: float, by: Method, again: bool = False
) -> Data:
    """Give the most confident `share` of the examples that lack a label one, from the means of q(z | image).

    The known labels spread to neighbours by these means and by the images' principal components ("neighbours", which
    suits classes: they are clusters), or a logistic regression on the means predicts it ("regression", which suits
    strings and attributes).

    labels: the modalities that are labels; the image is the model's first modality.
    share: 0 returns `train`. again: the model has learnt labels, so its own p(label | mean) is multiplied in; where it
        disagrees, an example is less confident.
    """
    if not share:
        return train
    image, present = model.modalities[0], train.present or {}
    device = next(model.parameters()).device
    there, means, images, batches = train.to(device), [], [], []
    few = [name for name in labels if name in present]
    torch.manual_seed(0)  # pixels may be drawn: all processes must find the same labels
    with torch.no_grad(), evaluating(model):
        for rows in consecutive_rows(there, 1000):
            batch, _ = there.batch(rows)
            means.append(model.fused({image: batch[image]})[0].cpu())
            if by == "neighbours":
                images.append(batch[image].flatten(1).cpu())
            batches.append({name: batch[name] for name in few})
    found = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in few}
    here = {name: present[name].cpu().clone() for name in few}
    seen = present.get(image, torch.ones(len(train), dtype=torch.bool)).nonzero().flatten().cpu()
    points = torch.cat(means)[seen]
    graph = neighbour_graph(points, components(torch.cat(images)[seen])) if by == "neighbours" else None
    for name in few:
        known, some = here[name][seen], found[name][seen]
        if not known.any():  # nothing to infer it from
            continue
        probabilities = regressed(points, some, known) if graph is None else spread(graph, some, known)
        if again:
            predicted = _predicted(model, name, points.to(device)).cpu()
            probabilities = probabilities * predicted[..., : probabilities.shape[-1]]
        best = probabilities.argmax(dim=-1).to(some.dtype)
        added = most_confident(probabilities, known, share) & _possible(model, name, best, points.to(device)).cpu()
        found[name][seen[added]] = best[added]
        here[name][seen[added]] = True
    had, have = (int(sum(mask[name].sum() for name in few)) for mask in (present, here))
    log.info("%s", f"labels: {had:,} given + {have - had:,} inferred of {len(few) * len(train):,}")
    found, here = ({name: x.to(train.stored_on) for name, x in part.items()} for part in (found, here))
    return relabelled(train, found, here)


@torch.no_grad()
def _possible(model: MVAE, name: str, labels: Tensor, z: Tensor) -> Tensor:
    """Return which labels, inferred place by place, the model can have at all, bool (n,). A string that continues after
    its end can't be: its log p would be -inf."""
    score = model.likelihood(name).log_prob
    parts = zip(z.split(1000), labels.to(z.device).split(1000), strict=True)
    with evaluating(model):
        return torch.cat([score(some, x) for some, x in parts]).isfinite()


@torch.no_grad()
def _predicted(model: MVAE, name: str, z: Tensor) -> Tensor:
    """Return p(label | z) of each class, (n, *label, classes); an attribute has the classes 0 and 1."""
    with evaluating(model):
        mean = torch.cat([model.mean(some, [name])[name] for some in z.split(1000)])
    return torch.stack([1 - mean, mean], dim=-1) if isinstance(model.likelihood(name), Bernoulli) else mean


def components(pictures: Tensor, n: int = 50) -> Tensor:
    """Return the first n principal components of pictures (N, pixels): (N, n)."""
    return torch.from_numpy(PCA(min(n, *pictures.shape), random_state=0).fit_transform(pictures.numpy()))


def neighbour_graph(*features: Tensor, k: int = 10) -> sparse.csr_array:
    """Return the graph of each point's k nearest neighbours: sparse (N, N), symmetric and normalised.

    An edge weighs exp(-d² / 2σ²), where d is its length and σ the mean length; one that both ends have counts twice.

    features: (N, dimensions) each, such as the means of q(z | image). Of several, each is measured in units of its mean
        distance to a neighbour, over some thousand points. If there are k points or fewer, all are neighbours.
    """
    n = len(features[0])
    k = min(k, n - 1)
    parts = [some.double().numpy() for some in features]
    if len(parts) > 1:
        parts = [some / max(_mean_distance(some, k), TINY) for some in parts]
    distances, ends = NearestNeighbors(n_neighbors=k).fit(np.hstack(parts)).kneighbors()
    weights = np.exp(-(distances**2) / max(2 * distances.mean() ** 2, 1e-12))
    edges = (weights.ravel(), (np.arange(n).repeat(k), ends.ravel()))
    one_way = sparse.csr_array(sparse.coo_array(edges, shape=(n, n)))
    graph = one_way + one_way.T
    scale = sparse.diags_array(np.maximum(graph.sum(axis=1), TINY) ** -0.5)  # the degree of a distant point may be 0
    return sparse.csr_array(scale @ graph @ scale)


def _mean_distance(points: np.ndarray, k: int) -> float:
    """Return the mean distance of every (N / 1000)th point to its k nearest others; all points would take as long as
    the graph itself."""
    some = points[:: max(1, len(points) // 1000)]
    return NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(some)[0][:, 1:].mean()


def spread(graph: sparse.csr_array, labels: Tensor, known: Tensor, *, alpha: float = 0.99, rounds: int = 200) -> Tensor:
    """Spread the known labels over the graph; return every example's label as probabilities, (N, *label, classes).

    F <- α S F + (1 - α) Y, from F = Y, the known labels as one-hot rows (Zhou et al. 2004), with class mass
    normalisation (Zhu et al. 2003, section 4).

    Args:
        graph: S, as `neighbour_graph` returns it.
        labels: integers, (N,), or (N, places) for a label of several places, each spread on its own.
        known: bool (N,), where `labels` holds one; not nowhere.
    """
    classes = int(labels[known].max()) + 1
    one_hot = torch.zeros(*labels.shape, classes, dtype=torch.float64)
    one_hot[known] = torch.nn.functional.one_hot(labels[known].long(), classes).double()
    start = found = one_hot.flatten(1).numpy()
    for _ in range(rounds):
        found = alpha * (graph @ found) + (1 - alpha) * start
    mass = torch.from_numpy(found).view_as(one_hot)
    mass = mass * one_hot.sum(dim=0) / mass.sum(dim=0).clamp(min=TINY)
    return mass / mass.sum(dim=-1, keepdim=True).clamp(min=TINY)


def regressed(points: Tensor, labels: Tensor, known: Tensor, *, penalty: float = 1.0) -> Tensor:
    """Predict every example's label from its point by logistic regression: probabilities, (N, *label, classes).

    penalty: of half the squared weights, against the summed cross-entropy of the known labels. Each place of a label
    has its own weights. Other arguments: see `spread`.
    """
    x, classes = points.flatten(1).double().numpy(), int(labels[known].max()) + 1
    places = []
    for place in labels.flatten(1).T if labels.dim() > 1 else [labels]:
        probabilities = np.zeros((len(x), classes))
        y = place[known].long().numpy()
        if len(np.unique(y)) == 1:  # nothing to regress
            probabilities[:, y[0]] = 1
        else:
            regression = LogisticRegression(C=1 / penalty, max_iter=1000).fit(x[known.numpy()], y)
            probabilities[:, regression.classes_] = regression.predict_proba(x)
        places.append(torch.from_numpy(probabilities))
    return torch.stack(places, dim=1).view(*labels.shape, classes)


def most_confident(probabilities: Tensor, known: Tensor, share: float) -> Tensor:
    """Return the most confident `share` of the examples without a label, bool (n,).

    Confidence is the probability of the most probable label, the product over its places if there are several.

    Args:
        probabilities: (n, *label, classes).
        known: bool (n,), which examples have a label.
    """
    best = probabilities.amax(dim=-1)
    confidence = best.flatten(1).prod(dim=1) if best.dim() > 1 else best
    chosen = torch.zeros_like(known)
    chosen[confidence.masked_fill(known, -1).topk(round(share * int((~known).sum()))).indices] = True
    return chosen


def relabelled(data: Data, labels: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Data:
    """Return `data` with other labels: (N, ...) by modality, as batches have them, where bool (N,) of `present` says.

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


def _over_and_over(rows: Tensor, n_batches: int, size: int, generator: torch.Generator) -> Tensor:
    """Return (n_batches, size) of the rows, in as many permutations as that takes."""
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(-(-n_batches * size // len(rows)))]
    return rows[torch.cat(orders)[: n_batches * size].to(rows.device)].view(n_batches, size)


def _limited(data: Data, present: dict[str, Tensor]) -> Data:
    """Return `data` in which a modality is present where it was and where `present` says so."""
    before = data.present or {}
    here = {name: mask.to(data.stored_on) & before.get(name, True) for name, mask in present.items()}
    return dataclasses.replace(data, present={**before, **here})


def _taking_turns(order: Tensor, classes: Tensor) -> Tensor:
    """Return the same rows in rounds, with one of each class in a round while there are any."""
    of_row = classes[order]
    rounds = torch.empty_like(order)
    for one in of_row.unique():
        where = (of_row == one).nonzero().flatten()
        rounds[where] = torch.arange(len(where))
    return order[rounds.argsort(stable=True)]
