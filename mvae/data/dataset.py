"""Data sets as tensors by modality, made into batches on the training device."""

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UsageError, UserError
from ..model import check_rows

SAMPLED = 2**30
"""Size in bytes above which only a sample is checked at a start: of a tensor's rows, or of a cache file's blocks."""


@dataclasses.dataclass(kw_only=True)
class DataDir:
    """The flag of every script that reads a data set."""

    # Data
    data_dir: Path = Path(os.environ.get("MVAE_DATA_DIR") or "data")  # folder of the data sets (or set MVAE_DATA_DIR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """N examples, kept as stored, which `batch` turns into modalities on the training device.

    tensors: each (N, ...), as stored: uint8 pictures, class indices, ...; memory-mapped ones are never read whole.
    transform: from rows of `tensors` to a batch by modality name. It may draw from torch's global generator.
    present: bool (N,) by modality, which examples have it; modalities not named are complete, None if all are.
    streamed_to: device that the rows of each batch are copied to before `transform`; None if the tensors are there.
    pairs: bool (N,), the examples that `composed_rows` counts as pairs; None for those that lack nothing.

    Raises UsageError if the tensors differ in length, are empty or aren't tensors, or a mask isn't bool.
    """

    tensors: Mapping[str, Tensor]
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    present: Mapping[str, Tensor] | None = None
    streamed_to: torch.device | None = None
    pairs: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping):
            found = type(self.tensors).__name__
            raise UsageError(f"tensors must be a dict by modality, got a {found}; see Data.from_dataset for a Dataset")
        for name, x in self.tensors.items():
            check_rows(f"tensors[{name!r}]", x)
        lengths = {name: len(x) for name, x in self.tensors.items()}
        if len(set(lengths.values())) != 1 or not len(self):
            raise UsageError(f"tensors must have the same number of examples, at least 1, got {lengths}")
        for mask in [*(self.present or {}).values(), *([] if self.pairs is None else [self.pairs])]:
            check_rows("presence and pairs", mask)
            if mask.dtype != torch.bool or mask.shape != (len(self),):
                found = f"{mask.dtype} of shape {tuple(mask.shape)}"
                raise UsageError(f"presence and pairs must be torch.bool of shape ({len(self)},), got {found}")

    @classmethod
    def from_dataset(cls, dataset: Dataset, names: Sequence[str]) -> "Data":
        """Read a torch Dataset into memory. Its examples are tuples of a tensor or number for each of `names`."""
        try:
            columns = zip(*(dataset[i] for i in range(len(dataset))), strict=True)  # type: ignore[arg-type]
            tensors = {name: torch.stack([*map(torch.as_tensor, x)]) for name, x in zip(names, columns, strict=True)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"a Dataset's examples must be tuples of {len(names)} tensors or numbers: {error}"
            ) from None
        return cls(tensors=tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def stored_on(self) -> torch.device:
        """The device of the stored tensors, and of the rows that `batch` takes."""
        return next(iter(self.tensors.values())).device

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.streamed_to or self.stored_on

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Mapping[str, Tensor] | None]:
        """Return the modalities of the examples `rows` (batch,), and which are present, both on `device`."""
        rows = rows.to(self.stored_on)
        present = self.present and {name: self._taken(here, rows) for name, here in self.present.items()}
        return self.transform({name: self._taken(tensor, rows) for name, tensor in self.tensors.items()}), present

    def _taken(self, tensor: Tensor, rows: Tensor) -> Tensor:
        if self.streamed_to is None:
            return tensor.index_select(0, rows)  # 10 to 30 times as fast as tensor[rows] on a CPU
        # Pinned memory lets the copy overlap with computation. torch caches such buffers until their copy is done: a
        # run has about two, and allocates none after the first steps.
        pinned = self.streamed_to.type == "cuda"
        some = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pinned)
        return torch.index_select(tensor, 0, rows, out=some).to(self.streamed_to, non_blocking=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Data":
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        present = self.present and {name: change(here) for name, here in self.present.items()}
        pairs = None if self.pairs is None else change(self.pairs)
        return dataclasses.replace(self, tensors=tensors, present=present, pairs=pairs)

    def to(self, device: torch.device) -> "Data":
        """Move the examples to `device`, or stream their batches there if they exceed half of a GPU's free memory."""
        n_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        from_cpu = device.type == "cuda" and self.stored_on.type == "cpu"
        if from_cpu and n_bytes > torch.cuda.mem_get_info(device)[0] / 2:
            return dataclasses.replace(self, streamed_to=device)
        return dataclasses.replace(self._map(lambda tensor: tensor.to(device)), streamed_to=None)

    def __getitem__(self, rows: slice | Tensor) -> "Data":
        """Return some of the examples, by a slice such as `data[:900]` or a tensor of indices."""
        return self._map(lambda tensor: tensor[rows])

    def only(self, *names: str) -> "Data":
        """Return the same examples with only these modalities present; each keeps its own mask."""
        every = torch.ones(len(self), dtype=torch.bool, device=self.stored_on)
        others = [name for name in self.batch(torch.tensor([0]))[0] if name not in names]
        present = {name: (self.present or {}).get(name, every) for name in names} | dict.fromkeys(others, ~every)
        return dataclasses.replace(self, present=present, pairs=None)

    def extremes(self) -> Tensor:
        """Return the rows (n,) of the smallest and largest present value of each tensor; NaN counts as both.

        If these examples are valid, so are all others, provided that `transform` is monotonic. See also `SAMPLED`.
        """
        found = []
        for name, tensor in self.tensors.items():
            here = (self.present or {}).get(name)
            rows = torch.arange(len(self), device=self.stored_on) if here is None else here.nonzero().flatten()
            if len(rows) and tensor[0].numel() and not tensor.is_complex():
                wide = tensor.dtype in (torch.uint16, torch.uint32)  # torch has no amin of these
                some = _sampled(rows, 512, tensor)
                rows, parts = torch.cat(some), (tensor.index_select(0, part).reshape(len(part), -1) for part in some)
                ends = [torch.stack([(x := part.long() if wide else part).amin(1), x.amax(1)]) for part in parts]
                low, high = torch.cat(ends, dim=1).double()
                found += [rows[low.argmin()], rows[high.argmax()]]
        return torch.stack(found).unique() if found else torch.arange(0, device=self.stored_on)

    def checksum(self) -> str:
        """Return a CRC-32 of the names, types, shapes and values of all tensors and masks; see also `SAMPLED`."""
        found, pairs = 0, {} if self.pairs is None else {"pairs": self.pairs}
        for name, tensor in [*self.tensors.items(), *(self.present or {}).items(), *pairs.items()]:
            found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
            for part in _sampled(tensor, 4096, tensor):  # mapped files are read part by part
                found = zlib.crc32(part.contiguous().cpu().flatten().view(torch.uint8).numpy().data, found)
        return f"{found:08x}"


def _sampled(rows: Tensor, size: int, tensor: Tensor) -> list[Tensor]:
    """Split `rows` into parts, and leave out all but every second, third, ... if the tensor exceeds `SAMPLED`."""
    return list(rows.split(size)[:: 1 + tensor.nbytes // SAMPLED])


def split(data: Data, n_val: int, limit: int | None) -> tuple[Data, Data]:
    """Return training and validation data: the last `n_val` examples validate, the first `limit` of the rest train.

    Raises UsageError if one of them would be empty.
    """
    n_train = len(data) - n_val
    if n_val < 1 or n_train < 1:
        raise UsageError(f"n_val must be from 1 to {len(data) - 1}, below the number of examples, got {n_val}")
    return data[: min(n_train, limit or n_train)], data[n_train:]


def seed_of(*numbers: int) -> int:
    """Return one 63-bit seed for a tuple of integers such as (seed, epoch, step, rank), different for each tuple."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permuted_rows(data: Data, batch_size: int, seed: int) -> list[Tensor]:
    """Return the rows of an epoch's batches in random order, on the device of the stored tensors.

    The incomplete last batch is dropped, so that a step's shapes stay the same and batch norm never meets one example;
    another epoch's permutation drops others.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.stored_on)
    size = min(batch_size, len(data))
    return list(order[: len(data) // size * size].split(size))


def consecutive_rows(data: Data, batch_size: int) -> list[Tensor]:
    """Return the rows of all examples in order, on the device of the stored tensors; the last batch may be smaller."""
    return list(torch.arange(len(data), device=data.stored_on).split(batch_size))


def pictures_and_labels(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert stored pictures (batch, channels, height, width) to floats in [0, 1], and labels to int64."""
    return {name: tensor.float() / 255 if tensor.dim() == 4 else tensor.long() for name, tensor in rows.items()}


def binarize(data: Data, name: str) -> Data:
    """Draw each value of modality `name` from Bernoulli(grey value), again for every batch."""

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = data.transform(rows)
        return {**batch, name: batch[name].bernoulli()}

    return dataclasses.replace(data, transform=transform)


def binarize_once(data: Data, name: str) -> Data:
    """Draw each value of the stored uint8 pictures `name` from Bernoulli(grey value), once, with a fixed seed."""
    grey = data.tensors[name].float() / 255
    drawn = grey.bernoulli(generator=torch.Generator().manual_seed(0)).mul(255).byte()
    return dataclasses.replace(data, tensors={**data.tensors, name: drawn})


def random_example(data: Data, where: Tensor, what: str) -> dict[str, Tensor]:
    """Return a batch of one random example where `where`, bool (N,), is True. Raises UserError if it never is."""
    rows = where.nonzero().flatten()
    if not len(rows):
        raise UserError(f"none of the {len(data)} held-out examples shows {what}")
    return data.batch(rows[torch.randint(len(rows), (1,))])[0]
