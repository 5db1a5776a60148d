"""The MNIST family: pictures (1, 28, 28) in [0, 1] as `image` and classes 0 to 9 as `text`, from IDX files."""

import gzip
import hashlib
import io
import math
import shutil
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import write_atomically
from .dataset import Data, binarize_once, pictures_and_labels, split
from .dataset import binarize as binarize_each_time

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
"""Checksums of the unpacked files, which serve packed and unpacked ones."""

MIRRORS = {
    "MNIST": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    "FashionMNIST": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}


def training_data(
    name: str, data_dir: Path, *, n_val: int, limit: int | None = None, binarize: bool = False
) -> tuple[Data, Data]:
    """Return training and validation examples from the training split of the data set `name`; see `load_idx`.

    With `binarize`, each pixel is drawn from Bernoulli(grey value): for training at every step, for validation once.
    Raises UserError if a file is damaged, or absent and can't be downloaded.
    """
    train, validation = split(_data(name, data_dir, "train"), n_val, limit)
    if binarize:
        return binarize_each_time(train, "image"), binarize_once(validation, "image")
    return train, validation


def test_data(name: str, data_dir: Path, *, binarize: bool = False) -> Data:
    """Return the test split; with `binarize`, it is drawn once. Raises UserError as `training_data` does."""
    test = _data(name, data_dir, "t10k")
    return binarize_once(test, "image") if binarize else test


def check(name: str, data_dir: Path) -> str:
    """Return a line with the number of examples. Raises UserError as `training_data` does."""
    train, test = (len(_data(name, data_dir, part)) for part in ("train", "t10k"))
    return f"{name} in {data_dir} is complete: {train} training and {test} test examples"


def _data(name: str, data_dir: Path, part: str) -> Data:
    images, labels = load_idx(data_dir, name, part)
    return Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=pictures_and_labels)


def load_idx(data_dir: Path, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 28, 28) and labels (N,) from 0 to 9, both uint8, of `DATA_DIR/name/raw` or `DATA_DIR/name`.

    The files have torchvision's names or Kaggle's (`train-images.idx3-ubyte`), packed (.gz) or not, and the folder may
    be read-only. Absent files are downloaded with a progress bar. Every file is checked by its official checksum, or by
    the folder's `checksums.md5` (lines `MD5 NAME`). If there are several copies, an intact one is read.

    Args:
        name: "MNIST" or "FashionMNIST".
        part: "train" or "t10k" (test).

    Raises UserError if a file is absent and can't be downloaded, is damaged, or doesn't fit the networks.
    """
    folder = data_dir / name / "raw"
    stems = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    for stem in stems:
        if not _candidates(folder, stem):
            _download(folder, name, stem)
    images, labels = (_first_good(_candidates(folder, stem), name, stem) for stem in stems)
    if not len(images) or len(images) != len(labels):
        raise UserError(f"{folder}: {part} has {len(images)} pictures and {len(labels)} labels")
    return images, labels


def _candidates(folder: Path, stem: str) -> list[Path]:
    """Return the existing files that may be meant, by either name; Kaggle puts them in folders of the same name."""
    names = [stem, stem.replace("-idx", ".idx")]
    files = [file for name in names for file in (f"{name}.gz", name, f"{name}/{name}")]
    return [home / file for home in (folder, folder.parent) for file in files if (home / file).is_file()]


def _first_good(paths: Sequence[Path], name: str, stem: str) -> Tensor:
    errors = []
    for path in paths:
        try:
            return _read_idx(path, name, stem)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _read_idx(path: Path, name: str, stem: str) -> Tensor:
    """Return pictures (N, 28, 28) or labels (N,), as `stem` says. Raises UserError as `load_idx` does."""
    remedy = "delete it to download it again"
    try:
        stored = path.read_bytes()
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        raise UserError(f"{path} can't be unpacked ({error}): {remedy}") from None
    # An IDX file: two zero bytes, the values' type (8: bytes), the rank, each dimension in four bytes, the values.
    rank = content[3] if len(content) > 3 else 0
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist()) if len(content) >= 4 + 4 * rank else ()
    if content[:2] != b"\0\0" or not shape:
        raise UserError(f"{path} is not an IDX file, or damaged: {remedy}")
    if content[2] != 8:
        raise UserError(f"{path}: values must be bytes (type 0x8), found type {content[2]:#x}")
    if len(content) != 4 + 4 * rank + math.prod(shape):
        raise UserError(f"{path} is damaged: its size doesn't match its shape {shape}; {remedy}")
    event = (28, 28) if "images" in stem else ()
    if len(shape) != 1 + len(event) or shape[1:] != event:
        raise UserError(f"{path}: shape must be {'(N, 28, 28)' if event else '(N,)'}, found {shape}")
    values = torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
    if not event and (values > 9).any():
        raise UserError(f"{path}: labels must be from 0 to 9, found {values.max()}")
    sums = path.with_name("checksums.md5")
    known = _checksums(sums) if sums.exists() else {stem: CONTENT_MD5[name][stem]}
    if known.get(stem) == hashlib.md5(content).hexdigest() or known.get(path.name) == hashlib.md5(stored).hexdigest():
        return values
    if sums.exists():
        raise UserError(f"{path} is damaged: its checksum is not in {sums}; {remedy}")
    own = f"for your own data set, write its checksums into {sums}"
    raise UserError(f"{path} is damaged, or not {name}: its checksum is wrong; {remedy}; {own}")


def _checksums(path: Path) -> dict[str, str]:
    """Return the checksums by file name, as the command md5sum writes them."""
    try:
        lines = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    for number, words in enumerate(lines, 1):
        if len(words) != 2 or len(words[0]) != 32:
            raise UserError(f"{path}, line {number}: must be 'MD5 NAME', as the command md5sum writes it")
    return {Path(name.lstrip("*")).name: digest.lower() for digest, name in lines}


def _download(folder: Path, name: str, stem: str) -> None:
    """Download an official packed file into `folder`, from the first mirror that has it intact."""
    path = folder / f"{stem}.gz"
    for mirror in MIRRORS[name]:
        content = io.BytesIO()
        try:
            with (
                urlopen(mirror + path.name, timeout=60) as response,
                tqdm.wrapattr(response, "read", response.length, desc=path.name, leave=False, disable=None) as stream,
            ):
                shutil.copyfileobj(stream, content)
            if hashlib.md5(gzip.decompress(content.getvalue())).hexdigest() != CONTENT_MD5[name][stem]:
                raise OSError("its checksum is wrong")
            return write_atomically(path, content.getvalue())
        except (OSError, EOFError, zlib.error, HTTPException) as error:
            reason = getattr(error, "reason", error)  # of a URLError, in plain words
    raise UserError(f"no {path}, and it can't be downloaded ({reason}): put it there, or set --data-dir")
