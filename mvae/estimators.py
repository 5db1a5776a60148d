"""Importance-weighted estimates of log-likelihoods: log p(x), log p(x, y), log p(x | y), of any sets of modalities.

log p(X) = log E_q(z|Y) [ prod_{i in X} p(x_i | z) p(z) / q(z | Y) ], estimated with K draws from the proposal q(z | Y)
(Burda et al. 2016, equation 8; Wu & Goodman 2018, section 5.1). In expectation the estimate is a lower bound, which
rises to log p(X) with K. A conditional is a difference: log p(X | Y) = log p(X, Y) - log p(Y). The weights λ of
training have no part in any of it.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import experts
from .data import Data, seed_of
from .errors import UsageError
from .model import MVAE, Batch, Precision, running_in

if TYPE_CHECKING:
    from .processes import Processes

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
    """One value per example, each (n,), in nats; from `evaluate`, of the examples that have all that it takes.

    log_p: the estimate of log p(target).
    log_weight_variance: the variance, over the draws, of log p(target | z) + log p(z) - log q(z | proposal). It tells
        how well the proposal fits: at 0 one draw is enough, from about 1 on many are needed.
    """

    log_p: Tensor
    log_weight_variance: Tensor


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

    Raises UsageError for a name that is no modality's, or noise of another shape.
    """
    return _from_draws(model, batch, proposal, targets, (), noise, max_rows)[0]


def predict(
    model: MVAE, batch: Batch, *, given: Modalities, names: Sequence[str], noise: Tensor, max_rows: int = 4096
) -> dict[str, Tensor]:
    """The means of the modalities `names` given others: E_q(z|given)[mean of p(x | z)], each (batch, *event).

    For a label: its probabilities. `noise`, `max_rows` and errors as in `log_likelihood`.
    """
    return _from_draws(model, batch, given, (), names, noise, max_rows)[1]


@torch.no_grad()
def _from_draws(
    model: MVAE,
    batch: Batch,
    proposal: Modalities,
    targets: Sequence[Modalities],
    predicted: Sequence[str],
    noise: Tensor,
    max_rows: int,
) -> tuple[dict[Modalities, Estimate], dict[str, Tensor]]:
    """What `log_likelihood` says of `targets` and `predict` of the modalities `predicted`, from the same draws."""
    model.check_names(*proposal, *predicted, *(name for target in targets for name in target))
    if noise.dim() != 3 or len(noise) < 2 or noise.shape[2] != model.n_latents:
        wanted = f"(draws, batch, {model.n_latents}) with two draws or more"
        raise UsageError(f"`noise` is of shape {tuple(noise.shape)}, and {wanted} is wanted")
    n_draws, n, _ = noise.shape
    scored = tuple(name for name in model.modalities if any(name in target for target in targets))
    if proposal:
        mu, logvar = model.posterior({name: batch[name] for name in proposal})
    else:
        mu = logvar = torch.zeros_like(noise[0])
    parts: dict[Modalities, list[Estimate]] = {target: [] for target in targets}
    means: dict[str, list[Tensor]] = {name: [] for name in predicted}
    for rows in torch.arange(n, device=noise.device).split(max(1, max_rows // n_draws)):
        some = {name: batch[name][rows] for name in scored}
        weights: dict[Modalities, list[Tensor]] = {target: [] for target in targets}
        sums: dict[str, list[Tensor]] = {name: [] for name in predicted}
        for eps in noise[:, rows].split(max(1, max_rows // len(rows))):
            z = experts.draw(mu[rows], logvar[rows], eps)
            with _decoding_once(model, set(scored).intersection(predicted)):
                log_prob = model.log_prob(z, some, [scored] * len(z))
                for name, mean in model.mean(z, predicted).items():
                    sums[name].append(mean.sum(dim=0))
            log_q = experts.log_standard_normal(eps) - 0.5 * logvar[rows].sum(dim=-1)
            ratio = experts.log_standard_normal(z) - log_q
            log_probs = dict(zip(model.modalities, log_prob.unbind(dim=1), strict=True))
            for target in targets:
                weights[target].append(sum((log_probs[name] for name in target), start=ratio))
        for target in targets:
            weight = torch.cat(weights[target]).double()
            estimate = Estimate(weight.logsumexp(dim=0) - math.log(n_draws), weight.var(dim=0))
            parts[target].append(estimate)
        for name in predicted:
            means[name].append(torch.stack(sums[name]).sum(dim=0) / n_draws)
    estimates = {target: Estimate(*map(torch.cat, zip(*found, strict=True))) for target, found in parts.items()}
    return estimates, {name: torch.cat(found) for name, found in means.items()}


@contextmanager
def _decoding_once(model: MVAE, names: Iterable[str]) -> Iterator[None]:
    """Within it the decoders of `names` give what they gave when they are asked again to decode the same tensor."""
    likelihoods = [model.likelihood(name) for name in names]
    for likelihood in likelihoods:
        vars(likelihood)["decode"] = functools.lru_cache(maxsize=1)(likelihood.decode)
    try:
        yield
    finally:
        for likelihood in likelihoods:
            del vars(likelihood)["decode"]


class Evaluation(NamedTuple):
    """What `evaluate` found, on the CPU.

    estimates: by quantity and proposal, each value (n,), of the n examples that `examples` names under the same key. A
        conditional's variance is that of its joint's log weights.
    predictions: by predicted modality, (n, *event), of the examples that have it and what it is predicted from; truth:
        the same modalities of the data.
    examples: by quantity and proposal, (n,): the numbers of the examples that have the modalities of both.
    """

    estimates: dict[tuple[Quantity, Modalities], Estimate]
    predictions: dict[str, Tensor]
    truth: dict[str, Tensor]
    examples: dict[tuple[Quantity, Modalities], Tensor]


def evaluate(
    model: MVAE,
    data: Data,
    *,
    quantities: Mapping[Quantity, Sequence[Modalities]],
    predictions: Mapping[str, Modalities] | None = None,
    n_samples: int,
    seed: int = 0,
    precision: Precision = "fp32",
    max_rows: int | None = None,
    processes: "Processes | None" = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Evaluation:
    """Estimates log-likelihoods of the examples of `data`: each quantity of those that have all its modalities.

    Args:
        quantities: what to estimate, each with the proposals to estimate it (a conditional: its joint) under.
        predictions: by modality to predict, what it is predicted from; see `predict`.
        n_samples: draws per example and proposal.
        seed: an example's noise follows from the seed and its number, so that batch and chunk size don't matter. All
            proposals have the same noise.
        precision: "bf16" runs the networks in bfloat16, and all log-probabilities and sums in float32 or better.
        max_rows: the most latents to decode in one call, which bounds the memory. None: as many as make 2^20 values of
            the largest modality on a CPU (1,337 pictures of 28x28), to fit its cache, and 2^26 on other devices.
        processes: those that share the examples, batch by batch; all find the same as one alone would.
        progress: wraps the list of batches, to show a bar.

    Raises UsageError for a name that is no modality's, a quantity without a target, fewer than two samples, data that
    the model doesn't take, or a quantity or prediction for which no example has all modalities.
    """
    predictions = predictions or {}
    for quantity in quantities:
        model.check_names(*quantity.target, *quantity.given, *quantity.given_proposal)
        if not quantity.target:
            raise UsageError(f"{quantity.name} has no `target`, and one modality or more is wanted")
    needed = {
        (quantity, proposal): _needed(model, quantity, proposal)
        for quantity, proposals in quantities.items()
        for proposal in proposals
    }
    keys = dict.fromkeys(key for some in needed.values() for key in some)
    used = {name for proposal, target in keys for name in proposal + target}
    used |= {name for predicted, given in predictions.items() for name in (predicted, *given)}
    model.check_names(*used, *(data.present or {}))
    if n_samples < 2:
        raise UsageError(f"`n_samples` is {n_samples}, and 2 or more are wanted")
    patterns = _patterns(data, used)
    examples = {
        which: _having({name for key in some for part in key for name in part}, patterns, which[0].name)
        for which, some in needed.items()
    }
    predictable = {
        name: _having({name, *given}, patterns, f"{name} predicted from {listed(given)}")
        for name, given in predictions.items()
    }
    model.eval()
    example, _ = data.batch(torch.zeros(1, dtype=torch.long))
    if not max_rows:
        max_rows = 2 ** (20 if data.device.type == "cpu" else 26) // max(x.numel() for x in example.values())
    extremes = data.extremes().cpu()
    for has, rows in patterns:
        if has:
            some = torch.cat([rows[:100], rows[torch.isin(rows, extremes)]]).unique()
            model.check(data.batch(some)[0], names=[name for name in model.modalities if name in has])
    # All results are allocated here and filled in the loop. Small tensors that outlive a batch would lie between the
    # large ones of the next: freed places then no longer fit, and the memory of the process grows with every batch.
    n = len(data)
    found = {key: Estimate(*torch.zeros(2, n, dtype=torch.float64)) for key in keys}
    truth = {name: torch.zeros(n, *example[name].shape[1:], dtype=example[name].dtype) for name in predictions}
    z = next(model.parameters()).new_zeros(1, model.n_latents)
    means = model.mean(z, tuple(predictions))  # of one example, for their shapes
    predicted = {name: torch.zeros(n, *mean.shape[1:], dtype=mean.dtype) for name, mean in means.items()}
    size = max(1, max_rows // n_samples)
    batches = progress([(has, rows) for has, rows_of_all in patterns for rows in rows_of_all.split(size)])
    for has, rows in processes.taken(batches) if processes else batches:
        batch, _ = data.batch(rows)
        noise = torch.stack([_noise(n_samples, model.n_latents, seed, row) for row in rows.tolist()], dim=1)
        noise = noise.to(data.device, next(model.parameters()).dtype)
        for proposal in dict.fromkeys([*(proposal for proposal, _ in found), *predictions.values()]):
            targets = [target for other, target in found if other == proposal and has.issuperset(proposal + target)]
            asked = [name for name, given in predictions.items() if given == proposal]
            names = [name for name in asked if has.issuperset((name, *proposal))]
            if not targets and not names:
                continue
            with running_in(precision, data.device):
                some, means = _from_draws(model, batch, proposal, targets, names, noise, max_rows)
            for target, estimate in some.items():
                for whole, part in zip(found[proposal, target], estimate, strict=True):
                    whole[rows] = part.cpu()
            for name, mean in means.items():
                predicted[name][rows] = mean.cpu()
                truth[name][rows] = batch[name].cpu()
    if processes:  # each has filled its own rows of zeros
        found = {key: Estimate(*map(processes.sum, estimate)) for key, estimate in found.items()}
        predicted, truth = ({name: processes.sum(part) for name, part in parts.items()} for parts in (predicted, truth))
    estimates = {}
    for which, (joint, *conditions) in needed.items():
        log_p, variance = found[joint]
        for condition in conditions:
            log_p = log_p - found[condition].log_p
        estimates[which] = Estimate(log_p[examples[which]], variance[examples[which]])
    predicted, truth = ({name: part[name][rows] for name, rows in predictable.items()} for part in (predicted, truth))
    return Evaluation(estimates, predicted, truth, examples)


_Key = tuple[Modalities, Modalities]  # a proposal and a target


def _needed(model: MVAE, quantity: Quantity, proposal: Modalities) -> list[_Key]:
    """What the quantity is the difference of: its joint under `proposal`, and what is given, if anything."""
    joint = tuple(name for name in model.modalities if name in quantity.target + quantity.given)
    return [(proposal, joint), *([(quantity.given_proposal, quantity.given)] if quantity.given else [])]


def _patterns(data: Data, names: Collection[str]) -> list[tuple[frozenset[str], Tensor]]:
    """The examples by which of `names` they have: for each pattern those modalities, and the examples' numbers."""
    masked = {name: here.cpu() for name, here in (data.present or {}).items() if name in names}
    if not masked:
        return [(frozenset(names), torch.arange(len(data)))]
    kinds, kind_of = torch.stack([*masked.values()], dim=1).unique(dim=0, return_inverse=True)
    lacking = [{name for name, here in zip(masked, kind, strict=True) if not here} for kind in kinds.tolist()]
    return [(frozenset(names) - some, (kind_of == i).nonzero().flatten()) for i, some in enumerate(lacking)]


def _having(names: Collection[str], patterns: Sequence[tuple[frozenset[str], Tensor]], what: str) -> Tensor:
    """The numbers of the examples that have all of `names`. Raises UsageError, naming `what` needs them, for none."""
    found = [rows for has, rows in patterns if has.issuperset(names)]
    if not found:
        raise UsageError(f"{what}: no example of `data` has {listed(sorted(names))}")
    return torch.cat(found).sort().values


def _noise(n_samples: int, n_latents: int, seed: int, row: int) -> Tensor:
    return torch.randn(n_samples, n_latents, generator=torch.Generator().manual_seed(seed_of(seed, row)))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of (n,) values and its standard error, std / sqrt(n) (NaN for a single value)."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
