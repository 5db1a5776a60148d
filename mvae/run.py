"""A run's state and the files that report it: checkpoints, stats.jsonl, TensorBoard scalars and pictures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, pictures
from .data import Data
from .errors import UsageError, UserError
from .files import write_atomically
from .objective import Objective
from .stats import SUBSET, Totals

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MAY_CHANGE = {"epochs", "cuda", "compile", "threads", "workers", "log_interval", "resume", "command", "commit"}
"""Settings that may differ when a run is resumed, as may folders (..._dir). Any other change makes another run."""

STATE = ("epoch", "step", "seconds", "beta", "lr", "best", "history", "sums")
"""The fields of a Run that its checkpoint holds, beside the model's and the optimiser's state."""


class Run:
    """Where a run stands: everything that a checkpoint holds. `epoch` counts from 1; `step` steps of it are done."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        out_dir: Path,
        experiment: str,
        settings: Mapping[str, Any],
    ):
        self.objective, self.optimizer = objective, optimizer
        self.out_dir, self.experiment, self.settings = out_dir, experiment, dict(settings)
        self.epoch, self.step, self.seconds = 1, 0, 0.0
        self.beta = self.lr = math.nan  # of the latest step
        self.best = math.inf
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0)  # of this epoch's steps, as Totals.vector; empty before the first
        self.writer: SummaryWriter | None = None

    def start(self, resume: bool) -> None:
        """Takes up the state of the checkpoint in `out_dir` if `resume` is set and there is one.

        Raises UsageError if there is one and `resume` isn't set, or if it was made with other settings; UserError
        if it can't be gone on from.
        """
        path = self.out_dir / checkpoint.LATEST
        if not path.exists():
            if resume:
                print(f"there is no {path} yet: starting from the beginning", flush=True)
            return
        if not resume:
            raise UsageError(f"{self.out_dir} holds a run: go on with `resume`, or name another `out_dir`")
        saved = checkpoint.load(path, self.experiment)
        names = sorted((saved["settings"].keys() | self.settings.keys()) - MAY_CHANGE)
        names = [name for name in names if not name.endswith("_dir")]
        pairs = [(name, saved["settings"].get(name), self.settings.get(name)) for name in names]
        differ = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if differ:
            raise UsageError(f"`resume`: {path} was made with other settings: {'; '.join(differ)}")
        try:
            self.objective.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for name in STATE:
                setattr(self, name, saved[name])
            self.sums = self.sums.to(next(self.objective.parameters()).device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"{path} doesn't hold a run of this network to go on from") from None

    def add(self, sums: torch.Tensor) -> None:
        """Adds a step's sums to the epoch's."""
        self.sums = self.sums + sums if len(self.sums) else sums

    def totals(self, sums: torch.Tensor) -> Totals:
        """A vector of sums by names; terms beyond the objective's own are those of random subsets."""
        names, modalities = self.objective.names, self.objective.model.modalities
        while len(Totals.zeros(names, modalities).vector()) < len(sums):
            names += (SUBSET,)
        return Totals.of(sums.cpu(), names, modalities)

    def mean_loss(self) -> float:
        """The mean loss of the epoch so far, in nats per example."""
        totals = self.totals(self.sums)
        return (totals.loss / totals.n).item()

    def end_epoch(self, train: torch.Tensor, validation: Mapping[str, float]) -> bool:
        """Records the epoch, whose steps' sums are `train`, and begins the next.

        Returns True if its validation loss is the best yet.
        """
        totals = self.totals(train)
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "beta": self.beta,
            "lr": self.lr,
            "seconds": self.seconds,
            "examples_per_second": totals.n.item() / self.seconds,
            **{f"train/{name}": value for name, value in totals.means().items()},
            **{f"validation/{name}": value for name, value in validation.items()},
        }
        improved = validation["loss"] < self.best
        self.best = min(self.best, validation["loss"])
        self.history.append(record)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0)
        return improved

    def save(self, *, best: bool = False) -> None:
        """Writes the latest state, and before it the best model if this is it. Raises UserError if that fails."""
        model = self.objective.model
        content = {"model": model.state_dict(), "n_latents": model.n_latents, "settings": self.settings}
        if best:
            seconds = sum(record["seconds"] for record in self.history)
            found = {"epoch": self.epoch - 1, "validation_loss": self.best, "training_seconds": seconds}
            checkpoint.save(self.out_dir / checkpoint.BEST, self.experiment, content | found)
        content |= {name: getattr(self, name) for name in STATE}
        content["optimizer"] = self.optimizer.state_dict()
        checkpoint.save(self.out_dir / checkpoint.LATEST, self.experiment, content)

    def report(self, validation: Data, *, best: bool) -> None:
        """Reports the last finished epoch: a line on the terminal, stats.jsonl, TensorBoard."""
        record = self.history[-1]
        losses = f"loss {record['train/loss']:.2f}  validation loss {record['validation/loss']:.2f}"
        elbos = [
            f"ELBO({name}) {record[f'validation/{name}/elbo']:.2f}"
            for name in self.objective.names[:7]
            if f"validation/{name}/elbo" in record
        ]
        metrics = [
            f"{name.removeprefix('validation/')} {value:.4f}"
            for name, value in record.items()
            if name.startswith("validation/") and name.count("/") == 1 and name != "validation/loss"
        ]
        speed = f"{record['examples_per_second']:.0f} examples/s"
        start = [f"epoch {record['epoch']}", f"beta {record['beta']:.3f}", losses + " (best)" * best]
        print("  ".join([*start, *elbos, *metrics, speed]), flush=True)
        self.write_stats()
        try:
            self._write_tensorboard(record, validation)
        except OSError as error:
            raise UserError(f"can't write {self.out_dir / 'tensorboard'}: {error.strerror or error}") from None

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def write_stats(self) -> None:
        """Writes stats.jsonl whole. Raises UserError if that fails."""
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        write_atomically(self.out_dir / "stats.jsonl", lines.encode())

    def _write_tensorboard(self, record: Mapping[str, Any], validation: Data) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run has need of it

        epoch = record["epoch"]
        self.writer = self.writer or SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=epoch)
        for name, value in record.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, epoch)
        torch.manual_seed(0)
        some, present = validation.batch(torch.arange(min(8, len(validation)), device=validation.device))
        if present is None:
            for name, grid in pictures.reconstructions(self.objective.model, some).items():
                self.writer.add_image(f"reconstruction/{name}", grid, epoch)
        self.writer.flush()
