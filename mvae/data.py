"""Data sets as tensors by modality on the training device, and the IDX files of the MNIST family."""

import dataclasses
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
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
    """

    tensors: Mapping[str, Tensor]
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    present: Mapping[str, Tensor] | None = None
    streamed_to: torch.device | None = None

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
        present = self.present and {name: self._send(here[rows]) for name, here in self.present.items()}
        return self.transform({name: self._send(tensor[rows]) for name, tensor in self.tensors.items()}), present

    def _send(self, tensor: Tensor) -> Tensor:
        if self.streamed_to is None:
            return tensor
        if self.streamed_to.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy goes on while the device computes
        return tensor.to(self.streamed_to, non_blocking=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Data":
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        present = self.present and {name: change(here) for name, here in self.present.items()}
        return dataclasses.replace(self, tensors=tensors, present=present)

    def to(self, device: torch.device) -> "Data":
        """These examples with batches on `device`: moved there, or streamed if they'd fill half a GPU's free memory."""
        n_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        from_cpu = device.type == "cuda" and self.stored_on.type == "cpu"
        if from_cpu and n_bytes > torch.cuda.mem_get_info(device)[0] / 2:
            return dataclasses.replace(self, streamed_to=device)
        return dataclasses.replace(self._map(lambda tensor: tensor.to(device)), streamed_to=None)

    def __getitem__(self, rows: slice) -> "Data":
        return self._map(lambda tensor: tensor[rows])


def split(data: Data, n_val: int, limit: int | None) -> tuple[Data, Data]:
    """Training and validation data: the last `n_val` examples validate, the first of the rest (`limit` of them) train.

    Raises UsageError if either is left without an example.
    """
    n_train = len(data) - n_val
    if n_val < 1 or n_train < 1:
        raise UsageError(f"--n-val {n_val} doesn't leave examples for both: the training split has {len(data)}")
    return data[: min(n_train, limit or n_train)], data[n_train:]


def seed_of(*numbers: int) -> int:
    """One 63-bit seed for a tuple of non-negative numbers such as (seed, epoch, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


CONTENT_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
"""Checksums of the unpacked files, so that one check serves packed and unpacked ones."""


def load_idx(data_dir: Path, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 28, 28) and labels (N,), both uint8, of `DATA_DIR/name/raw`, as torchvision lays them out.

    Files may be packed (.gz) or not, and the folder read-only; what is absent is downloaded with a progress bar. Every
    file is checked by its checksum: the official one, or that in a `checksums.md5` beside the files.

    Args:
        name: "MNIST" or "FashionMNIST".
        part: "train" or "t10k" (test).

    Raises UserError, naming the file, if it can't be had or is damaged.
    """
    folder = data_dir / name / "raw"
    paths = [folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"]
    absent = [path.name + ".gz" for path in paths if not (path.exists() or path.with_name(path.name + ".gz").exists())]
    if absent:
        _download(folder, name, absent)
    images, labels = (torch.from_numpy(_read_idx(path).copy()) for path in paths)
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} pictures of {part} don't fit {len(labels)} labels")
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    source = packed if packed.exists() else path
    sums = path.with_name("checksums.md5")
    try:
        content = gzip.decompress(packed.read_bytes()) if source == packed else path.read_bytes()
        known = dict(line.split()[::-1] for line in sums.read_text().splitlines()) if sums.exists() else None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{source} can't be read ({error}): delete it to have it downloaded again") from None
    known = CONTENT_MD5[path.parent.parent.name] if known is None else known
    if hashlib.md5(content).hexdigest() != known.get(path.name):
        raise UserError(f"{source} is damaged (its checksum is wrong): delete it to have it downloaded again")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)  # after two zero bytes, the type, the rank
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _download(folder: Path, name: str, files: Sequence[str]) -> None:
    """Fetches an official data set's packed files into `folder`, each checked, then renamed into place."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    official = getattr(datasets, name)
    wanted = f"{', '.join(files)} of {name} are not in {folder}"
    remedy = "put them there, or name the folder that holds them with --data-dir or MVAE_DATA_DIR"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for file in files:
                failure: Exception | None = None
                for mirror in official.mirrors:
                    try:
                        download_url(mirror + file, temporary, md5=dict(official.resources)[file])
                        os.replace(Path(temporary, file), folder / file)
                        break
                    except (URLError, HTTPException, RuntimeError, ConnectionError, TimeoutError) as error:
                        failure = error
                else:
                    raise UserError(f"{wanted} and can't be downloaded ({failure}): {remedy}")
    except OSError as error:
        raise UserError(f"{wanted} and can't be written there ({error.strerror or error}): {remedy}") from None
