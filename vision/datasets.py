"""Vision: faces (64x64) as `image` and as five pictures derived from it, all in [0, 1].

`gray`, `edge` and `mask` (1 channel; edges and regions are white on black) are read from the folders that setup.py
makes, where masks are black on white; `obscured` (its right half black) and `watermark` (a translucent picture over
it), like `image` of 3 channels, are computed from the batch, on its device.

As a command it looks whether the folders are complete, and decodes their pictures: python datasets.py [--image-dir DIR]
"""

import argparse
import functools
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from mvae.datasets import celeba
from mvae.datasets.celeba import SPLITS
from mvae.datasets.picture_cache import Entry, decoded, listing
from mvae.errors import UserError
from mvae.scripts import flags, running, types
from mvae.scripts.kinds import Picture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mvae import Data

log = logging.getLogger("mvae.vision")

MODES: dict[str, Literal["RGB", "L"]] = {
    "image": "RGB",
    "gray": "L",
    "edge": "L",
    "mask": "L",
    "obscured": "RGB",
    "watermark": "RGB",
}
MODALITIES = tuple(MODES)
SIZE = 64  # pixels
PENS = {"edge": 1, "mask": 3}  # pixels
CONTROLS = {name: Picture(mode, SIZE, dark=name in PENS, pen=PENS.get(name, 0)) for name, mode in MODES.items()}

COMMANDS = {"gray": "grayscale", "edge": "edge", "mask": "mask"}  # of setup.py, by what each makes
FOLDERS = {"image": "images", **COMMANDS}
WATERMARK = Path(__file__).with_name("watermark.png")


class Pictures(NamedTuple):
    """The n pictures that all four folders have, split by split, each split in the order of the names.

    entries: by folder, the n pictures in it.
    counts: how many there are in each of `SPLITS`.
    partition: the official list that has split them; None if none is found, and `split_by_name` has.
    """

    entries: dict[str, list[Entry]]
    counts: tuple[int, ...]
    partition: Path | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that reads the pictures: the four folders, --cache-dir and --workers."""
    group = flags.add_cache_flags(parser)
    for name, folder in FOLDERS.items():
        what = "the faces" if name == "image" else f"what `python setup.py {COMMANDS[name]}` made of them"
        group.add_argument(f"--{name}-dir", type=types.path, default=Path("./data", folder), help=f"folder of {what}")


def folders(args: argparse.Namespace) -> dict[str, Path]:
    """The four folders that the flags name, by what is in them."""
    return {name: getattr(args, f"{name}_dir") for name in FOLDERS}


def six(rows: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """A `transform`: from the pictures (batch, channels, 64, 64) of the four folders, uint8, to the six modalities."""
    image = rows["image"].float()
    obscured = image.clone()
    obscured[..., SIZE // 2 :] = 0
    batch = {
        "image": image,
        "gray": rows["gray"],
        "edge": rows["edge"],
        "mask": 255 - rows["mask"],  # black on white in the file
        "obscured": obscured,
        "watermark": watermarked(image),
    }
    return {name: picture / 255 for name, picture in batch.items()}


def watermarked(image: "Tensor") -> "Tensor":
    """Pictures (batch, 3, 64, 64) of whole numbers to 255, as floats, with the watermark over them.

    The result is whole, too: each sum of integers is exact and rounded once, as PIL's Image.paste does it.
    """
    light, through = _watermark(image.device)
    return ((image * through + light) / 255).round()


@functools.cache
def _watermark(device: "torch.device") -> tuple["Tensor", "Tensor"]:
    """Its colours times its opacity, (3, 64, 64), and 255 less its opacity, (1, 64, 64)."""
    import torch

    with Image.open(WATERMARK) as opened:
        rgba = torch.from_numpy(np.array(opened.convert("RGBA"))).permute(2, 0, 1).float().to(device)
    colour, opacity = rgba.split([3, 1])
    return colour * opacity, 255 - opacity


def training_data(
    folders: Mapping[str, Path], data_dir: Path, cache_dir: Path, *, limit: int | None = None, workers: int
) -> tuple["Data", "Data"]:
    """The training split (the first `limit` of it) and the validation split; see `find` for what they are.

    Raises UserError, in one line, for what is missing, doesn't fit or is damaged.
    """
    train, validation, _ = _splits(folders, find(folders, data_dir), cache_dir, workers)
    return train[:limit], validation


def test_data(folders: Mapping[str, Path], data_dir: Path, cache_dir: Path, *, workers: int) -> "Data":
    """The test split, as `training_data` gives the others."""
    return _splits(folders, find(folders, data_dir), cache_dir, workers)[2]


def examples(split: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> "Data":
    """The split "train", "validation" or "test" of the pictures that the flags name."""
    of_all = folders(args)
    return _splits(of_all, find(of_all, args.data_dir), args.cache_dir, args.workers)[SPLITS.index(split)]


def find(folders: Mapping[str, Path], data_dir: Path) -> Pictures:
    """The pictures that all four folders have, by their names, and their splits.

    CelebA's list_eval_partition.txt splits them, if it lies beside the images' folder or, as for `celeba`, in
    `data_dir`. A picture that it doesn't name, or without it each one, is split by its name. Those that a folder lacks
    are counted, in a warning.

    Raises UserError if a folder or a split is left without pictures, or the list is damaged.
    """
    files = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            remedy = _remedy(name, folders) if name in COMMANDS else "put the faces there, or name --image-dir"
            raise UserError(f"there is no folder {folder}: {remedy}")
        files[name] = listing(folder)
    names = sorted(files["image"])
    if not names:
        raise UserError(f"there are no pictures in {folders['image']}: put the faces there, or name --image-dir")
    lacking = {name: sum(one not in files[name] for one in names) for name in COMMANDS}
    in_all = [one for one in names if all(one in some for some in files.values())]
    if not in_all:
        most = max(lacking, key=lacking.__getitem__)
        lack = f"{lacking[most]} of the {len(names)} pictures in {folders['image']} are not in {folders[most]}"
        raise UserError(f"{lack}, and none is in all four folders: {_remedy(most, folders)}")
    if len(in_all) < len(names):
        lack = ", ".join(f"{n} are not in {folders[name]}" for name, n in lacking.items() if n)
        of_all = f"of the {len(names)} pictures in {folders['image']}"
        log.warning("%s, %s; going on with the %d that are in all four folders", of_all, lack, len(in_all))
    partition = _partition_list(folders["image"].parent, data_dir)
    official = {}
    if partition:  # its 000001.jpg may be 000001.png here
        official = {Path(name).stem: part for name, part in zip(*celeba.read_partition(partition), strict=True)}
    parts = np.array([official.get(Path(one).stem, split_by_name(one)) for one in in_all])
    counts = tuple(np.bincount(parts, minlength=len(SPLITS)).tolist())
    if not all(counts):
        left = ", ".join(f"{n} for {split}" for split, n in zip(SPLITS, counts, strict=True))
        raise UserError(f"the {len(in_all)} pictures that all folders have are too few: they leave {left}")
    order = parts.argsort(kind="stable")
    entries = {name: [some[in_all[row]] for row in order] for name, some in files.items()}
    return Pictures(entries, counts, partition)


def split_by_name(name: str) -> int:
    """0 (train), 1 (validation) or 2 (test) for eight, one and one of ten pictures, by a checksum of the file's name.

    So a picture's split is the same on every machine and beside any other pictures.
    """
    return max(0, zlib.crc32(name.encode()) % 10 - 7)


def _partition_list(*roots: Path) -> Path | None:
    candidates = (root / folder / name for root in roots for folder in celeba.FOLDERS for name in celeba.PARTITION_LIST)
    return next((path for path in candidates if path.is_file()), None)


def _remedy(name: str, folders: Mapping[str, Path]) -> str:
    return f"`python setup.py {COMMANDS[name]} {folders['image']} {folders[name]}` makes it, or name --{name}-dir"


def _splits(folders: Mapping[str, Path], found: Pictures, cache_dir: Path, workers: int) -> list["Data"]:
    """The data of each of `SPLITS`: slices of four files of decoded pictures, those that `find` found."""
    from mvae import Data

    tensors = {
        name: decoded(
            folders[name],
            entries,
            cache_dir / f"vision-{name}-{SIZE}.pictures",
            mode=MODES[name],
            size=SIZE,
            workers=workers,
        )
        for name, entries in found.entries.items()
    }
    whole = Data(tensors=tensors, transform=six)
    ends = np.cumsum(found.counts).tolist()
    return [whole[end - n : end] for n, end in zip(found.counts, ends, strict=True)]


def main() -> None:
    parser = flags.parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    found = find(folders(args), args.data_dir)
    counts = ", ".join(f"{name} {n}" for name, n in zip(SPLITS, found.counts, strict=True))
    print(f"{args.image_dir}: {counts} pictures, split by {found.partition or 'their names'}")
    _splits(folders(args), found, args.cache_dir, args.workers)
    print(f"they are decoded in {args.cache_dir}")


if __name__ == "__main__":
    running.run(main)
