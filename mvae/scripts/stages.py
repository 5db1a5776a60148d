"""Training in two stages where few examples have a label: on the images alone first, then on all there is."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import running, training

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Data
    from ..model import MVAE
    from ..training import Options

OF_THE_FIRST = (
    *("n_latents", "weight_decay", "epochs", "lr_schedule", "warmup_epochs", "annealing_epochs", "beta_hold"),
    *("command", "commit"),
)
"""The flags of which the first stage's checkpoint keeps a record. Runs that differ in others may share it."""


def images_first(
    args: argparse.Namespace,
    model: "MVAE",
    train: "Data",
    validation: "Data",
    options: "Options",
    *,
    experiment: str,
    labels: Sequence[str],
) -> "Data":
    """Trains the model on the images alone for --images-first epochs; returns the second stage's training data.

    In these, the --self-labels share of the examples that lack a label have one, found from the pairs' labels and the
    means of q(z | image). --self-labels-by: neighbours suit classes, which are clusters of the means; regression suits
    labels of which neighbours share a part, such as strings and attributes. `labels`: the modalities that are labels.

    Raises UsageError for --self-labels without a first stage, or where no label is missing.
    """
    if not args.images_first:
        if args.self_labels:
            raise UsageError("`self_labels` come from what the first stage has learnt: give --images-first, too")
        return train
    few = [name for name in labels if name in (train.present or {})]
    if args.self_labels and not few:
        raise UsageError("`self_labels` are for labels that some examples lack: see --n-paired")
    import torch

    from ..objective import Objective, Term
    from ..training import fit

    image = model.modalities[0]
    alone = Objective(
        model, weights={image: getattr(args, f"lambda_{image}")}, terms=[Term((image,), (image,))],
        iw_samples=args.iw_samples,
    )  # fmt: skip
    stage = argparse.Namespace(**{**vars(args), "epochs": args.images_first})
    out_dir = args.images_dir or args.out_dir / "images"
    if running.is_first():
        print(f"first stage, in {out_dir}: the images alone", flush=True)
    fit(
        alone,
        torch.optim.AdamW(alone.parameters(), args.lr, weight_decay=args.weight_decay, fused=True),
        _images(train, model.modalities),
        _images(validation, model.modalities),
        dataclasses.replace(
            options, epochs=stage.epochs, select="loss", pairs_per_batch=0, approx_m=0, out_dir=out_dir,
            resume=options.resume or args.images_dir is not None,
        ),
        beta=training.beta_schedule(stage, first=True),
        lr=training.lr_schedule(stage),
        experiment=experiment,
        settings={name: value for name, value in training.settings(stage).items() if name in OF_THE_FIRST},
    )  # fmt: skip
    said, labelled = f"second stage, in {args.out_dir}", train
    if args.self_labels:
        labelled = _self_labelled(model, train, few, args.self_labels, args.self_labels_by)
        had, have = (int(sum((data.present or {})[name].sum() for name in few)) for data in (train, labelled))
        said += f": {have} of the {len(few) * len(train)} labels, {had} of them given"
    if running.is_first():
        print(said, flush=True)
    return labelled


def _images(data: "Data", modalities: Sequence[str]) -> "Data":
    """The same examples with their image alone, the first of `modalities`."""
    import torch

    every = torch.ones(len(data), dtype=torch.bool, device=data.stored_on)
    image, *others = modalities
    here = {image: (data.present or {}).get(image, every), **dict.fromkeys(others, ~every)}
    return dataclasses.replace(data, present=here)


def _possible(model: "MVAE", name: str, labels: "Tensor", z: "Tensor") -> "Tensor":
    """bool (n,): the labels, found place by place, that the model can have at all. A string that goes on after its end
    is none; its log p would be -inf.
    """
    import torch

    score = model.likelihood(name).log_prob
    with torch.no_grad():
        return torch.cat([score(some, x) for some, x in zip(z.split(1000), labels.split(1000), strict=True)]).isfinite()


def _self_labelled(model: "MVAE", train: "Data", few: Sequence[str], share: float, by: str) -> "Data":
    """`train` in which more examples have the labels `few`, as far as there are images."""
    import torch

    from ..data import consecutive_rows
    from ..model import evaluating
    from ..supervision import neighbour_graph, regressed, relabelled, spread, surest

    image, present = model.modalities[0], train.present or {}
    device = next(model.parameters()).device  # where the first stage left the model; the data have stayed
    there, means, batches = train.to(device), [], []
    torch.manual_seed(0)  # for pixels that are drawn: several processes are to find the same labels
    with torch.no_grad(), evaluating(model):
        for rows in consecutive_rows(there, 1000):
            batch, _ = there.batch(rows)
            means.append(model.posterior({image: batch[image]})[0])
            batches.append({name: batch[name] for name in few})
    found = {name: torch.cat([batch[name] for batch in batches]) for name in few}
    here = {name: present[name].to(device, copy=True) for name in few}
    seen = present.get(image, torch.ones(len(train), dtype=torch.bool)).nonzero().flatten().to(device)
    points = torch.cat(means)[seen]
    graph = neighbour_graph(points) if by == "neighbours" else None
    for name in few:
        known, some = here[name][seen], found[name][seen]
        probabilities = regressed(points, some, known) if graph is None else spread(graph, some, known)
        best = probabilities.argmax(dim=-1).to(some.dtype)
        added = surest(probabilities, known, share) & _possible(model, name, best, points)
        found[name][seen[added]] = best[added]
        here[name][seen[added]] = True
    found, here = ({name: x.to(train.stored_on) for name, x in part.items()} for part in (found, here))
    return relabelled(train, found, here)
