"""What a run measures and checks: the objective and metrics on validation data, and whether its state is good."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.dataset import Data, consecutive_rows, seed_of
from ..errors import UserError, is_out_of_memory
from ..model import MVAE, Batch, Precision, autocast, evaluating
from ..objective import JOINT, Objective, Totals
from .distributed import Processes
from .metrics import Metric

LIMIT = 100
"""A run has diverged if its loss exceeds this many times the first step's, or 100 nats if that is larger."""


@torch.no_grad()
def measured(
    objective: Objective,
    data: Data,
    metrics: Mapping[str, Metric],
    *,
    batch_size: int,
    seed: int,
    precision: Precision,
    processes: Processes,
    between: Callable[[], None],
) -> dict[str, float]:
    """Return the means over `data` at β = 1 of the objective's parts and of the metrics, in evaluation mode.

    z is drawn with the same seed each time. A metric's mean is over the examples that have all modalities. Each process
    takes its share of the batches, and all call `between` after every `world` batches.
    """
    model, device = objective.model, data.device
    n_numbers = 2 + 2 * len(objective.terms) * (len(model.modalities) + 1)
    sums = torch.zeros(n_numbers, dtype=torch.float64, device=device)
    measures = torch.zeros(len(metrics), 2, dtype=torch.float64, device=device)
    with evaluating(objective):
        for i, rows in enumerate(consecutive_rows(data, batch_size)):
            if i % processes.world == processes.rank:
                torch.manual_seed(seed_of(seed, 0, i))
                batch, present = data.batch(rows)
                with autocast(precision, device), explained(model, batch, present):
                    sums += objective(batch, 1.0, None, present)[1].vector()
                complete = model.presence(batch, present).all(dim=0)
                for j, metric in enumerate(metrics.values()):
                    values = metric(model, batch)
                    measures[j] += torch.stack([torch.where(complete, values, 0).sum(), complete.sum()])
            if i % processes.world == processes.world - 1:
                between()
    sums, measures = processes.sum(sums), processes.sum(measures)
    found = Totals.of(sums.cpu(), objective.names, model.modalities).means()
    return found | {name: total / n for name, (total, n) in zip(metrics, measures.tolist(), strict=True) if n}


@contextmanager
def explained(model: MVAE, batch: Batch, present: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Turn torch's error on a bad batch, such as one with a label out of range, into one that says what is wrong."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        model.check(batch, present)
        if "TorchDynamoException" in [kind.__name__ for kind in type(error).__mro__]:
            reason = str(error).splitlines()[0]
            raise UserError(f"torch can't compile the step on this machine: omit --compile ({reason})") from error
        raise


def check_good(model: MVAE, last: Totals | None, start: float) -> None:
    """Raise UserError unless a run's state is good: weights and the last step finite, its loss not diverged.

    last: a step's sums. start: the loss of the first step.
    """
    bad = {".".join(name.split(".")[:2]) for name, weight in model.named_parameters() if not weight.isfinite().all()}
    if bad:  # after a finite loss whose gradient was not
        raise UserError(f"not finite: the gradient of {_some(sorted(bad))}")
    if last is not None:
        check_means(last.means(), start)


def check_means(found: Mapping[str, float], start: float, split: str = "training") -> None:
    """Raise UserError unless the means (see `Totals.means`) are finite, and the loss has not diverged."""
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:  # terms of one modality first: if it is bad, so is the joint term
        raise UserError(f"not finite: {split} {_some(sorted(bad, key=lambda x: (x == 'loss', x.startswith(JOINT))))}")
    if found["loss"] > LIMIT * max(abs(start), 100.0):
        raise UserError(f"diverged: {split} loss {found['loss']:.3g} (first step: {start:.3g})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
