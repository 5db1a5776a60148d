"""The MNIST family: pictures (1, 28, 28) in [0, 1] as `image` and classes 0 to 9 as `text`, from IDX files."""

import gzip
import hashlib
import logging
import math
import struct
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_atomically
from .dataset import Data, DataDir, binarize_once, pictures_and_labels, split
from .dataset import binarize as binarize_each_time

log = logging.getLogger(__name__)

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


def examples(name: str, split: str, config: DataDir, settings: Mapping[str, Any]) -> Data:
    """Return the split "train", "validation" or "test" as a model with these settings uses it."""
    if split == "test":
        return test_data(name, config.data_dir, binarize=settings["binarize"])
    parts = training_data(name, config.data_dir, n_val=settings["n_val"], binarize=settings["binarize"])
    return parts[split == "validation"]


def check(name: str, data_dir: Path) -> str:
    """Return a line with the number of examples. Raises UserError as `training_data` does."""
    train, test = (len(_data(name, data_dir, part)) for part in ("train", "t10k"))
    return f"{name} in {data_dir} is complete: {train} training and {test} test examples"


def _data(name: str, data_dir: Path, part: str) -> Data:
    images, labels = load_idx(data_dir, name, part)
    return Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=pictures_and_labels)


def load_idx(data_dir: Path, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 28, 28) and labels (N,) from 0 to 9, both uint8, of the part "train" or "t10k" (test).

    The files are in `DATA_DIR/name/raw` or `DATA_DIR/name`, where the name is "MNIST" or "FashionMNIST". They have
    torchvision's names or Kaggle's (`train-images.idx3-ubyte`), packed (.gz) or not, and the folder may be read-only.
    Absent files are downloaded. Each is checked by its official checksum, or by the folder's `checksums.md5`.

    Raises UserError if a file is absent and can't be downloaded, is damaged, or doesn't fit the networks.
    """
    images = _load(data_dir, name, f"{part}-images-idx3-ubyte", (28, 28))
    labels = _load(data_dir, name, f"{part}-labels-idx1-ubyte", ())
    if not len(images) or len(images) != len(labels) or (labels > 9).any():
        found = f"{len(images)} pictures and {len(labels)} labels up to {labels.max() if len(labels) else 0}"
        raise UserError(f"{data_dir / name}: {part} must have a label from 0 to 9 per picture, found {found}")
    return images, labels


def _load(data_dir: Path, name: str, stem: str, shape: tuple[int, ...]) -> Tensor:
    """Return the values of one file, (N, *shape). Raises UserError as `load_idx` does."""
    raw = data_dir / name / "raw"
    files = [file for one in (stem, stem.replace("-idx", ".idx")) for file in (f"{one}.gz", one)]
    paths = [folder / file for folder in (raw, raw.parent) for file in files]
    path = next(filter(Path.is_file, paths), None) or _download(raw, name, stem)
    stored = path.read_bytes()
    content = _unpacked(stored)
    sums = path.with_name("checksums.md5")
    known = sums.read_text(errors="replace").lower() if sums.exists() else CONTENT_MD5[name][stem]
    if not any(hashlib.md5(some).hexdigest() in known for some in (stored, content)):
        remedy = "replace it" if sums.exists() else "delete it to download it again"
        own = f"for your own data set, write its checksums into {sums}"
        raise UserError(f"{path} is damaged, or not {name}: its checksum is wrong; {remedy}; {own}")
    # An IDX file: two zero bytes, the values' type (8: bytes), the rank, each dimension in four bytes, the values.
    n = int.from_bytes(content[4:8], "big")
    header = struct.pack(f">{2 + len(shape)}I", 0x801 + len(shape), n, *shape)
    if not content.startswith(header) or len(content) != len(header) + n * math.prod(shape):
        raise UserError(f"{path} must be an IDX file of bytes of shape {('N', *shape)}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).reshape(n, *shape).copy())


def _unpacked(stored: bytes) -> bytes:
    """Return the content of a file that may be packed; nothing if it is damaged."""
    try:
        return gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error):
        return b""


def _download(folder: Path, name: str, stem: str) -> Path:
    """Download an official packed file into `folder`, from the first mirror that has it intact, and return its path."""
    path = folder / f"{stem}.gz"
    for mirror in MIRRORS[name]:
        log.info("downloading %s%s", mirror, path.name)
        try:
            with urlopen(mirror + path.name, timeout=60) as response:
                stored = response.read()
            if hashlib.md5(_unpacked(stored)).hexdigest() != CONTENT_MD5[name][stem]:
                raise OSError("its checksum is wrong")
            write_atomically(path, stored)
            return path
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)  # of a URLError, in plain words
    raise UserError(f"no {path}, and it can't be downloaded ({reason}): put it there, or set --data-dir")
