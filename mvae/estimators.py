"""Importance-weighted estimates of log-likelihoods: log p(x), log p(x, y), log p(x | y), of any sets of modalities.

log p(X) = log E_q(z|Y) [ prod_{i in X} p(x_i | z) p(z) / q(z | Y) ], estimated with K draws from the proposal q(z | Y)
(Burda et al. 2016, equation 8; Wu & Goodman 2018, section 5.1). In expectation the estimate is a lower bound, which
rises to log p(X) with K. A conditional is a difference: log p(X | Y) = log p(X, Y) - log p(Y). The weights λ of
training have no part in any of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import experts
from .data import Data, consecutive_rows, seed_of
from .errors import UsageError
from .model import MVAE, Batch

Modalities = tuple[str, ...]


class Quantity(NamedTuple):
    """log p(target | given), or log p(target) where nothing is given.

    `given_proposal` is what log p(given) is estimated under, for every proposal of the joint; () is the prior.
    """

    target: Modalities
    given: Modalities = ()
    given_proposal: Modalities = ()

    @property
    def name(self) -> str:
        return f"log p({listed(self.target)}{' | ' if self.given else ''}{listed(self.given)})"


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The names in a row; of more than three, the first two and the last."""
    return separator.join(names if len(names) < 4 else (*names[:2], "...", names[-1]))


def of_a_pair(x: Modalities, y: Modalities, y_proposal: Modalities = ()) -> dict[Quantity, list[Modalities]]:
    """What the paper's table 2 reports of two (sets of) modalities, each with its proposals; and log p(y), p(y | x).

    log p(x | y) is log p(x, y) less log p(y). `y_proposal` is what log p(y) is estimated under; () is the prior.
    """
    both = [x, x + y]
    return {
        Quantity(x): both,
        Quantity(x + y): both,
        Quantity(x, given=y, given_proposal=y_proposal): both,
        Quantity(y, given=x, given_proposal=x): both,
        Quantity(y): [(), y],
    }


class Estimate(NamedTuple):
    """One value per example, each (n,), in nats.

    log_p: the estimate of log p(target).
    log_weight_variance: the variance, over the draws, of log p(target | z) + log p(z) - log q(z | proposal). It tells
        how well the proposal fits: at 0 one draw is enough, from about 1 on many are needed.
    """

    log_p: Tensor
    log_weight_variance: Tensor


@torch.no_grad()
def log_likelihood(
    model: MVAE,
    batch: Batch,
    *,
    proposal: Modalities,
    targets: Sequence[Modalities],
    noise: Tensor,
    max_rows: int = 4096,
) -> dict[Modalities, Estimate]:
    """log p(target) of each example for several targets, from the same draws of one proposal.

    Args:
        model: in evaluation mode.
        batch: the modalities named by `proposal` and `targets`, each (batch, *event).
        proposal: what z is drawn from: q(z | these modalities); the prior if there are none.
        targets: sets of modalities, at least one each.
        noise: standard normal (draws, batch, latents), two draws or more: it alone is random.
        max_rows: bounds the latents decoded in one call, and so the memory; the result doesn't depend on it.
    """
    model.check_names(*proposal, *(name for target in targets for name in target))
    n_draws, n, _ = noise.shape
    scored = tuple(name for name in model.modalities if any(name in target for target in targets))
    if proposal:
        mu, logvar = model.posterior({name: batch[name] for name in proposal})
    else:
        mu = logvar = torch.zeros_like(noise[0])
    parts: dict[Modalities, list[Estimate]] = {target: [] for target in targets}
    for rows in torch.arange(n, device=noise.device).split(max(1, max_rows // n_draws)):
        some = {name: batch[name][rows] for name in scored}
        weights: dict[Modalities, list[Tensor]] = {target: [] for target in targets}
        for eps in noise[:, rows].split(max(1, max_rows // len(rows))):
            z = experts.draw(mu[rows], logvar[rows], eps)
            log_q = experts.log_standard_normal(eps) - 0.5 * logvar[rows].sum(dim=-1)
            ratio = experts.log_standard_normal(z) - log_q
            log_prob = model.log_prob(z, some, [scored] * len(z))
            log_probs = dict(zip(model.modalities, log_prob.unbind(dim=1), strict=True))
            for target in targets:
                weights[target].append(sum((log_probs[name] for name in target), start=ratio))
        for target in targets:
            weight = torch.cat(weights[target]).double()
            estimate = Estimate(weight.logsumexp(dim=0) - math.log(n_draws), weight.var(dim=0))
            parts[target].append(estimate)
    return {target: Estimate(*(torch.cat(part) for part in zip(*parts[target], strict=True))) for target in targets}


@torch.no_grad()
def predict(
    model: MVAE, batch: Batch, *, given: Modalities, names: Sequence[str], noise: Tensor, max_rows: int = 4096
) -> dict[str, Tensor]:
    """The means of the modalities `names` given others: E_q(z|given)[mean of p(x | z)], each (batch, *event).

    For a label: its probabilities. `noise` and `max_rows` as in `log_likelihood`.
    """
    mu, logvar = model.posterior({other: batch[other] for other in given})
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for eps in noise.split(max(1, max_rows // noise.shape[1])):
        for name, mean in model.mean(experts.draw(mu, logvar, eps), names).items():
            parts[name].append(mean.sum(dim=0))
    return {name: torch.stack(sums).sum(dim=0) / len(noise) for name, sums in parts.items()}


class Evaluation(NamedTuple):
    """What `evaluate` found, over n examples, on the CPU.

    estimates: by quantity and proposal, each value (n,). A conditional's variance is that of its joint's log weights.
    predictions: by predicted modality, (n, *event); truth: the same modalities of the data.
    """

    estimates: dict[tuple[Quantity, Modalities], Estimate]
    predictions: dict[str, Tensor]
    truth: dict[str, Tensor]


def evaluate(
    model: MVAE,
    data: Data,
    *,
    quantities: Mapping[Quantity, Sequence[Modalities]],
    predictions: Mapping[str, Modalities] | None = None,
    n_samples: int,
    seed: int = 0,
    max_rows: int | None = None,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Evaluation:
    """Estimates log-likelihoods of every example of `data`.

    Args:
        quantities: what to estimate, each with the proposals to estimate it (a conditional: its joint) under.
        predictions: by modality to predict, what it is predicted from; see `predict`.
        n_samples: draws per example and proposal.
        seed: an example's noise follows from the seed and its number, so that batch and chunk size don't matter. All
            proposals have the same noise.
        max_rows: the most latents to decode in one call, which bounds the memory. None: as many as make 2^22 values of
            the largest modality on a CPU (5,349 pictures of 28x28), to fit its cache, and 2^26 on other devices.
        progress: wraps the list of batches, to show a bar.

    Raises UsageError for a name that is no modality's, or data in which examples lack modalities.
    """
    for quantity in quantities:
        model.check_names(*quantity.target, *quantity.given)
    if data.present is not None:
        raise UsageError("log-likelihoods are estimated from examples that have all modalities, and `data` lacks some")
    model.eval()
    needed = {
        (quantity, proposal): _needed(model, quantity, proposal)
        for quantity, proposals in quantities.items()
        for proposal in proposals
    }
    # All results are allocated here and filled in the loop. Small tensors that outlive a batch would lie between the
    # large ones of the next: freed places then no longer fit, and the memory of the process grows with every batch.
    n = len(data)
    keys = dict.fromkeys(key for some in needed.values() for key in some)
    found = {key: Estimate(*torch.empty(2, n, dtype=torch.float64)) for key in keys}
    example, _ = data.batch(torch.zeros(1, dtype=torch.long))
    truth = {name: torch.empty(n, *example[name].shape[1:], dtype=example[name].dtype) for name in predictions or {}}
    predicted: dict[str, Tensor] = {}
    if not max_rows:
        max_rows = 2 ** (22 if data.device.type == "cpu" else 26) // max(x.numel() for x in example.values())
    for rows in progress(consecutive_rows(data, max(1, max_rows // n_samples))):
        batch, _ = data.batch(rows)
        noise = torch.stack([_noise(n_samples, model.n_latents, seed, row) for row in rows.tolist()], dim=1)
        noise = noise.to(data.device)
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        for proposal in {proposal for proposal, _ in found}:
            targets = [target for other, target in found if other == proposal]
            some = log_likelihood(model, batch, proposal=proposal, targets=targets, noise=noise, max_rows=max_rows)
            for target, estimate in some.items():
                for whole, part in zip(found[proposal, target], estimate, strict=True):
                    whole[here] = part
        for given in set((predictions or {}).values()):
            names = [name for name, condition in (predictions or {}).items() if condition == given]
            means = predict(model, batch, given=given, names=names, noise=noise, max_rows=max_rows)
            for name, mean in means.items():
                if name not in predicted:
                    predicted[name] = torch.empty(n, *mean.shape[1:], dtype=mean.dtype)
                predicted[name][here] = mean.cpu()
                truth[name][here] = batch[name].cpu()
    estimates = {}
    for which, (joint, *conditions) in needed.items():
        log_p, variance = found[joint]
        for condition in conditions:
            log_p = log_p - found[condition].log_p
        estimates[which] = Estimate(log_p, variance)
    return Evaluation(estimates, predicted, truth)


_Key = tuple[Modalities, Modalities]  # a proposal and a target


def _needed(model: MVAE, quantity: Quantity, proposal: Modalities) -> list[_Key]:
    """What the quantity is the difference of: its joint under `proposal`, and what is given, if anything."""
    joint = tuple(name for name in model.modalities if name in quantity.target + quantity.given)
    return [(proposal, joint), *([(quantity.given_proposal, quantity.given)] if quantity.given else [])]


def _noise(n_samples: int, n_latents: int, seed: int, row: int) -> Tensor:
    return torch.randn(n_samples, n_latents, generator=torch.Generator().manual_seed(seed_of(seed, row)))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of (n,) values and its standard error, std / sqrt(n) (NaN for a single value)."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
