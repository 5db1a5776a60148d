"""Data sets as tensors by modality, made into batches on the training device."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .errors import UsageError, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """N examples, held as stored and made into a batch of modalities on the device where they are, or on another.

    tensors: each (N, ...), as stored: uint8 pictures, class indices, ...; memory-mapped ones are never read whole.
    transform: from the rows of `tensors` to a batch by modality name. It may draw from torch's global generator.
    present: bool (N,) by modality: which examples have it. Modalities not named are there for all; None: all are.
    streamed_to: the device that each batch's rows are copied to before `transform`; None: they stay where they are.
    pairs: bool (N,): what `composed_rows` counts as pairs, if that isn't all examples that lack nothing.

    Raises UsageError for what isn't a tensor, no examples, numbers of them that differ, or a mask that isn't bool.
    """

    tensors: Mapping[str, Tensor]
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    present: Mapping[str, Tensor] | None = None
    streamed_to: torch.device | None = None
    pairs: Tensor | None = None

    def __post_init__(self) -> None:
        parts = {"tensors": self.tensors, "present": self.present or {}}
        named = {f"{name} of `{part}`": value for part, values in parts.items() for name, value in values.items()}
        named |= {} if self.pairs is None else {"`pairs`": self.pairs}
        for name, value in named.items():
            if not isinstance(value, Tensor):
                remedy = ": torch.from_numpy makes one of it" if type(value).__module__ == "numpy" else ""
                raise UsageError(f"{name} is a {type(value).__name__}, and a torch.Tensor is wanted{remedy}")
            if value.dim() == 0:
                raise UsageError(f"{name} is a single number, and a row for each example is wanted")
        for name, here in (self.present or {}).items():
            if here.dtype != torch.bool or here.dim() != 1:
                found = f"{here.dtype} of shape {tuple(here.shape)}"
                raise UsageError(f"{name} of `present` is {found}, and torch.bool of shape (examples,) is wanted")
        lengths = {name: len(value) for name, value in named.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise UsageError(f"all are to have a row for each example, and {found}")
        if not self.tensors or not len(self):
            raise UsageError("these data have no examples in `tensors`, and one or more are wanted")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def stored_on(self) -> torch.device:
        """Where the tensors are, and the rows that `batch` is asked for."""
        return next(iter(self.tensors.values())).device

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.streamed_to or self.stored_on

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Mapping[str, Tensor] | None]:
        """The examples `rows` (batch,): modalities, and which are present, on `device`."""
        rows = rows.to(self.stored_on)
        present = self.present and {name: self._taken(here, rows) for name, here in self.present.items()}
        return self.transform({name: self._taken(tensor, rows) for name, tensor in self.tensors.items()}), present

    def _taken(self, tensor: Tensor, rows: Tensor) -> Tensor:
        if self.streamed_to is None:
            return tensor[rows]
        # Pinned, so that the copy goes on while the device computes. torch keeps such memory, and hands it out again
        # when the copy from it is done: a run has about two such buffers, and allocates none after the first steps.
        pinned = self.streamed_to.type == "cuda"
        some = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pinned)
        return torch.index_select(tensor, 0, rows, out=some).to(self.streamed_to, non_blocking=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Data":
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        present = self.present and {name: change(here) for name, here in self.present.items()}
        pairs = None if self.pairs is None else change(self.pairs)
        return dataclasses.replace(self, tensors=tensors, present=present, pairs=pairs)

    def to(self, device: torch.device) -> "Data":
        """These examples with batches on `device`: moved there, or streamed if they'd fill half a GPU's free memory."""
        n_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        from_cpu = device.type == "cuda" and self.stored_on.type == "cpu"
        if from_cpu and n_bytes > torch.cuda.mem_get_info(device)[0] / 2:
            return dataclasses.replace(self, streamed_to=device)
        return dataclasses.replace(self._map(lambda tensor: tensor.to(device)), streamed_to=None)

    def __getitem__(self, rows: slice | Tensor) -> "Data":
        """Some of the examples: `data[:900]`, or those at the places that a tensor holds."""
        if not isinstance(rows, slice | Tensor):
            raise UsageError(f"examples are taken by a slice such as [:900] or by a tensor, not by {rows!r}")
        return self._map(lambda tensor: tensor[rows])

    def extremes(self) -> Tensor:
        """The examples (n,) with the smallest and the largest stored value of each tensor, of those that are present.

        A value that isn't a number counts as both. Where these are good, the others are, if `transform` keeps an order.
        """
        found = []
        for name, tensor in self.tensors.items():
            here = (self.present or {}).get(name)
            rows = torch.arange(len(self), device=self.stored_on) if here is None else here.nonzero().flatten()
            if len(rows) and tensor[0].numel() and not tensor.is_complex():
                parts = rows.split(512)
                wide = tensor.dtype in (torch.uint16, torch.uint32)  # torch has no aminmax of these
                some = (tensor[part].long() if wide else tensor[part] for part in parts)
                ends = torch.stack([torch.stack(values.aminmax()) for values in some]).double()  # (parts, 2)
                for end, pick in zip(ends.unbind(dim=1), (torch.argmin, torch.argmax), strict=True):
                    part = parts[int(pick(end))]
                    values = tensor[part].double().flatten()
                    found.append(part[pick(values) * len(part) // len(values)])
        return torch.stack(found).unique() if found else torch.arange(0, device=self.stored_on)

    def checksum(self) -> str:
        """A CRC-32 of all that is stored: names, types, shapes and every value of `tensors`, `present` and `pairs`."""
        found, pairs = 0, {} if self.pairs is None else {"pairs": self.pairs}
        for name, tensor in [*self.tensors.items(), *(self.present or {}).items(), *pairs.items()]:
            found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
            for part in tensor.split(4096):  # mapped files are read part by part
                found = zlib.crc32(part.contiguous().cpu().flatten().view(torch.uint8).numpy(), found)
        return f"{found:08x}"


def split(data: Data, n_val: int, limit: int | None) -> tuple[Data, Data]:
    """Training and validation data: the last `n_val` examples validate, the first of the rest (`limit` of them) train.

    Raises UsageError if either is left without an example.
    """
    n_train = len(data) - n_val
    if n_val < 1 or n_train < 1:
        raise UsageError(f"`n_val` {n_val} doesn't leave examples for both: the training split has {len(data)}")
    return data[: min(n_train, limit or n_train)], data[n_train:]


def seed_of(*numbers: int) -> int:
    """One 63-bit seed for a tuple of whole numbers such as (seed, epoch, step, rank), unlike every other tuple's."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permuted_rows(data: Data, batch_size: int, seed: int) -> list[Tensor]:
    """The rows of an epoch's batches, in an order that `seed` decides, where the data's tensors are.

    The incomplete last batch is dropped, so that a step's shapes stay the same and batch norm never meets one example;
    another epoch's permutation drops others.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.stored_on)
    size = min(batch_size, len(data))
    return list(order[: len(data) // size * size].split(size))


def consecutive_rows(data: Data, batch_size: int) -> list[Tensor]:
    """The rows of all examples in their own order, where the data's tensors are, the incomplete last batch included."""
    return list(torch.arange(len(data), device=data.stored_on).split(batch_size))


def pictures_and_labels(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `transform`: stored pictures (batch, channels, height, width) become floats in [0, 1], labels int64."""
    return {name: tensor.float() / 255 if tensor.dim() == 4 else tensor.long() for name, tensor in rows.items()}


def binarize(data: Data, name: str) -> Data:
    """Draws each value of modality `name` from Bernoulli(grey value), afresh for every batch."""

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = data.transform(rows)
        return {**batch, name: batch[name].bernoulli()}

    return dataclasses.replace(data, transform=transform)


def binarize_once(data: Data, name: str) -> Data:
    """Draws each value of the stored uint8 pictures `name` from Bernoulli(grey value), once, by a fixed seed."""
    grey = data.tensors[name].float() / 255
    drawn = grey.bernoulli(generator=torch.Generator().manual_seed(0)).mul(255).byte()
    return dataclasses.replace(data, tensors={**data.tensors, name: drawn})


def random_example(data: Data, where: Tensor, what: str) -> dict[str, Tensor]:
    """A batch of one of the examples that `where`, bool (N,), allows. Raises UserError, naming `what`, for none."""
    rows = where.nonzero().flatten()
    if not len(rows):
        raise UserError(f"none of the {len(data)} held-out examples shows {what}")
    return data.batch(rows[torch.randint(len(rows), (1,))])[0]
