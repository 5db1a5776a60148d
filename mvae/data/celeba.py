"""CelebA on disk: pictures, lists and the official split, as `Data` of 64x64 pictures and 18 attributes."""

import array
import codecs
import dataclasses
import logging
import os
from collections.abc import Sequence
from itertools import zip_longest
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
FEWEST = 50  # examples that a split must have when images are missing

FOLDERS = ("", "celeba", "CelebA")
IMAGES = tuple(
    folder + name
    for name in (
        "img_align_celeba",
        "img_align_celeba/img_align_celeba",
        "img_align_celeba_png",
        "img_align_celeba.zip",
    )
    for folder in ("", "Img/")
)
ATTRIBUTE_LIST = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION_LIST = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")


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
    attributes: (n, 40) int8 of 1 and -1, by `columns`.
    counts: the number of images in each of `SPLITS`.
    named: the number that the lists name in each.
    """

    source: Path
    entries: list[Entry]
    attributes: np.ndarray
    columns: list[str]
    counts: tuple[int, ...]
    named: tuple[int, ...]


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
    """Print how many images there are, and decode them. Raises UserError as `training_data` does."""
    faces = find(config.data_dir, config.allow_missing)
    shares = zip(SPLITS, faces.counts, faces.named, strict=True)
    counts = ", ".join(f"{name} {n} of {named} images" for name, n, named in shares)
    print(f"CelebA in {faces.source}: {counts}", flush=True)
    _pictures(faces, config)
    print(f"decoded in {config.cache_dir}")


def _splits(config: Source) -> list[Data]:
    """Return the data of each of `SPLITS`: slices of one file of all decoded pictures."""
    faces = find(config.data_dir, config.allow_missing)
    image = _pictures(faces, config)
    attributes = faces.attributes[:, [faces.columns.index(name) for name in ATTRIBUTES]]
    attrs = torch.from_numpy((attributes == 1).astype(np.uint8))
    whole = Data(tensors={"image": image, "attrs": attrs}, transform=pictures_and_attributes)
    ends = np.cumsum(faces.counts).tolist()
    return [whole[end - n : end] for n, end in zip(faces.counts, ends, strict=True)]


def _pictures(faces: Faces, config: Source) -> Tensor:
    return decoded(faces.source, faces.entries, config.cache_dir / "celeba-64.pictures", workers=config.workers)


def find(data_dir: Path, allow_missing: bool = False) -> Faces:
    """Find CelebA in `data_dir`, in the official download's layout, torchvision's or Kaggle's, and read its lists.

    An image 000001.jpg of the lists may be 000001.png. Missing images are counted in a warning.

    Raises UserError if a list is missing or damaged, or images are missing without `allow_missing`.
    """
    source, attribute_list, partition_list = locate(data_dir)
    names, columns, attributes = read_attributes(attribute_list)
    partition_names, partition = read_partition(partition_list)
    for row, (name, other) in enumerate(zip_longest(names, partition_names, fillvalue="no more"), 1):
        if name != other:
            lists = f"{partition_list} and {attribute_list}"
            raise UserError(
                f"{lists} must name the same images in one order; in row {row} they name {other} and {name}"
            )
    files = listing(source)
    found = [files.get(name) or files.get(f"{Path(name).stem}.png") for name in names]
    here = np.array([entry is not None for entry in found])
    named, counts = (tuple(np.bincount(some, minlength=3).tolist()) for some in (partition, partition[here]))
    n_missing = len(names) - sum(counts)
    missing = f"{n_missing} of the {len(names)} images in {attribute_list} are not in {source}"
    if not any(counts):
        raise UserError(f"{missing}: it has {', '.join(sorted(files)[:2])} and others, but not {names[0]}")
    if min(counts) < (FEWEST if n_missing else 1):
        left = ", ".join(f"{n} for {split}" for split, n in zip(SPLITS, counts, strict=True))
        raise UserError(f"{missing}; too few are left: {left}" if n_missing else f"{partition_list} has {left}")
    if n_missing and not allow_missing:
        raise UserError(f"{missing}: pass --allow-missing to use the rest")
    if n_missing:
        log.warning("%s: using the rest", missing)
    rows = here.nonzero()[0]
    rows = rows[partition[rows].argsort(kind="stable")]
    entries = [entry for row in rows if (entry := found[row])]
    return Faces(source, entries, attributes[rows], columns, counts, named)


def locate(data_dir: Path) -> tuple[Path, Path, Path]:
    """Return the images (a folder or zip), the list of attributes and the list of the partition.

    The folder that has the most of them is preferred; the rest may be in another. Raises UserError if one is missing.
    """
    wanted = ("img_align_celeba/ or img_align_celeba.zip", ATTRIBUTE_LIST[0], PARTITION_LIST[0])
    by_folder: list[list[Path | None]] = []
    for folder in FOLDERS:
        candidates = [
            [data_dir / folder / name for name in names] for names in (IMAGES, ATTRIBUTE_LIST, PARTITION_LIST)
        ]
        by_folder.append([next(filter(_exists, paths), None) for paths in candidates])
    by_folder.sort(key=lambda paths: paths.count(None))
    best = [next((path for path in paths if path), None) for paths in zip(*by_folder, strict=True)]
    images, attributes, partition = best
    if images and attributes and partition:
        return images, attributes, partition
    empty = [data_dir / folder / name for folder in FOLDERS for name in IMAGES if (data_dir / folder / name).is_dir()]
    if empty and not images:
        raise UserError(f"{empty[0]} has no pictures (.jpg or .png): unpack img_align_celeba.zip, or put it next to it")
    missing = " and ".join(name for name, path in zip(wanted, best, strict=True) if path is None)
    raise UserError(
        f"CelebA in {data_dir} lacks {missing}: download Align&Cropped Images, Anno and Eval from "
        "mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put img_align_celeba/ or its zip, list_attr_celeba.txt and "
        f"list_eval_partition.txt (or Kaggle's .csv) into {data_dir / 'celeba'}, or set --data-dir"
    )


def _exists(path: Path) -> bool:
    """Return whether this is a file, or a folder with pictures."""
    try:
        if path.is_dir():
            with os.scandir(path) as files:
                return any(file.name.lower().endswith((".jpg", ".png")) for file in files)
        return path.is_file()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None


def read_attributes(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Read list_attr_celeba.txt: the images' names, the columns' names, and (N, columns) int8 of 1 and -1.

    Its first line is the number of rows, its second names the columns. Kaggle's list_attr_celeba.csv begins with the
    columns, after `image_id`. Raises UserError, naming file and line.
    """
    content, is_csv = _read(path)
    number, _, rest = content.partition(b"\n")
    header, _, rows = content.partition(b"\n") if is_csv else rest.partition(b"\n")
    columns = header.decode(errors="replace").split()[int(is_csv) :]
    first = 2 if is_csv else 3
    for name in ATTRIBUTES:
        if columns.count(name) != 1:
            raise UserError(f"{path}, line {first - 1}: the header must name the column {name} once")
    names, values = _table(path, rows, first, len(columns), (-1, 1))
    if not is_csv and number.strip() != str(len(names)).encode():
        found = number[:40].decode(errors="replace").strip()
        raise UserError(f"{path}, line 1: expected the row count, {len(names)}, found '{found}'")
    return names, columns, values


def read_partition(path: Path) -> tuple[list[str], np.ndarray]:
    """Read list_eval_partition.txt: the images' names and (N,) int8 of 0, 1 and 2, as in `SPLITS`.

    Kaggle's list_eval_partition.csv has a header. Raises UserError, naming file and line.
    """
    content, is_csv = _read(path)
    names, values = _table(path, content.partition(b"\n")[2] if is_csv else content, 1 + is_csv, 1, (0, 1, 2))
    return names, values[:, 0]


def _read(path: Path) -> tuple[bytes, bool]:
    """Return a list's lines of words separated by spaces, without a byte-order mark, and whether it is a CSV file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", errors="replace").encode()
    content = content.removeprefix(codecs.BOM_UTF8)
    is_csv = b"," in content.partition(b"\n")[0]
    return content.replace(b",", b" ") if is_csv else content, is_csv


def _table(
    path: Path, content: bytes, first: int, n_columns: int, allowed: Sequence[int]
) -> tuple[list[str], np.ndarray]:
    """Parse lines `NAME VALUE ...`, counted from `first`, as names (N) and values (N, n_columns) int8."""
    codes = {str(value).encode(): value for value in allowed}
    rows: dict[str, int] = {}
    values = array.array("b")  # CelebA's list of attributes has eight million
    for number, line in enumerate(content.rstrip().split(b"\n"), first):
        words = line.split()
        if len(words) != n_columns + 1:
            expected = f"expected a name and {n_columns} values, found {len(words)} words"
            raise UserError(f"{path}, line {number}: {expected}")
        name = words[0].decode(errors="replace")
        if rows.setdefault(name, number) != number:
            raise UserError(f"{path}, line {number}: {name} is named a second time")
        try:
            values.extend(map(codes.__getitem__, words[1:]))
        except KeyError as error:
            word, expected = error.args[0].decode(errors="replace"), " or ".join(map(str, allowed))
            raise UserError(f"{path}, line {number} ({name}): expected {expected}, found '{word}'") from None
    return list(rows), np.array(values).reshape(-1, n_columns)
