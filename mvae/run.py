"""A run's state and the files that report it: checkpoints, stats.jsonl, TensorBoard scalars and pictures."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from . import checkpoint, pictures
from .data import Data
from .errors import UsageError, UserError
from .estimators import listed
from .objective import Objective, Totals

MAY_CHANGE = {"epochs", "cuda", "compile", "workers", "log_interval", "resume"}
"""The settings that a resumed run may be given anew, beside folders (..._dir); any other would make it another run."""


class Run:
    """Where a run stands: everything a checkpoint holds. `epoch` counts from 1; `step` steps of it are done."""

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
        self.best = math.inf
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(0)
        self.writer: SummaryWriter | None = None

    def start(self, resume: bool) -> None:
        """Takes up the state of the checkpoint in `out_dir`, if asked to and if there is one.

        Raises UsageError if there is one and `resume` isn't set, or if it was made with other settings; UserError
        if it can't be gone on from.
        """
        path = self.out_dir / checkpoint.LATEST
        if not path.exists():
            if resume:
                print(f"there is no {path} yet: starting from the beginning", flush=True)
            return
        if not resume:
            raise UsageError(f"{self.out_dir} holds a run: go on with --resume, or name another --out-dir")
        saved = checkpoint.load(path, self.experiment)
        names = sorted((saved["settings"].keys() | self.settings.keys()) - MAY_CHANGE)
        names = [name for name in names if not name.endswith("_dir")]
        pairs = [(name, saved["settings"].get(name), self.settings.get(name)) for name in names]
        differ = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if differ:
            raise UsageError(f"--resume: {path} was made with other settings: {'; '.join(differ)}")
        try:
            self.objective.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for name in ("epoch", "step", "seconds", "best", "history"):
                setattr(self, name, saved[name])
            self.sums = saved["sums"].to(next(self.objective.parameters()).device)
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"{path} doesn't hold a run of this network to go on from") from None

    def add(self, sums: Tensor) -> None:
        """Adds a step's `sums_of` to the epoch's."""
        self.sums = self.sums + sums if len(self.sums) else sums

    def end_epoch(self, train: Tensor, validation: Tensor, beta: float) -> bool:
        """Records the epoch by its sums, and begins the next; returns whether its validation loss is the best yet."""
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "beta": beta,
            "seconds": self.seconds,
            "examples_per_second": train[1].item() / self.seconds,
            "train": summary(self.objective, train),
            "validation": summary(self.objective, validation),
        }
        loss = record["validation"]["loss"]
        improved = loss < self.best
        self.best = min(self.best, loss)
        self.history.append(record)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, torch.zeros(0)
        return improved

    def save(self, *, best: bool = False) -> None:
        """Writes the latest state, and before it the best model if this is it. Raises UserError if that fails."""
        model = self.objective.model
        content = {"model": model.state_dict(), "n_latents": model.n_latents, "settings": self.settings}
        if best:
            found = {"epoch": self.epoch - 1, "validation_loss": self.best}
            checkpoint.save(self.out_dir / checkpoint.BEST, self.experiment, content | found)
        content |= {name: getattr(self, name) for name in ("epoch", "step", "seconds", "best", "history", "sums")}
        content["optimizer"] = self.optimizer.state_dict()
        checkpoint.save(self.out_dir / checkpoint.LATEST, self.experiment, content)

    def report(self, validation: Data, *, best: bool) -> None:
        """Reports the last finished epoch: a line on the terminal, stats.jsonl, TensorBoard."""
        record = self.history[-1]
        terms = record["validation"]["terms"]
        short = {name: listed(name.split("+"), "+") for name in terms}
        elbos = [f"ELBO({short[name]}) {term['elbo']:.2f}" for name, term in terms.items() if term["elbo"] is not None]
        losses = f"loss {record['train']['loss']:.2f}  validation loss {record['validation']['loss']:.2f}"
        speed = f"{record['examples_per_second']:.0f} examples/s"
        parts = [f"epoch {record['epoch']}", f"beta {record['beta']:.3f}", losses + " (best)" * best, *elbos[:7], speed]
        print("  ".join(parts), flush=True)
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
        checkpoint.write_atomically(self.out_dir / "stats.jsonl", lines.encode())

    def _write_tensorboard(self, record: Mapping[str, Any], validation: Data) -> None:
        epoch = record["epoch"]
        self.writer = self.writer or SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=epoch)
        for name, value in _flat({name: value for name, value in record.items() if name != "epoch"}):
            self.writer.add_scalar(name, value, epoch)
        torch.manual_seed(0)
        some, present = validation.batch(torch.arange(min(8, len(validation)), device=validation.device))
        if present is None:
            for name, grid in pictures.reconstructions(self.objective.model, some).items():
                self.writer.add_image(f"reconstruction/{name}", grid, epoch)
        self.writer.flush()


def sums_of(loss: Tensor, totals: Totals, n: int) -> Tensor:
    """One vector of a batch of n examples: its loss times n, n, and the totals; such vectors add up over batches."""
    loss = loss.detach()
    return torch.cat([torch.stack([loss * n, torch.full_like(loss, n)]), *(part.flatten() for part in totals)]).double()


def summary(objective: Objective, sums: Tensor) -> dict[str, Any]:
    """What `sums` of `sums_of` say in nats per example: the loss (with λ and β), and each term's parts.

    "elbo", "kl" and "reconstruction" (log p of each scored modality) have neither λ nor β. Each is a mean over the
    examples that have it, None where none has. Random subsets are summed up as the one term "subset".
    """
    modalities = objective.model.modalities
    loss, n = sums[:2].tolist()
    n_terms = (len(sums) - 2) // (2 * len(modalities) + 2)
    shape = (n_terms, len(modalities))
    parts = sums[2:].cpu().split([n_terms * len(modalities)] * 2 + [n_terms] * 2)
    totals = Totals(parts[0].view(shape), parts[1].view(shape), parts[2], parts[3])
    rows = {term.name: slice(i, i + 1) for i, term in enumerate(objective.terms)}
    if n_terms > len(rows):
        rows["subset"] = slice(len(rows), n_terms)
    terms = {}
    for name, which in rows.items():
        log_prob, kl, n_kl = totals.log_prob[which], totals.kl[which].sum().item(), totals.n_kl[which].sum().item()
        scored = zip(modalities, log_prob.sum(0).tolist(), totals.n_log_prob[which].sum(0).tolist(), strict=True)
        terms[name] = {
            "elbo": (log_prob.sum().item() - kl) / n_kl if n_kl else None,
            "kl": kl / n_kl if n_kl else None,
            "reconstruction": {modality: total / count for modality, total, count in scored if count},
        }
    return {"loss": loss / n, "terms": terms}


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value
