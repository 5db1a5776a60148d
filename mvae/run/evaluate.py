"""Log-likelihoods of a data set: log p(x), log p(x, y), log p(x | y) = log p(x, y) - log p(y), with predictions."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.dataset import Data, seed_of
from ..errors import UsageError
from ..estimators import Estimate, Modalities, estimate_and_predict
from ..model import MVAE, Precision, autocast
from ..progress import progress
from .distributed import Processes

VALUES_PER_CALL = 2**20, 2**26
"""Values of the largest modality that one call decodes, on a CPU and on other devices, which bounds the memory."""


class Quantity(NamedTuple):
    """log p(target | given), or log p(target) if nothing is given.

    `given_proposal` is the proposal for log p(given), whatever that of the joint; () is the prior.
    """

    target: Modalities
    given: Modalities = ()
    given_proposal: Modalities = ()

    @property
    def name(self) -> str:
        return f"log p({listed(self.target)}{' | ' if self.given else ''}{listed(self.given)})"


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Join the names; of more than three, the first two and the last."""
    return separator.join(names if len(names) < 4 else (*names[:2], "...", names[-1]))


def of_a_pair(x: Modalities, y: Modalities, y_proposal: Modalities = ()) -> dict[Quantity, list[Modalities]]:
    """Return the quantities of the paper's table 2 for two (sets of) modalities, each with its proposals.

    log p(x | y) is log p(x, y) less log p(y), whose proposal is `y_proposal`; () is the prior.
    """
    both = [x, x + y]
    return {
        Quantity(x): both,
        Quantity(x + y): both,
        Quantity(x, given=y, given_proposal=y_proposal): both,
        Quantity(y, given=x, given_proposal=x): both,
        Quantity(y): [(), y],
    }


class Evaluation(NamedTuple):
    """Results of `evaluate`, on the CPU.

    estimates: by quantity and proposal, values (n,) of the n examples in `examples`. A conditional's variance is that
        of its joint's log weights.
    predictions: by modality, (n, *event), of the examples that have it and what it is predicted from; truth: the same
        modalities of the data.
    examples: by quantity and proposal, (n,): the numbers in the data of the examples that have the modalities of both.
    n_samples: draws per example and proposal.

    Printed, it is a table; see `table`.
    """

    estimates: dict[tuple[Quantity, Modalities], Estimate]
    predictions: dict[str, Tensor]
    truth: dict[str, Tensor]
    examples: dict[tuple[Quantity, Modalities], Tensor]
    n_samples: int

    @property
    def n_examples(self) -> int:
        """The number of examples that have an estimate."""
        return len(torch.cat([*self.examples.values()]).unique())

    def rows(self) -> list[dict[str, Any]]:
        """Return the estimates as plain values, a row for each quantity and proposal."""
        return [
            {
                "quantity": quantity.name,
                "proposal": under(proposal),
                **summary(one.log_p),
                "log_weight_variance": one.log_weight_variance.mean().item(),
            }
            for (quantity, proposal), one in self.estimates.items()
        ]

    def __str__(self) -> str:
        return table(self.rows(), self.n_examples, self.n_samples)


def evaluate(
    model: MVAE,
    data: Data,
    *,
    quantities: Mapping[Quantity, Sequence[Modalities]],
    predictions: Mapping[str, Modalities] | None = None,
    n_samples: int,
    seed: int = 0,
    precision: Precision = "fp32",
    processes: Processes | None = None,
) -> Evaluation:
    """Estimate each quantity for the examples that have all its modalities.

    Args:
        quantities: what to estimate, each with the proposals (of a conditional's joint) to estimate it with.
        predictions: by modality to predict, what it is predicted from; see `mvae.estimators.estimate_and_predict`.
        n_samples: draws per example and proposal.
        seed: an example's noise depends on the seed and its number alone, so that the result doesn't depend on the
            batch size. All proposals have the same noise.
        precision: of the networks; log-probabilities and sums are float32 or better.
        processes: share the batches; all return what one would.

    Raises UsageError for an unknown modality, a quantity without a target, n_samples < 2, data that don't fit the
    model, or a quantity or prediction for which no example has all modalities.
    """
    predictions, processes = predictions or {}, processes or Processes(0, 1)
    if n_samples < 2:
        raise UsageError(f"n_samples must be >= 2, got {n_samples}")
    needed = {
        (quantity, proposal): _needed(model, quantity, proposal)
        for quantity, proposals in quantities.items()
        for proposal in proposals
    }
    keys = dict.fromkeys(key for some in needed.values() for key in some)
    used = {name for proposal, target in keys for name in proposal + target}
    used |= {name for predicted, given in predictions.items() for name in (predicted, *given)}
    model.check_names(*used, *(data.present or {}))
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
    _check_examples(model, data, patterns)
    example, _ = data.batch(torch.zeros(1, dtype=torch.long))
    max_rows = VALUES_PER_CALL[data.device.type != "cpu"] // max(x.numel() for x in example.values())
    size = max(1, max_rows // n_samples)
    batches = [(has, some) for has, members in patterns for some in members.split(size)]
    mine = batches[processes.rank :: processes.world]
    watched = mine if processes.rank else progress(mine, "log-likelihoods", len(mine))
    found, predicted = _estimated(model, data, keys, predictions, watched, n_samples, max_rows, seed, precision)
    # Each process has filled its own rows of zeros.
    found = {key: Estimate(*map(processes.sum, estimate)) for key, estimate in found.items()}
    predicted = {name: processes.sum(predicted[name])[some] for name, some in predictable.items()}
    estimates = {which: _difference(found, some, examples[which]) for which, some in needed.items()}
    truth = {
        name: torch.cat([data.batch(part)[0][name].cpu() for part in some.split(1000)])
        for name, some in predictable.items()
    }
    return Evaluation(estimates, predicted, truth, examples, n_samples)


_Key = tuple[Modalities, Modalities]  # a proposal and a target


def _needed(model: MVAE, quantity: Quantity, proposal: Modalities) -> list[_Key]:
    """Return what the quantity is the difference of: its joint with `proposal`, and what is given, if anything."""
    model.check_names(*quantity.target, *quantity.given, *quantity.given_proposal)
    if not quantity.target:
        raise UsageError(f"{quantity.name} must have a target of one or more modalities")
    joint = tuple(name for name in model.modalities if name in quantity.target + quantity.given)
    return [(proposal, joint), *([(quantity.given_proposal, quantity.given)] if quantity.given else [])]


def _estimated(
    model: MVAE,
    data: Data,
    keys: Collection[_Key],
    predictions: Mapping[str, Modalities],
    batches: Iterable[tuple[frozenset[str], Tensor]],
    n_samples: int,
    max_rows: int,
    seed: int,
    precision: Precision,
) -> tuple[dict[_Key, Estimate], dict[str, Tensor]]:
    """Return the estimates and predictions of the examples in `batches`, each (n, ...) of all in the data; else 0."""
    # All results are allocated here and filled in the loop. Small tensors that outlive a batch would lie between the
    # large ones of the next: freed places then no longer fit, and the memory of the process grows with every batch.
    n, weight = len(data), next(model.parameters())
    found = {key: Estimate(*torch.zeros(2, n, dtype=torch.float64)) for key in keys}
    means = model.mean(weight.new_zeros(1, model.n_latents), tuple(predictions))  # of one example, for their shapes
    predicted = {name: torch.zeros(n, *mean.shape[1:], dtype=mean.dtype) for name, mean in means.items()}
    for has, numbers in batches:
        batch, _ = data.batch(numbers)
        noise = torch.stack([_noise(n_samples, model.n_latents, seed, row) for row in numbers.tolist()], dim=1)
        noise = noise.to(data.device, weight.dtype)
        for proposal in dict.fromkeys([*(proposal for proposal, _ in keys), *predictions.values()]):
            targets = [target for other, target in keys if other == proposal and has.issuperset(proposal + target)]
            asked = [name for name, given in predictions.items() if given == proposal]
            names = [name for name in asked if has.issuperset((name, *proposal))]
            if not targets and not names:
                continue
            with autocast(precision, data.device):
                some, means = estimate_and_predict(model, batch, proposal, targets, names, noise, max_rows)
            for target, estimate in some.items():
                for whole, part in zip(found[proposal, target], estimate, strict=True):
                    whole[numbers] = part.cpu()
            for name, mean in means.items():
                predicted[name][numbers] = mean.cpu()
    return found, predicted


def _difference(found: Mapping[_Key, Estimate], needed: Sequence[_Key], examples: Tensor) -> Estimate:
    """Return the joint's estimate less that of what is given, of these examples."""
    joint, *given = (found[key] for key in needed)
    log_p = joint.log_p - given[0].log_p if given else joint.log_p
    return Estimate(log_p[examples], joint.log_weight_variance[examples])


def _patterns(data: Data, names: Collection[str]) -> list[tuple[frozenset[str], Tensor]]:
    """Group the examples by which of `names` they have: for each pattern its modalities and the examples' numbers."""
    masked = {name: here.cpu() for name, here in (data.present or {}).items() if name in names}
    if not masked:
        return [(frozenset(names), torch.arange(len(data)))]
    kinds, kind_of = torch.stack([*masked.values()], dim=1).unique(dim=0, return_inverse=True)
    lacking = [{name for name, here in zip(masked, kind, strict=True) if not here} for kind in kinds.tolist()]
    return [(frozenset(names) - some, (kind_of == i).nonzero().flatten()) for i, some in enumerate(lacking)]


def _having(names: Collection[str], patterns: Sequence[tuple[frozenset[str], Tensor]], what: str) -> Tensor:
    """Return the numbers of the examples that have all of `names`. Raises UsageError if there are none."""
    found = [members for has, members in patterns if has.issuperset(names)]
    if not found:
        raise UsageError(f"{what}: no example has all of {listed(sorted(names))}")
    return torch.cat(found).sort().values


def _check_examples(model: MVAE, data: Data, patterns: Sequence[tuple[frozenset[str], Tensor]]) -> None:
    """Check the first hundred examples of each pattern, and those with the extreme values, by a dry run."""
    extremes = data.extremes().cpu()
    for has, members in patterns:
        if has:
            some = torch.cat([members[:100], members[torch.isin(members, extremes)]]).unique()
            model.check(data.batch(some)[0], names=[name for name in model.modalities if name in has])


def _noise(n_samples: int, n_latents: int, seed: int, row: int) -> Tensor:
    return torch.randn(n_samples, n_latents, generator=torch.Generator().manual_seed(seed_of(seed, row)))


def mean_and_error(values: Tensor) -> tuple[float, Any]:
    """Return the mean of (n,) values and its standard error, std / sqrt(n); None for a single value."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def shown(mean: float, error: float | None, digits: int) -> str:
    """Return mean ± standard error as text."""
    return f"{mean:.{digits}f} ± " + ("–" if error is None else f"{error:.{digits}f}")


def under(proposal: Modalities) -> str:
    """Return the name of a proposal distribution."""
    return f"q(z | {listed(proposal)})" if proposal else "p(z)"


def summary(values: Tensor) -> dict[str, Any]:
    """Return the mean of (n,) values, its standard error and n."""
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error, "n_examples": len(values)}


def decided_by_few(row: Mapping[str, Any], n_samples: int) -> bool:
    """Return whether a few of the samples decide an estimate: the variance of its log weights is above 2 ln(n_samples).

    If log weights are normal, importance sampling needs at least exp(variance / 2) samples (Chatterjee & Diaconis
    2018). Those of samples from p(z) aren't: most z explain nothing, yet a tenth of them may explain a label.
    """
    return row["proposal"] != under(()) and row["log_weight_variance"] > 2 * math.log(n_samples)


def table(rows: Sequence[Mapping[str, Any]], n: int, n_samples: int) -> str:
    """Return rows as text: means over n examples in nats, and the variance of the log importance weights.

    If some are over fewer examples, a column says so. The variance of an estimate `decided_by_few` is marked.
    """
    bad = [decided_by_few(row, n_samples) for row in rows]
    own = any(row["n_examples"] != n for row in rows)
    cells = [("quantity", "proposal", "log-likelihood", "variance", "examples")]
    for row, star in zip(rows, bad, strict=True):
        variance = f"{row['log_weight_variance']:.2f}" + "*" * star
        value = shown(row["mean"], row["standard_error"], 3)
        cells.append((row["quantity"], row["proposal"], value, variance, str(row["n_examples"])))
    left, right = (max(24, 2 + max(map(len, column))) for column in [*zip(*cells, strict=True)][:2])
    lines = [
        f"{name:{left}}{proposal:{right}}{value:>20}{variance:>12}" + f"{examples:>12}" * own
        for name, proposal, value, variance, examples in cells
    ]
    if any(bad):
        limit = 2 * math.log(n_samples)
        lines += [
            f"* above {limit:.1f}: a few of the {n_samples:,} samples decide log p (of a conditional: its joint's),",
            "  which is then too low on average; prefer the lower variance, or take more samples",
        ]
    return "\n".join(lines)
