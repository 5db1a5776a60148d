"""CelebA on disk: pictures, lists and the official split, as `Data` of 64x64 pictures and 18 attributes."""

import codecs
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import UserError
from .picture_cache import Entry, decoded, listing

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Data

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


class Faces(NamedTuple):
    """The images of CelebA that are there, split by split, each split in the order of the lists.

    source: the folder or the zip of the images.
    entries: the n images in it.
    attributes: (n, 40) int8 of 1 and -1, by `columns`.
    counts: how many there are in each of `SPLITS`.
    named: how many the lists name in each.
    """

    source: Path
    entries: list[Entry]
    attributes: np.ndarray
    columns: list[str]
    counts: tuple[int, ...]
    named: tuple[int, ...]


def pictures_and_attributes(rows: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """A `transform`: `image` becomes floats in [0, 1], and `attrs` (batch, 18) floats, 0 and 1."""
    return {"image": rows["image"].float() / 255, "attrs": rows["attrs"].float()}


def training_data(
    data_dir: Path,
    cache_dir: Path,
    *,
    limit: int | None = None,
    allow_missing: bool,
    workers: int,
) -> tuple["Data", "Data"]:
    """The official training split (the first `limit` of it) and the official validation split.

    Both hold `image` (N, 3, 64, 64), memory-mapped, and `attrs` (N, 18) in {0, 1} by `ATTRIBUTES`, all uint8.

    Raises UserError, in one line, for what is missing, doesn't fit or is damaged.
    """
    train, validation, _ = _splits(data_dir, cache_dir, allow_missing, workers)
    return train[:limit], validation


def test_data(data_dir: Path, cache_dir: Path, *, allow_missing: bool, workers: int) -> "Data":
    """The official test split, as `training_data` gives the others."""
    return _splits(data_dir, cache_dir, allow_missing, workers)[2]


def check(data_dir: Path, allow_missing: bool = False) -> str:
    """One line that says how many of the images are there. Raises UserError as `training_data` does.

    The images themselves aren't opened.
    """
    return summary(find(data_dir, allow_missing))


def summary(faces: Faces) -> str:
    """A line that says how many images there are of each split."""
    shares = zip(SPLITS, faces.counts, faces.named, strict=True)
    return f"CelebA in {faces.source}: " + ", ".join(f"{name} {here} of {all_} images" for name, here, all_ in shares)


def find(data_dir: Path, allow_missing: bool = False) -> Faces:
    """Finds CelebA below `data_dir`, in the official download's layout, torchvision's or Kaggle's, and reads its lists.

    An image 000001.jpg of the lists may be 000001.png. Images that the folder lacks are counted, in a warning.

    Raises UserError if anything but images is missing, or a list is damaged; or images, without `allow_missing`.
    """
    source, attribute_list, partition_list = locate(data_dir)
    names, columns, attributes = read_attributes(attribute_list)
    partition_names, partition = read_partition(partition_list)
    _check_same(attribute_list, names, 3, partition_list, partition_names, 1)
    files = listing(source)
    found = [files.get(name) or files.get(f"{Path(name).stem}.png") for name in names]
    here = np.array([entry is not None for entry in found])
    named, counts = (tuple(np.bincount(some, minlength=3).tolist()) for some in (partition, partition[here]))
    n_missing = len(names) - sum(counts)
    missing = f"{n_missing} of the {len(names)} images that {attribute_list} names are not in {source}"
    if not any(counts):
        raise UserError(f"{missing}, which has {', '.join(sorted(files)[:2])} and others, and not {names[0]}")
    if min(counts) < (FEWEST if n_missing else 1):
        left = ", ".join(f"{n} for {split}" for split, n in zip(SPLITS, counts, strict=True))
        raise UserError(f"{missing}; too few are left: {left}" if n_missing else f"{partition_list} leaves {left}")
    if n_missing and not allow_missing:
        raise UserError(f"{missing}: `allow_missing` does with the others")
    if n_missing:
        log.warning("%s; going on with the others", missing)
    rows = here.nonzero()[0]
    rows = rows[partition[rows].argsort(kind="stable")]
    entries = [entry for row in rows if (entry := found[row])]
    return Faces(source, entries, attributes[rows], columns, counts, named)


def locate(data_dir: Path) -> tuple[Path, Path, Path]:
    """The images (a folder or a zip), the list of attributes and the list of the partition. Raises UserError.

    They are taken from one of the folders where they may lie, as far as it has them, and else from another.
    """
    wanted = ("img_align_celeba/ or img_align_celeba.zip", ATTRIBUTE_LIST[0], PARTITION_LIST[0])
    by_folder: list[list[Path | None]] = []
    for folder in FOLDERS:
        candidates = [
            [data_dir / folder / name for name in names] for names in (IMAGES, ATTRIBUTE_LIST, PARTITION_LIST)
        ]
        by_folder.append([next(filter(_is_there, paths), None) for paths in candidates])
    by_folder.sort(key=lambda paths: paths.count(None))
    best = [next((path for path in paths if path), None) for paths in zip(*by_folder, strict=True)]
    images, attributes, partition = best
    if images and attributes and partition:
        return images, attributes, partition
    empty = [data_dir / folder / name for folder in FOLDERS for name in IMAGES if (data_dir / folder / name).is_dir()]
    if empty and not images:
        raise UserError(
            f"{empty[0]} holds no pictures (.jpg or .png): unpack img_align_celeba.zip, or put it beside it"
        )
    missing = " and ".join(name for name, path in zip(wanted, best, strict=True) if path is None)
    whence = "the official page of CelebA, mmlab.ie.cuhk.edu.hk/projects/CelebA.html (Align&Cropped Images, Anno, Eval)"
    raise UserError(
        f"CelebA in {data_dir} lacks {missing}: get them from {whence} and put img_align_celeba/ or its zip, "
        "list_attr_celeba.txt and list_eval_partition.txt (or Kaggle's, .csv) in "
        f"{data_dir / 'celeba'}, or name another `data_dir`"
    )


def _is_there(path: Path) -> bool:
    """Whether it is a file, or a folder that holds pictures."""
    try:
        if path.is_dir():
            with os.scandir(path) as files:
                return any(file.name.lower().endswith((".jpg", ".png")) for file in files)
        return path.is_file()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None


def read_attributes(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """The images' names, the columns' names, and the values, (N, columns) int8 of 1 and -1, of list_attr_celeba.txt.

    Its first line is the number of rows, its second names the columns. Kaggle's list_attr_celeba.csv begins with the
    columns, after `image_id`. Raises UserError, naming file and line.
    """
    content, is_csv = _read(path)
    number, _, rest = content.partition(b"\n")
    header, _, rows = content.partition(b"\n") if is_csv else rest.partition(b"\n")
    columns = header.decode(errors="replace").split()[int(is_csv) :]
    first = 2 if is_csv else 3
    lacking = [name for name in ATTRIBUTES if columns.count(name) != 1]
    if lacking:
        where = f"{path}, line {first - 1}"
        raise UserError(f"{where}: doesn't name the column {lacking[0]} once, as the list's header does")
    names, values = _table(path, rows, first, len(columns), (-1, 1))
    if not is_csv and number.strip() != str(len(names)).encode():
        said = number[:40].decode(errors="replace").strip()
        raise UserError(f"{path}, line 1: is '{said}' where the number of rows stands, and there are {len(names)}")
    return names, columns, values


def read_partition(path: Path) -> tuple[list[str], np.ndarray]:
    """The images' names and each one's part, (N,) int8 of 0, 1 and 2 as in `SPLITS`, of list_eval_partition.txt.

    Kaggle's list_eval_partition.csv has a header. Raises UserError, naming file and line.
    """
    content, is_csv = _read(path)
    names, values = _table(path, content.partition(b"\n")[2] if is_csv else content, 1 + is_csv, 1, (0, 1, 2))
    return names, values[:, 0]


def _splits(data_dir: Path, cache_dir: Path, allow_missing: bool, workers: int) -> list["Data"]:
    """The data of each of `SPLITS`: slices of one file of all decoded pictures."""
    import torch

    from ..data import Data

    faces = find(data_dir, allow_missing)
    image = pictures(faces, cache_dir, workers)
    attributes = faces.attributes[:, [faces.columns.index(name) for name in ATTRIBUTES]]
    attrs = torch.from_numpy((attributes == 1).astype(np.uint8))
    whole = Data(tensors={"image": image, "attrs": attrs}, transform=pictures_and_attributes)
    ends = np.cumsum(faces.counts).tolist()
    return [whole[end - n : end] for n, end in zip(faces.counts, ends, strict=True)]


def pictures(faces: Faces, cache_dir: Path, workers: int) -> "Tensor":
    """The faces' pictures, (n, 3, 64, 64) uint8, decoded into a file in `cache_dir` unless they are there."""
    return decoded(faces.source, faces.entries, cache_dir / "celeba-64.pictures", workers=workers)


def _read(path: Path) -> tuple[bytes, bool]:
    """A list's lines of words with spaces between them; and whether it has commas between them, as CSV files do.

    A byte-order mark is left out.
    """
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
    """Names (N) and one-digit values (N, n_columns) int8 of lines `NAME VALUE ...`, of which the first is line `first`.

    Words are found in the bytes by numpy: the list of attributes has eight million.
    """
    content = content.rstrip()
    text = np.frombuffer(content, np.uint8)
    blank = np.concatenate([[True], text <= 32, [True]])  # spaces and line ends
    starts = (blank[:-1] & ~blank[1:]).nonzero()[0].astype(np.int32)
    ends = (~blank[:-1] & blank[1:]).nonzero()[0].astype(np.int32)
    lines = np.concatenate([[0], (text == 10).nonzero()[0], [len(text)]])
    counts = np.diff(np.searchsorted(starts, lines))
    wrong = (counts != n_columns + 1).nonzero()[0]
    if len(wrong):
        found = f"{counts[wrong[0]]} words, where a name and {n_columns} values are wanted"
        raise UserError(f"{path}, line {first + wrong[0]}: {found}")
    starts, ends = starts.reshape(-1, n_columns + 1), ends.reshape(-1, n_columns + 1)
    names = [content[start:end].decode(errors="replace") for start, end in zip(starts[:, 0], ends[:, 0], strict=True)]
    starts, ends = starts[:, 1:], ends[:, 1:]
    negative = text[starts] == ord("-")
    values = text[ends - 1].astype(np.int8) - ord("0")
    values[negative] *= -1
    bad = (ends - starts != 1 + negative) | ~np.isin(values, allowed)
    wrong = bad.any(axis=1).nonzero()[0]
    if len(wrong):
        column = bad[wrong[0]].argmax()
        word = content[starts[wrong[0], column] : ends[wrong[0], column]].decode(errors="replace")
        wanted = " or ".join(map(str, allowed))
        raise UserError(f"{path}, line {first + wrong[0]} ({names[wrong[0]]}): '{word}' where {wanted} is wanted")
    if len(set(names)) < len(names):
        first_row: dict[str, int] = {}
        row = next(row for row, name in enumerate(names) if first_row.setdefault(name, row) != row)
        raise UserError(f"{path}, line {first + row}: names {names[row]} a second time")
    return names, values


def _check_same(one: Path, names: list[str], first: int, other: Path, others: list[str], other_first: int) -> None:
    """Raises UserError, naming the first line that differs, unless both lists name the same images in one order."""
    if names == others:
        return
    n = min(len(names), len(others))
    row = next((row for row in range(n) if names[row] != others[row]), n)
    said, other_said = (some[row] if row < len(some) else "no more" for some in (names, others))
    raise UserError(
        f"{other}, line {other_first + row}: names {other_said}, and {one}, line {first + row}, names {said}"
    )
