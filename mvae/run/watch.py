"""Watch: a run whose loss, gradient or course says that going on is of no use ends, and its last good state is kept."""

import math

import torch
from torch import Tensor

from .errors import UserError
from .run import Run

DIVERGED = 100
"""A validation loss is that of a run that diverges if it is so many times the loss with which the training began."""


class Watch:
    """Notices the first step that isn't finite, without waiting for the device at every step; and a run that diverges.

    first: the sums of the last step, or of the first bad one, on the device. start: the loss of the first step.
    """

    def __init__(self, run: Run):
        self.run = run
        self.first: Tensor | None = None
        self.start: Tensor | None = None

    def look(self, sums: Tensor, *, raise_now: bool) -> None:
        """Remembers a step's sums unless an earlier step's were bad; those raise UserError if `raise_now`."""
        if self.start is None:
            self.start = sums[0] / sums[1]
        self.first = sums if self.first is None else torch.where(self.first.isfinite().all(), sums, self.first)
        if raise_now and not self.first.isfinite().all():
            self.check_weights()
            self.stop(self.run.totals(self.first).not_finite())

    def check(self) -> None:
        """Raises UserError if a step so far, or a weight, isn't finite: such a state isn't worth saving."""
        if self.first is not None:
            self.look(self.first, raise_now=True)
        self.check_weights()

    def check_weights(self) -> None:
        """Raises UserError if a weight isn't finite, as after a finite loss whose gradient was not."""
        weights = self.run.objective.model.named_parameters()
        bad = {".".join(name.split(".")[:2]) for name, weight in weights if not weight.isfinite().all()}
        if bad:
            self.stop([f"the gradient of {name}" for name in sorted(bad)])

    def check_course(self, loss: float) -> None:
        """Raises UserError if an epoch's validation loss says that the run diverges.

        The loss is held against that of the first epoch's training, and in this epoch against that of its first step.
        """
        history = self.run.history
        start = history[0]["train/loss"] if history else math.inf if self.start is None else float(self.start)
        if loss > DIVERGED * max(abs(start), 100.0):
            self._stop(f"the run diverges: validation loss {loss:.3g}", f", after {start:.3g} at its start")

    def stop(self, what: list[str]) -> None:
        """Raises UserError, which says what isn't finite."""
        more = " and more" if len(what) > 4 else ""
        self._stop("not finite", f": {', '.join(what[:4])}{more}")

    def _stop(self, what: str, more: str) -> None:
        where = f"by epoch {self.run.epoch}, step {self.run.step}"
        remedy = "the last good checkpoint is kept; try a smaller `lr`, or `precision` fp32"
        raise UserError(f"{what} {where}{more}; {remedy}")
