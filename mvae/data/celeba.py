"""CelebA on disk: pictures, lists and the official split, as `Data` of 64x64 pictures and 18 attributes."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .cache import CacheDir, decoded, listing
from .dataset import Data

log = logging.getLogger(__name__)

ATTRIBUTES = (
    "Bald",
    "Bangs",
    "Black_Hair",
    "Blond_Hair",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Eyeglasses",
    "Gray_Hair",
    "Heavy_Makeup",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Pale_Skin",
    "Receding_Hairline",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Hat",
)
"""The 18 of the 40 attributes that Wu & Goodman (2018) use, in the order of the list's columns."""

SPLITS = ("train", "validation", "test")  # 0, 1 and 2 of the official partition

FOLDERS = ("", "celeba", "CelebA")
IMAGES = (
    "img_align_celeba/img_align_celeba",
    "Img/img_align_celeba",
    "img_align_celeba",
    "img_align_celeba_png",
    "Img/img_align_celeba_png",
    "Img/img_align_celeba.zip",
    "img_align_celeba.zip",
)
ATTRIBUTE_LIST = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION_LIST = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")
"""Where they may be in `FOLDERS`: the official download's layout, torchvision's and Kaggle's."""


@dataclasses.dataclass(kw_only=True)
class Source(CacheDir):
    """The flags of every script that reads CelebA."""

    # Pictures
    allow_missing: bool = False  # use the images that exist, if the lists name more; a model's scripts follow its run


def pictures_and_attributes(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert `image` to floats in [0, 1] and `attrs` (batch, 18) to floats 0 and 1: a `transform` of Data."""
    return {"image": rows["image"].float() / 255, "attrs": rows["attrs"].float()}


def training_data(config: Source, *, limit: int | None = None) -> tuple[Data, Data]:
    """Return the official training split (the first `limit` of it) and the official validation split.

    Both hold `image` (N, 3, 64, 64), memory-mapped, and `attrs` (N, 18) in {0, 1} by `ATTRIBUTES`, all uint8.

    Raises UserError if a file is missing, damaged or doesn't fit the others.
    """
    train, validation, _ = _splits(config)
    return train[:limit], validation


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the official split "train", "validation" or "test". Raises UserError as `training_data` does.

    If the run with these settings allowed missing images, so does this.
    """
    return _splits(config, settings.get("allow_missing", False))[SPLITS.index(split)]


def prepare(config: Source) -> None:
    """Decode the images, and print how many there are. Raises UserError as `training_data` does."""
    counts = ", ".join(f"{name} {len(data)}" for name, data in zip(SPLITS, _splits(config), strict=True))
    print(f"CelebA in {config.data_dir}: {counts} images, decoded in {config.cache_dir}")


def _splits(config: Source, allow_missing: bool = False) -> list[Data]:
    """Return the data of each of `SPLITS`, in the order of the lists: slices of one file of decoded pictures.

    An image 000001.jpg of the lists may be 000001.png. Missing images are counted in a warning.
    """
    source, attribute_list, partition_list = (
        _locate(config.data_dir, paths) for paths in (IMAGES, ATTRIBUTE_LIST, PARTITION_LIST)
    )
    names, attributes = read_attributes(attribute_list)
    others, partition = read_partition(partition_list)
    if names != others:
        raise UserError(f"{attribute_list} and {partition_list} must name the same images in the same order")
    files = listing(source)
    found = [files.get(name) or files.get(f"{Path(name).stem}.png") for name in names]
    rows = [row for row in partition.argsort(kind="stable").tolist() if found[row]]
    counts = np.bincount(partition[rows], minlength=len(SPLITS)).tolist()
    missing = f"{len(names) - len(rows)} of the {len(names)} images in {attribute_list} are not in {source}"
    if not all(counts):
        left = ", ".join(f"{n} for {split}" for split, n in zip(SPLITS, counts, strict=True))
        raise UserError(f"every split needs images, found {left}: {missing}")
    if len(rows) < len(names):
        if not (config.allow_missing or allow_missing):
            raise UserError(f"{missing}: pass --allow-missing to use the rest")
        log.warning("%s: using the rest", missing)
    entries = [entry for row in rows if (entry := found[row])]
    image = decoded(source, entries, config.cache_dir / "celeba-64.pictures", workers=config.workers)
    parts = zip(image.split(counts), torch.from_numpy(attributes[rows]).split(counts), strict=True)
    return [Data(tensors={"image": x, "attrs": attrs}, transform=pictures_and_attributes) for x, attrs in parts]


def _locate(data_dir: Path, names: Sequence[str]) -> Path:
    """Return the first of these files or folders that exists in one of `FOLDERS`. Raises UserError if none does."""
    paths = [data_dir / folder / name for folder in FOLDERS for name in names]
    if path := next((path for path in paths if path.is_file() or path.is_dir()), None):
        return path
    raise UserError(
        f"CelebA in {data_dir} lacks {Path(names[0]).name}: download Align&Cropped Images, Anno and Eval from "
        "mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put img_align_celeba/ or its zip, list_attr_celeba.txt and "
        f"list_eval_partition.txt (or Kaggle's .csv) into {data_dir / 'celeba'}, or set --data-dir"
    )


def read_attributes(path: Path) -> tuple[list[str], np.ndarray]:
    """Read list_attr_celeba.txt: the images' names, and their `ATTRIBUTES`, (N, 18) uint8 of 0 and 1.

    Its first line is the number of rows, its second names the columns. Kaggle's list_attr_celeba.csv begins with the
    columns, after `image_id`. Raises UserError, naming file and line.
    """
    n_header = 1 if path.suffix == ".csv" else 2
    lines = _lines(path)
    columns = " ".join(lines[n_header - 1 : n_header]).removeprefix("image_id").split()
    if absent := [name for name in ATTRIBUTES if name not in columns]:
        raise UserError(f"{path}, line {n_header}: the header must name the columns, but lacks {', '.join(absent)}")
    names, values = _table(path, lines, n_header, len(columns), (-1, 1))
    return names, (values[:, [columns.index(name) for name in ATTRIBUTES]] == 1).astype(np.uint8)


def read_partition(path: Path) -> tuple[list[str], np.ndarray]:
    """Read list_eval_partition.txt: the images' names and (N,) int8 of 0, 1 and 2, as in `SPLITS`.

    Kaggle's list_eval_partition.csv has a header. Raises UserError, naming file and line.
    """
    names, values = _table(path, _lines(path), int(path.suffix == ".csv"), 1, (0, 1, 2))
    return names, values[:, 0]


def _lines(path: Path) -> list[str]:
    """Return a list's lines of words separated by spaces, without a byte-order mark."""
    return path.read_text(encoding="utf-8-sig", errors="replace").replace(",", " ").rstrip().split("\n")


def _table(
    path: Path, lines: Sequence[str], n_header: int, n_columns: int, allowed: Sequence[int]
) -> tuple[list[str], np.ndarray]:
    """Parse the lines `NAME VALUE ...` below the header as names (N) and values (N, n_columns) int8."""
    names, values = [], bytearray()  # CelebA's list of attributes has eight million values
    codes = {str(value): value + 1 for value in allowed}  # bytes can't be negative
    for number, line in enumerate(lines[n_header:], 1 + n_header):
        name, *words = line.split() or [""]
        if len(words) != n_columns or not codes.keys() >= set(words):
            expected = f"a name and {n_columns} values of {' or '.join(map(str, allowed))}"
            raise UserError(f"{path}, line {number}: expected {expected}, found '{line[:80]}'")
        names.append(name)
        values.extend(codes[word] for word in words)
    return names, np.frombuffer(values, np.int8).reshape(-1, n_columns) - np.int8(1)
