"""The MNIST family: pictures (1, 28, 28) in [0, 1] as `image`, and classes 0 to 9 as `text`, of IDX files.

Like all of mvae.datasets, it imports torch where it makes tensors, so that scripts read their flags without torch.
"""

import gzip
import hashlib
import math
import os
import tempfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np

from ..errors import UserError
from ..files import made

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Data

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

IDX_BYTES = {0x08: 1, 0x09: 1, 0x0B: 2, 0x0C: 4, 0x0D: 4, 0x0E: 8}
"""The size of a value of each type that an IDX file may have."""


def training_data(
    name: str, data_dir: Path, *, n_val: int, limit: int | None = None, binarize: bool = False
) -> tuple["Data", "Data"]:
    """Training and validation examples, of the training split of the set `name`; see `load_idx`.

    With `binarize`, each pixel is drawn from Bernoulli(grey value): for training afresh at every step, for validation
    once. Raises UserError if the files can't be had or are damaged.
    """
    from ..data import binarize as binarize_afresh
    from ..data import binarize_once, split

    train, validation = split(_data(name, data_dir, "train"), n_val, limit)
    if binarize:
        return binarize_afresh(train, "image"), binarize_once(validation, "image")
    return train, validation


def test_data(name: str, data_dir: Path, *, binarize: bool = False) -> "Data":
    """The test split; with `binarize`, drawn once with a fixed seed. Raises UserError as `training_data` does."""
    from ..data import binarize_once

    test = _data(name, data_dir, "t10k")
    return binarize_once(test, "image") if binarize else test


def check(name: str, data_dir: Path) -> str:
    """A line that says how many examples there are. Raises UserError as `training_data` does."""
    train, test = (len(_data(name, data_dir, part)) for part in ("train", "t10k"))
    return f"{name} in {data_dir} is complete: {train} training and {test} test examples"


def _data(name: str, data_dir: Path, part: str) -> "Data":
    from ..data import Data, pictures_and_labels

    images, labels = load_idx(data_dir, name, part)
    return Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=pictures_and_labels)


def load_idx(data_dir: Path, name: str, part: str) -> tuple["Tensor", "Tensor"]:
    """Pictures (N, 28, 28) and labels (N,) from 0 to 9, both uint8, of `DATA_DIR/name/raw` or `DATA_DIR/name`.

    The files have torchvision's names or Kaggle's (`train-images.idx3-ubyte`) and may be packed (.gz) or not, and the
    folder read-only; what is absent is downloaded with a progress bar. Every file is checked by its checksum: the
    official one, or that in a `checksums.md5` beside the files (lines `MD5 NAME`). Of several a good one is read.

    Args:
        name: "MNIST" or "FashionMNIST".
        part: "train" or "t10k" (test).

    Raises UserError, naming the file, if it can't be had, is damaged, or holds what the networks don't take.
    """
    import torch

    folder = data_dir / name / "raw"
    stems = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    absent = [stem + ".gz" for stem in stems if not _candidates(folder, stem)]
    if absent:
        _download(folder, name, absent)
    found = [_first_good(_candidates(folder, stem), name, stem) for stem in stems]
    for _, complaint in found:  # not before both are read: what the networks don't take is better known
        if complaint:
            raise UserError(complaint)
    images, labels = (torch.from_numpy(values.copy()) for values, _ in found)
    if not len(images) or len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} pictures of {part} don't fit {len(labels)} labels")
    return images, labels


def _candidates(folder: Path, stem: str) -> list[Path]:
    """The files that may be meant: packed or not, by either name; Kaggle has them in folders of the same name, too."""
    names = [stem, stem.replace("-idx", ".idx")]
    files = [file for name in names for file in (f"{name}.gz", name, f"{name}/{name}")]
    return [home / file for home in (folder, folder.parent) for file in files if (home / file).is_file()]


def _first_good(paths: Sequence[Path], name: str, stem: str) -> tuple[np.ndarray, str]:
    """What `_read_idx` gives of the first file without a complaint, else of the first that can be read."""
    found, errors = [], []
    for path in paths:
        try:
            found.append(_read_idx(path, name, stem))
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return min(found, key=lambda pair: pair[1] != "")


def _read_idx(path: Path, name: str, stem: str) -> tuple[np.ndarray, str]:
    """Pictures (N, 28, 28) or labels (N,), as `stem` says; and what is wrong if their checksum isn't right, else "".

    Raises UserError if the file is damaged, or holds what the networks don't take.
    """
    remedy = "delete it to have it downloaded again"
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
    if content[:2] != b"\0\0" or not shape or content[2] not in IDX_BYTES:
        raise UserError(f"{path} is no IDX file, or a damaged one: {remedy}")
    if len(content) != 4 + 4 * rank + IDX_BYTES[content[2]] * math.prod(shape):
        raise UserError(f"{path} is damaged: its size isn't that of the {shape} values which it begins with; {remedy}")
    event = (28, 28) if "images" in stem else ()
    if content[2] != 8 or len(shape) != 1 + len(event) or shape[1:] != event:
        takes = f"the networks take {'pictures of 28x28' if event else 'one label for each picture'}, in bytes"
        raise UserError(f"{path} holds values of type {content[2]:#x} and shape {shape}, and {takes}")
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    if not event and values.max(initial=0) > 9:
        raise UserError(f"{path} holds labels up to {values.max()}, and the networks take ten classes, 0 to 9")
    sums = path.with_name("checksums.md5")
    known = _checksums(sums) if sums.exists() else {stem: CONTENT_MD5[name][stem]}
    if known.get(stem) == hashlib.md5(content).hexdigest() or known.get(path.name) == hashlib.md5(stored).hexdigest():
        return values, ""
    if sums.exists():
        return values, f"{path} is damaged: its checksum isn't in {sums}; {remedy}"
    own = f"for a set of your own write its checksums into {sums}"
    return values, f"{path} is damaged, or isn't that of {name}, by its checksum: {remedy}; {own}"


def _checksums(path: Path) -> dict[str, str]:
    """The checksums by the files' names, as the command md5sum writes them."""
    try:
        lines = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    wrong = [number for number, words in enumerate(lines, 1) if len(words) != 2 or len(words[0]) != 32]
    if wrong:
        raise UserError(f"{path}, line {wrong[0]}: 'MD5 NAME' is wanted, as the command md5sum writes it")
    return {Path(words[1].lstrip("*")).name: words[0].lower() for words in lines}


def _download(folder: Path, name: str, files: Sequence[str]) -> None:
    """Fetches an official data set's packed files into `folder`, each checked, then renamed into place."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    official = getattr(datasets, name)
    wanted = f"{', '.join(files)} of {name} are not in {folder}"
    remedy = "put them there, or name the folder that holds them with `data_dir` or MVAE_DATA_DIR"
    try:
        with made(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
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
                    why = getattr(failure, "reason", failure)  # of a URLError, in plain words
                    raise UserError(f"{wanted} and can't be downloaded ({why}): {remedy}")
    except OSError as error:
        raise UserError(f"{wanted} and can't be written there ({error.strerror or error}): {remedy}") from None
