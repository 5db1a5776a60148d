"""Metrics in addition to the ELBO: how well one modality is predicted from others, or agrees with them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import MVAE, Batch

Metric = Callable[[MVAE, Batch], Tensor]
"""A value for each example of a batch, (batch,). `Run.validate` reports its mean."""


def label_accuracy(name: str, given: Sequence[str] = ("image",)) -> Metric:
    """Return the accuracy of the most probable label (for a text, of all its symbols), from the mean of q(z | given).

    name: the modality of the labels. Its likelihood's mean is their probabilities, classes last.
    """

    def metric(model: MVAE, batch: Batch) -> Tensor:
        mu, _ = model.fused({other: batch[other] for other in given})
        right = model.mean(mu, [name])[name].argmax(dim=-1) == batch[name]
        return right.flatten(1).all(dim=1).float() if right.dim() > 1 else right.float()

    return metric


def attribute_accuracy(names: Sequence[str], given: Sequence[str] = ("image",)) -> Metric:
    """Return the fraction of binary attributes, over the modalities `names`, that the mean of q(z | given) predicts."""

    def metric(model: MVAE, batch: Batch) -> Tensor:
        mu, _ = model.fused({other: batch[other] for other in given})
        means = model.mean(mu, names)
        right = [((means[name] > 0.5) == batch[name].bool()).float().reshape(len(mu), -1) for name in names]
        return torch.cat(right, dim=1).mean(dim=1)

    return metric


def accuracies(probabilities: Tensor, truth: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return values (n,) by name, whose means are accuracies: overall, of each attribute, and balanced ones.

    Args:
        probabilities: (n, attributes), of each attribute.
        truth: (n, attributes), 0 and 1.
        names: of the attributes.
    """
    right = (probabilities > 0.5) == truth.bool()
    balanced = balanced_accuracies(right, truth, names)
    found = {"accuracy of an attribute predicted from the image": right.double().mean(dim=1)}
    if balanced:
        found["balanced accuracy of an attribute"] = torch.stack(list(balanced.values())).mean(dim=0)
    for i, name in enumerate(names):
        found[f"accuracy of {name}"] = right[:, i].double()
        if name in balanced:
            found[f"balanced accuracy of {name}"] = balanced[name]
    return found


def balanced_accuracies(right: Tensor, truth: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return values (n,) by attribute. Their mean is its balanced accuracy; their standard error is that of this mean.

    Balanced accuracy is the mean of two accuracies: over the examples with the attribute, and over the others. It is
    left out if one of the two is empty. The standard error follows from the delta method.

    Args:
        right: bool (n, attributes), where an attribute was predicted correctly.
        truth: (n, attributes), 0 and 1.
        names: of the attributes.
    """
    right, positive = right.double(), truth.bool()
    balanced: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        here = positive[:, i]
        if here.any() and not here.all():
            of_those = [right[here, i].mean(), right[~here, i].mean()]
            error = torch.where(here, right[:, i] - of_those[0], right[:, i] - of_those[1])
            share = torch.where(here, here.double().mean(), 1 - here.double().mean())
            balanced[name] = (of_those[0] + of_those[1] + error / share) / 2
    return balanced
