"""What a run reports of its epochs: stats.jsonl, TensorBoard's scalars and pictures, and a line for each."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.dataset import Data
from ..errors import UserError
from ..files import write_atomically
from ..model import MVAE, evaluating
from ..progress import duration
from . import grids, maps

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""An epoch: `epoch`, `beta`, `lr`, `seconds`, `examples_per_second`, and numbers named train/... and validation/...
(see `mvae.objective.Totals.means`); null for a metric that isn't finite."""


class Reports:
    """The files in `out_dir` that report a run. They are made from its history; nothing is read back from them."""

    def __init__(self, model: MVAE, out_dir: Path, history: Sequence[Record]):
        """Bring the files up to date with `history`: a kill or a copy of the folder may have left out epochs, and half
        a line. Raises UserError if a file can't be written."""
        self.model, self.stats, self.folder = model, out_dir / "stats.jsonl", out_dir / "tensorboard"
        self.writer: SummaryWriter | None = None
        self.warned: set[str] = set()  # of what can't be drawn
        lines = "".join(json.dumps(record) + "\n" for record in history)
        if not self.stats.exists() or self.stats.read_bytes() != lines.encode():
            write_atomically(self.stats, lines.encode())
        if not self.folder.exists():
            for record in history:
                self._write_tensorboard(record, None)

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self.writer:
            with contextlib.suppress(OSError):  # which `write` has warned of
                self.writer.close()

    def write(self, record: Record, validation: Data) -> None:
        """Report an epoch, with reconstructions of `validation` by the model.

        What fails is warned of, as it must not end the run. Raises UserError if TensorBoard's folder can't be written.
        """
        try:
            with open(self.stats, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._warn(f"can't write {self.stats}, which --resume completes", error.strerror)
        self._write_tensorboard(record, validation)

    def _write_tensorboard(self, record: Record, validation: Data | None) -> None:
        epoch = record["epoch"]
        try:
            self.writer = self.writer or SummaryWriter(str(self.folder), purge_step=epoch)
            for name, value in record.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, epoch)
            if validation is not None and validation.present is None:
                try:
                    self._write_pictures(validation, epoch)
                except OSError:
                    raise
                except Exception as error:  # of networks that compute a loss, but fail here
                    self._warn("TensorBoard lacks pictures of this run", error)
            self.writer.flush()
        except OSError as error:
            if not self.writer:
                raise UserError(f"can't write {self.folder}: {error.strerror or error}") from None
            self._warn(f"can't write {self.folder}", error.strerror or error)

    def _warn(self, what: str, why: object) -> None:
        if what not in self.warned:
            log.warning("%s: %s", what, why)
        self.warned.add(what)

    def _write_pictures(self, validation: Data, epoch: int) -> None:
        """Write reconstructions, pictures conditioned on each label, and a map of the latents given the first modality.

        A map has as many examples as 2^26 values hold, at most 500.
        """
        assert self.writer
        model = self.model
        torch.manual_seed(0)
        some, _ = validation.batch(torch.arange(min(8, len(validation)), device=validation.device))
        for name, grid in grids.reconstructions(model, some).items():
            self.writer.add_image(f"reconstruction/{name}", grid, epoch)
        most = max(8, min(500, 2**26 // sum(x[0].numel() for x in some.values())))
        some, _ = validation.batch(torch.arange(min(most, len(validation)), device=validation.device))
        for (label, name), grid in grids.given_labels(model, some).items():
            self.writer.add_image(f"given_{label}/{name}", grid, epoch)
        first = model.modalities[0]
        with torch.no_grad(), evaluating(model):
            mu, _ = model.fused({first: some[first]})
        classes = [x for x in some.values() if x.dim() == 1 and not x.is_floating_point()]
        values, of = (classes[0] if classes else torch.zeros(len(mu))).cpu().unique(return_inverse=True)
        names = [str(value) for value in values.tolist()] if classes else []
        figure = maps.figure(maps.pca(mu.cpu().double().numpy()), of.tolist(), names, f"q(z | {first}), epoch {epoch}")
        self.writer.add_figure(f"latents/{first}", figure, epoch)


WIDTH = 99  # characters of a line


def line(record: Record, n_epochs: int, names: Sequence[str], *, best: bool) -> str:
    """Return an epoch in a line: its losses, and as many metrics as fit, then the first term's ELBO."""
    epoch = record["epoch"]
    losses = f"loss {record['train/loss']:.2f} (validation {record['validation/loss']:.2f})"
    parts = [f"epoch {epoch}/{n_epochs}", f"β {record['beta']:.2f}", losses]
    left = [f"{duration(record['seconds'] * (n_epochs - epoch))} left"] * (epoch < n_epochs)
    ending = [*left, *["best"] * best]
    metrics = [
        f"{name.removeprefix('validation/')} {'–' if value is None else f'{value:.4f}'}"
        for name, value in record.items()
        if name.startswith("validation/") and name.count("/") == 1 and name != "validation/loss"
    ]
    elbos = [
        f"ELBO({name}) {record[f'validation/{name}/elbo']:.2f}"
        for name in names[:1]
        if f"validation/{name}/elbo" in record
    ]
    for part in [*metrics, *elbos]:
        if len("  ".join([*parts, part, *ending])) <= WIDTH:
            parts.append(part)
    return "  ".join([*parts, *ending])


def progress(
    batches: Sequence[Tensor], title: str, *, done: int, more: int, every: int, loss: Callable[[], float], say: Any
) -> Iterator[Tensor]:
    """Yield the batches that are left, with a progress bar on a terminal and plain lines elsewhere.

    Args:
        done: how many of them are done. more: how many follow them in later epochs.
        every: steps between two lines. loss: returns the mean so far; say: prints a line.
    """
    terminal, n, began = sys.stderr.isatty(), len(batches), time.perf_counter()
    bar = tqdm(batches[done:], title, n, initial=done, leave=False, disable=not terminal)
    for step, rows in enumerate(bar, done + 1):
        yield rows
        if step % every == 0:
            pace = (time.perf_counter() - began) / (step - done)
            left = duration(pace * (n - step + more))
            bar.set_postfix_str(f"loss {loss():.2f}, {left} left")
            if not terminal:
                speed = f"{len(rows) / pace:.0f} examples/s"
                say(f"{title}  step {step}/{n}  loss {loss():.2f}  {speed}  {left} left")
