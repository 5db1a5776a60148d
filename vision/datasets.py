"""Vision: faces (64x64) as `image` and as five pictures derived from it, all in [0, 1].

`gray`, `edge` and `mask` (1 channel; edges and regions are white on black) are read from the folders that setup.py
writes, where masks are black on white. `obscured` (its right half black) and `watermark` (under a translucent picture)
have 3 channels, like `image`, and are computed from each batch on its device.

As a command it counts the pictures of the folders and decodes them: python datasets.py [--image-dir DIR]
"""

import functools
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mvae import cli
from mvae.data import celeba
from mvae.data.cache import CacheDir, Entry, decoded, listing
from mvae.data.dataset import Data
from mvae.data.pictures import Mode
from mvae.errors import UserError
from mvae.tools.controls import Picture

import numpy as np
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger("mvae.vision")

NAME = "vision"
MODES: dict[str, Mode] = {
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

COMMANDS = {"gray": "grayscale", "edge": "edge", "mask": "mask"}  # of setup.py
WATERMARK = Path(__file__).with_name("watermark.png")


@dataclass(kw_only=True)
class Source(CacheDir):
    # Pictures
    image_dir: Path = Path("data/images")  # folder of the faces
    gray_dir: Path = Path("data/grayscale")  # folder that `python setup.py grayscale` filled
    edge_dir: Path = Path("data/edge")  # folder that `python setup.py edge` filled
    mask_dir: Path = Path("data/mask")  # folder that `python setup.py mask` filled

    @property
    def folders(self) -> dict[str, Path]:
        """The four folders by modality."""
        return {"image": self.image_dir, "gray": self.gray_dir, "edge": self.edge_dir, "mask": self.mask_dir}


class Pictures(NamedTuple):
    """The pictures that all four folders have, split by split, each split ordered by name."""

    entries: dict[str, list[Entry]]  # by folder
    counts: list[int]  # of each split
    partition: Path | None  # the official list that splits them; None if their names do


def training_data(source: Source, *, limit: int | None = None) -> tuple[Data, Data]:
    """Return the training split (the first `limit` of it) and the validation split. Raises UserError as `find` does."""
    train, validation, _ = _splits(source, find(source))
    return train[:limit], validation


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the split "train", "validation" or "test". Raises UserError as `find` does."""
    return _splits(config, find(config))[celeba.SPLITS.index(split)]


def find(source: Source) -> Pictures:
    """Find the pictures that all four folders have, by name, and their splits.

    CelebA's list_eval_partition.txt splits them, if it is next to the images' folder or in `data_dir`. Pictures that it
    doesn't list are split by name. Those that a folder lacks are counted in a warning.

    Raises UserError if a folder or a split has no pictures, or the list is damaged.
    """
    files = {}
    for name, folder in source.folders.items():
        files[name] = listing(folder) if folder.is_dir() else {}
        if not files[name]:
            remedy = _remedy(name, source) if name in COMMANDS else "put the faces there, or pass --image-dir"
            raise UserError(f"no pictures in {folder}: {remedy}")
    names = sorted(files["image"])
    in_all = [one for one in names if all(one in some for some in files.values())]
    lacking = {name: n for name in COMMANDS if (n := sum(one not in files[name] for one in names))}
    lack = ", ".join(f"{n} are not in {source.folders[name]}" for name, n in lacking.items())
    lack = f"of the {len(names)} pictures in {source.image_dir}, {lack}"
    if not in_all:
        raise UserError(f"{lack}: {_remedy(max(lacking, key=lacking.__getitem__), source)}")
    if lacking:
        log.warning("%s; using the %d that are in all four folders", lack, len(in_all))
    roots = (source.image_dir.parent, source.data_dir)
    lists = [root / folder / name for root in roots for folder in celeba.FOLDERS for name in celeba.PARTITION_LIST]
    partition = next(filter(Path.is_file, lists), None)
    official = {}
    if partition:  # its 000001.jpg may be 000001.png here
        official = {Path(name).stem: part for name, part in zip(*celeba.read_partition(partition), strict=True)}
    parts = np.array([official.get(Path(one).stem, split_by_name(one)) for one in in_all])
    counts = np.bincount(parts, minlength=len(celeba.SPLITS)).tolist()
    if not all(counts):
        left = ", ".join(f"{n} for {split}" for split, n in zip(celeba.SPLITS, counts, strict=True))
        raise UserError(f"need more pictures: the {len(in_all)} that all folders have leave {left}")
    order = parts.argsort(kind="stable")
    entries = {name: [some[in_all[row]] for row in order] for name, some in files.items()}
    return Pictures(entries, counts, partition)


def split_by_name(name: str) -> int:
    """Return 0 (train), 1 (validation) or 2 (test), for 80, 10 and 10 % of the names, by a checksum of the name.

    So a picture's split doesn't depend on the machine or on other pictures.
    """
    return max(0, zlib.crc32(name.encode()) % 10 - 7)


def _remedy(name: str, source: Source) -> str:
    return f"run `python setup.py {COMMANDS[name]} {source.image_dir} {source.folders[name]}`, or pass --{name}-dir"


def _splits(source: Source, found: Pictures) -> list[Data]:
    """Return the data of each split: slices of four files of decoded pictures."""
    tensors = {}
    for name, entries in found.entries.items():
        path = source.cache_dir / f"vision-{name}-{SIZE}.pictures"
        folder = source.folders[name]
        tensors[name] = decoded(folder, entries, path, mode=MODES[name], size=SIZE, workers=source.workers)
    whole = Data(tensors=tensors, transform=six)
    ends = np.cumsum(found.counts).tolist()
    return [whole[end - n : end] for n, end in zip(found.counts, ends, strict=True)]


def six(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the six modalities of the four folders' pictures, (batch, channels, 64, 64) uint8: a `transform` of Data."""
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


def watermarked(image: Tensor) -> Tensor:
    """Put the watermark over pictures (batch, 3, 64, 64), floats with integer values to 255.

    The result has integer values: sums are exact and rounded once, as by PIL's Image.paste.
    """
    light, through = _watermark(image.device)
    return ((image * through + light) / 255).round()


@functools.cache
def _watermark(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the watermark's colours times its opacity, (3, 64, 64), and 255 minus its opacity, (1, 64, 64)."""
    with Image.open(WATERMARK) as opened:
        rgba = torch.from_numpy(np.array(opened.convert("RGBA"))).permute(2, 0, 1).float().to(device)
    colour, opacity = rgba.split([3, 1])
    return colour * opacity, 255 - opacity


def main() -> None:
    source = cli.parse(__doc__, Source)
    found = find(source)
    counts = ", ".join(f"{name} {n}" for name, n in zip(celeba.SPLITS, found.counts, strict=True))
    print(f"{source.image_dir}: {counts} pictures, split by {found.partition or 'their names'}", flush=True)
    _splits(source, found)
    print(f"decoded in {source.cache_dir}")


if __name__ == "__main__":
    cli.run(main)
