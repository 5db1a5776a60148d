"""The MNIST family: pictures (1, 28, 28) in [0, 1] as `image`, and classes 0 to 9 as `text`, of IDX files.

Like all of mvae.datasets, it imports torch where it makes tensors, so that scripts read their flags without torch.
"""

import gzip
import hashlib
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
    """Pictures (N, 28, 28) and labels (N,), both uint8, of `DATA_DIR/name/raw`, as torchvision lays them out.

    Files may be packed (.gz) or not, and the folder read-only; what is absent is downloaded with a progress bar. Every
    file is checked by its checksum: the official one, or that in a `checksums.md5` beside the files.

    Args:
        name: "MNIST" or "FashionMNIST".
        part: "train" or "t10k" (test).

    Raises UserError, naming the file, if it can't be had or is damaged.
    """
    import torch

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
                    raise UserError(f"{wanted} and can't be downloaded ({failure}): {remedy}")
    except OSError as error:
        raise UserError(f"{wanted} and can't be written there ({error.strerror or error}): {remedy}") from None
