"""Weak supervision: examples that lack modalities, and batches in which the complete ones have their share.

The protocol is the paper's (Wu & Goodman 2018, section 5.3): the number of examples stays, a share of them is paired,
and each of the others shows one side alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .data import Data, permuted_rows
from .errors import UsageError

Unpaired = Literal["image", "both"]


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

    Complete are `pairs` of a batch, or their share of the data where that is more. Both kinds come in permutations,
    each begun anew when it ends; an epoch has as many batches as `permuted_rows` gives. Where all examples are
    complete, or none, or `pairs` is 0, the batches are those of `permuted_rows`.

    Raises UsageError if `pairs` leaves no place for the others.
    """
    if pairs >= batch_size:
        raise UsageError(f"`pairs_per_batch` {pairs} leaves the other examples no place in a batch of {batch_size}")
    if not pairs or data.present is None:
        return permuted_rows(data, batch_size, seed)
    complete = torch.stack(list(data.present.values())).all(dim=0)
    whole, rest = complete.nonzero().flatten(), (~complete).nonzero().flatten()
    if not len(whole) or not len(rest):
        return permuted_rows(data, batch_size, seed)
    n_batches = max(1, len(data) // batch_size)
    by_chance = min(round(batch_size * len(whole) / len(data)), batch_size - 1)
    generator = torch.Generator().manual_seed(seed)
    some = _over_and_over(whole, n_batches, max(pairs, by_chance), generator)
    others = _over_and_over(rest, n_batches, batch_size - max(pairs, by_chance), generator)
    return list(torch.cat([some, others], dim=1))


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
