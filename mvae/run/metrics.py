"""What to measure beside the ELBO: how well one modality is read off others."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..likelihoods import Bernoulli
from ..model import MVAE, Batch

Metric = Callable[[MVAE, Batch], Tensor]
"""A value of each example of a batch, (batch,). `fit` reports its mean over the validation examples."""


def label_accuracy(name: str, given: Sequence[str] = ("image",)) -> Metric:
    """1 where the most probable label (every symbol of a text) is the true one, else 0; z is the mean of q(z | given).

    `name` is the modality of the labels, whose likelihood's mean is its probabilities, classes last.
    """

    def metric(model: MVAE, batch: Batch) -> Tensor:
        mu, _ = model.posterior({other: batch[other] for other in given})
        right = model.mean(mu, [name])[name].argmax(dim=-1) == batch[name]
        return right.flatten(1).all(dim=1).float() if right.dim() > 1 else right.float()

    return metric


def attribute_accuracy(names: Sequence[str], given: Sequence[str] = ("image",)) -> Metric:
    """The share of binary attributes that are predicted right, of all modalities `names`; z is the mean of q."""

    def metric(model: MVAE, batch: Batch) -> Tensor:
        mu, _ = model.posterior({other: batch[other] for other in given})
        means = model.mean(mu, names)
        right = [((means[name] > 0.5) == batch[name].bool()).float().reshape(len(mu), -1) for name in names]
        return torch.cat(right, dim=1).mean(dim=1)

    return metric


def accuracies(probabilities: Tensor, truth: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """How well attributes are predicted: values (n,) by name, whose means are accuracies, overall and of each.

    See `balanced_accuracies` for those that are called balanced.

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
    """Values (n,) by attribute whose mean is its balanced accuracy, and their standard error that of this mean.

    Balanced accuracy is the mean of two accuracies: among the examples that have the attribute, and among the others.
    An attribute that all or none of the examples have has none. The error is by the delta method.

    Args:
        right: bool (n, attributes), where an attribute was read right.
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


Classify = Callable[[Tensor], Tensor]
"""A classifier of another make: pictures (n, *event), as a model's means are -> what it reads off them (n, ...)."""


@torch.no_grad()
def coherence(
    model: MVAE,
    classify: Classify,
    labels: Tensor,
    *,
    n: int,
    given: Sequence[str] = ("text",),
    name: str = "image",
    temperature: float = 1.0,
) -> Tensor:
    """Whether a classifier reads the label off pictures that are drawn given it.

    For each label, n draws of z from q(z | label), and the mean of p(picture | z) of each.

    Args:
        model: in evaluation mode.
        labels: (labels, *label), on the model's device: classes, texts or vectors of attributes.
        n: pictures for each label.
        given: the label's modality; or several, one for each value of a label.
        name: the picture's modality.
        temperature: what the variance of z is multiplied by.

    Returns:
        bool (labels, n, *label): where the classifier reads what was given.
    """
    right = []
    for label in labels.split(1):
        values = [label] if len(given) == 1 else label.unbind(dim=1)
        z = model.draw(dict(zip(given, values, strict=True)), n, label.device, temperature)
        right.append(classify(model.mean(z, [name])[name]) == label)
    return torch.stack(right)


@torch.no_grad()
def prior_agreement(
    model: MVAE, classify: Classify, *, n: int, labels: Sequence[str] = ("text",), name: str = "image"
) -> Tensor:
    """Whether picture and label of one draw from the prior agree.

    The picture is the mean of p(picture | z), which the classifier reads; the label is the most probable one.

    Args:
        model: in evaluation mode.
        n: draws of z.
        labels, name: the modalities of the label, as `given` of `coherence`, and of the picture.

    Returns:
        bool (n, *label): where they agree.
    """
    z = model.draw({}, n, next(model.parameters()).device)
    means = model.mean(z, [*labels, name])
    binary = isinstance(model.likelihood(labels[0]), Bernoulli)
    most_probable = [means[label] > 0.5 if binary else means[label].argmax(dim=-1) for label in labels]
    label = most_probable[0] if len(labels) == 1 else torch.stack(most_probable, dim=1)
    return classify(means[name]) == label
