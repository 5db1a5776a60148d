"""What a run reports of its epochs: stats.jsonl, TensorBoard's scalars and pictures, and a line for each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import maps, pictures
from .data import Data
from .errors import UserError
from .files import write_atomically
from .model import MVAE, evaluating

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = Mapping[str, Any]
"""What `fit` records of an epoch; see `mvae.run.RECORD`."""


class Reports:
    """The files in `out_dir` that report a run. They are made of its history, and nothing is read back from them."""

    def __init__(self, model: MVAE, out_dir: Path):
        self.model, self.out_dir = model, out_dir
        self.writer: SummaryWriter | None = None

    def close(self) -> None:
        """Writes out what TensorBoard still holds back."""
        if self.writer:
            self.writer.close()

    def write(self, history: Sequence[Record], validation: Data | None) -> None:
        """Reports the last epoch of `history`, and what a kill or a copy of the folder left out of those before.

        TensorBoard may lack the last epoch, which is reported after it is saved; or all, if its folder isn't there.
        Pictures are of the model as it is, so `validation` is None if that has taken steps since the last epoch.
        Raises UserError if a file can't be written.
        """
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.out_dir / "stats.jsonl", lines.encode())
        last = len(history) if validation is None else len(history) - 1
        if not self.writer and not (self.out_dir / "tensorboard").exists():
            for record in history[:last]:
                self._write_tensorboard(record, None)
        for record in history[last:]:
            self._write_tensorboard(record, validation)

    def _write_tensorboard(self, record: Record, validation: Data | None) -> None:
        """Writes an epoch's numbers, and reconstructions of `validation` by the model as it is. Replaces later epochs.

        Raises UserError if that fails.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run has need of it

        epoch = record["epoch"]
        try:
            self.writer = self.writer or SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=epoch)
            for name, value in record.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, epoch)
            if validation is not None:
                torch.manual_seed(0)
                some, present = validation.batch(torch.arange(min(8, len(validation)), device=validation.device))
                if present is None:
                    for name, grid in pictures.reconstructions(self.model, some).items():
                        self.writer.add_image(f"reconstruction/{name}", grid, epoch)
                    self._write_latents(validation, epoch)
            self.writer.flush()
        except OSError as error:
            raise UserError(f"can't write {self.out_dir / 'tensorboard'}: {error.strerror or error}") from None

    def _write_latents(self, validation: Data, epoch: int) -> None:
        """Writes pictures drawn given each label, and a map of the latents given the first modality."""
        assert self.writer
        model = self.model
        some, _ = validation.batch(torch.arange(min(500, len(validation)), device=validation.device))
        for (label, name), grid in pictures.given_labels(model, some).items():
            self.writer.add_image(f"given_{label}/{name}", grid, epoch)
        first = model.modalities[0]
        with torch.no_grad(), evaluating(model):
            mu, _ = model.posterior({first: some[first]})
        classes = [name for name, x in some.items() if x.dim() == 1 and not x.is_floating_point()]
        of = some[classes[0]].cpu() if classes else torch.zeros(len(mu), dtype=torch.long)
        names = [str(value) for value in range(int(of.max()) + 1)] if classes else []
        picture = maps.draw(maps.pca(mu.cpu().double().numpy()), of.tolist(), names, f"q(z | {first}), epoch {epoch}")
        self.writer.add_image(f"latents/{first}", picture, epoch, dataformats="HWC")


def line(record: Record, names: Sequence[str], *, best: bool) -> str:
    """An epoch in a line, with the ELBOs of the first seven of `names`; `best` says that its model is the best yet."""
    losses = f"loss {record['train/loss']:.2f}  validation loss {record['validation/loss']:.2f}"
    elbos = [
        f"ELBO({name}) {record[f'validation/{name}/elbo']:.2f}"
        for name in names[:7]
        if f"validation/{name}/elbo" in record
    ]
    elbos += ["... (all in stats.jsonl)"] * (len(names) > 7)
    metrics = [
        f"{name.removeprefix('validation/')} {value:.4f}"
        for name, value in record.items()
        if name.startswith("validation/") and name.count("/") == 1 and name != "validation/loss"
    ]
    speed = f"{record['examples_per_second']:.0f} examples/s"
    start = [f"epoch {record['epoch']}", f"beta {record['beta']:.3f}", losses]
    return "  ".join([*start, *elbos, *metrics, speed, *["(best)"] * best])
