"""CelebA on disk: pictures, lists and the official split, as `Data` of 64x64 pictures and 18 attributes."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .cache import Entry, decoded, listing
from .dataset import Data, DataDir

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

FOLDERS = ("", "celeba")
IMAGES = (
    "img_align_celeba.zip",
    "img_align_celeba/img_align_celeba",
    "img_align_celeba",
    "img_align_celeba_png",
    "Img/img_align_celeba.zip",
    "Img/img_align_celeba",
    "Img/img_align_celeba_png",
)
ATTRIBUTE_LIST = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION_LIST = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")
"""Where they may be in `FOLDERS`: the official download's layout, torchvision's and Kaggle's."""


@dataclasses.dataclass(kw_only=True)
class Source(DataDir):
    """The flags of every script that reads CelebA."""

    # Pictures
    cache_dir: Path = Path(os.environ.get("MVAE_CACHE_DIR") or "data/cache")  # folder of decoded pictures
    workers: int = os.cpu_count() or 1  # number of processes that decode pictures
    allow_missing: bool = False  # use the images that exist, if the lists name more


class Faces(NamedTuple):
    """The existing images of CelebA, split by split, each split in the order of the lists.

    source: the folder or zip of the images.
    entries: the n images in it.
    attributes: (n, 18) uint8 of 0 and 1, by `ATTRIBUTES`.
    counts: the number of images in each of `SPLITS`.
    """

    source: Path
    entries: list[Entry]
    attributes: np.ndarray
    counts: list[int]


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


def examples(split: str, config: Source) -> Data:
    """Return the official split "train", "validation" or "test". Raises UserError as `training_data` does."""
    return _splits(config)[SPLITS.index(split)]


def prepare(config: Source) -> None:
    """Decode the images, and print how many there are. Raises UserError as `training_data` does."""
    counts = zip(SPLITS, map(len, _splits(config)), strict=True)
    listed = ", ".join(f"{name} {n}" for name, n in counts)
    print(f"CelebA in {config.data_dir}: {listed} images, decoded in {config.cache_dir}")


def _splits(config: Source) -> list[Data]:
    """Return the data of each of `SPLITS`: slices of one file of all decoded pictures."""
    faces = find(config.data_dir, config.allow_missing)
    path = config.cache_dir / "celeba-64.pictures"
    tensors = {
        "image": decoded(faces.source, faces.entries, path, workers=config.workers),
        "attrs": torch.from_numpy(faces.attributes),
    }
    whole = Data(tensors=tensors, transform=pictures_and_attributes)
    ends = np.cumsum(faces.counts).tolist()
    return [whole[end - n : end] for n, end in zip(faces.counts, ends, strict=True)]


def find(data_dir: Path, allow_missing: bool = False) -> Faces:
    """Find CelebA in `data_dir` and read its lists. An image 000001.jpg of the lists may be 000001.png.

    Missing images are counted in a warning. Raises UserError if a list is missing or damaged, or images are missing
    without `allow_missing`.
    """
    source, attribute_list, partition_list = locate(data_dir)
    names, attributes = read_attributes(attribute_list)
    others, partition = read_partition(partition_list)
    if names != others:
        raise UserError(f"{attribute_list} and {partition_list} must name the same images in the same order")
    files = listing(source)
    found = [files.get(name) or files.get(f"{Path(name).stem}.png") for name in names]
    here = np.array([entry is not None for entry in found])
    counts = np.bincount(partition[here], minlength=len(SPLITS)).tolist()
    n_missing = len(names) - sum(counts)
    missing = f"{n_missing} of the {len(names)} images in {attribute_list} are not in {source}"
    if not all(counts):
        left = ", ".join(f"{n} for {split}" for split, n in zip(SPLITS, counts, strict=True))
        raise UserError(f"every split needs images, found {left}: {missing}")
    if n_missing and not allow_missing:
        raise UserError(f"{missing}: pass --allow-missing to use the rest")
    if n_missing:
        log.warning("%s: using the rest", missing)
    rows = here.nonzero()[0]
    rows = rows[partition[rows].argsort(kind="stable")]
    entries = [entry for row in rows if (entry := found[row])]
    return Faces(source, entries, attributes[rows], counts)


def locate(data_dir: Path) -> tuple[Path, Path, Path]:
    """Return the images (a folder or zip), the list of attributes and the list of the partition.

    Raises UserError if one is missing.
    """
    wanted = (IMAGES, ATTRIBUTE_LIST, PARTITION_LIST)
    paths = [[data_dir / folder / name for folder in FOLDERS for name in names] for names in wanted]
    images, attributes, partition = found = [next(filter(Path.exists, some), None) for some in paths]
    if images and attributes and partition:
        return images, attributes, partition
    missing = " and ".join(names[0] for names, path in zip(wanted, found, strict=True) if not path)
    raise UserError(
        f"CelebA in {data_dir} lacks {missing}: download Align&Cropped Images, Anno and Eval from "
        "mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put img_align_celeba/ or its zip, list_attr_celeba.txt and "
        f"list_eval_partition.txt (or Kaggle's .csv) into {data_dir / 'celeba'}, or set --data-dir"
    )


def read_attributes(path: Path) -> tuple[list[str], np.ndarray]:
    """Read list_attr_celeba.txt: the images' names, and their `ATTRIBUTES`, (N, 18) uint8 of 0 and 1.

    Its first line is the number of rows, its second names the columns. Kaggle's list_attr_celeba.csv begins with the
    columns, after `image_id`. Raises UserError if it is damaged.
    """
    lines = _lines(path)
    n_header = 1 if path.suffix == ".csv" else 2
    columns = [name for line in lines[n_header - 1 : n_header] for name in line.split() if name != "image_id"]
    if absent := [name for name in ATTRIBUTES if name not in columns]:
        raise UserError(f"{path}: line {n_header} must name the columns, but lacks {', '.join(absent)}")
    names, values = _table(path, lines[n_header:], len(columns), (-1, 1))
    return names, (values[:, [columns.index(name) for name in ATTRIBUTES]] == 1).astype(np.uint8)


def read_partition(path: Path) -> tuple[list[str], np.ndarray]:
    """Read list_eval_partition.txt: the images' names and (N,) int8 of 0, 1 and 2, as in `SPLITS`.

    Kaggle's list_eval_partition.csv has a header. Raises UserError if it is damaged.
    """
    lines = _lines(path)
    names, values = _table(path, lines[1:] if path.suffix == ".csv" else lines, 1, range(len(SPLITS)))
    return names, values[:, 0]


def _lines(path: Path) -> list[str]:
    """Return a list's lines, words separated by spaces."""
    return path.read_text(encoding="utf-8-sig", errors="replace").replace(",", " ").splitlines()


def _table(path: Path, lines: Sequence[str], n_columns: int, allowed: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Parse lines `NAME VALUE ...` as names (N) and values (N, n_columns) int8."""
    if not lines:
        raise UserError(f"{path} names no images")
    try:
        rows = np.loadtxt(lines, [("name", "U64"), ("values", np.int8, (n_columns,))], comments=None, ndmin=1)
    except ValueError as error:
        raise UserError(f"{path}: {str(error).partition(';')[0]}") from None
    names, values = rows["name"].tolist(), rows["values"]
    if wrong := np.flatnonzero(~np.isin(values, allowed).all(axis=1)).tolist():
        raise UserError(f"{path}: values must be {' or '.join(map(str, allowed))}, unlike those of {names[wrong[0]]}")
    return names, values
