"""Draw a synthetic data set in the layout of a real one, for machines that can't download it.

    python -m synthetic digits DIR     # 60,000 + 10,000 digits, stored as MNIST is by torchvision: DIR/MNIST/raw
    python -m synthetic fashion DIR    # as many garments, shoes and bags: DIR/FashionMNIST/raw
    python -m synthetic faces DIR      # 8,000 + 1,000 + 1,000 faces, stored as CelebA is published: DIR/celeba

Results on synthetic data show that the code runs and learns; they can't be compared with results on the real sets. The
same seed gives the same bytes, for one version of NumPy and OpenCV.
"""

import glob
import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvae import cli
from mvae.errors import UsageError, UserError
from mvae.files import check_writable, write_atomically

import cv2
import numpy as np
from tqdm import tqdm

from .digits import digits
from .faces import DRAWN, attributes, faces
from .fashion import garments

Draw = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]

CHECKSUMS = "checksums.md5"
IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

CELEBA_ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
)
"""The 40 columns of CelebA's list of attributes."""


MNIST_SPLITS = {"train": 60_000, "test": 10_000}
SPLITS = {"digits": MNIST_SPLITS, "fashion": MNIST_SPLITS, "faces": {"train": 8_000, "val": 1_000, "test": 1_000}}
"""The default number of images in each split."""


@dataclass(kw_only=True)
class Config:
    kind: Literal["digits", "fashion", "faces"]  # what to draw
    dir: Path  # data folder, created if missing

    # Images
    train: int | None = None  # number of training images (default: 60000, faces: 8000)
    val: int | None = None  # number of validation images, faces only (default: 1000)
    test: int | None = None  # number of test images (default: 10000, faces: 1000)
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        if self.val is not None and self.kind != "faces":
            raise UsageError(f"--val applies to faces only: {self.kind} have no validation split")
        for name in ("train", "val", "test"):
            if (n := getattr(self, name)) is not None and not 1 <= n <= 10**6:
                raise UsageError(f"{name} must be an integer from 1 to 1000000, got {n}")
        if self.seed < 0:
            raise UsageError(f"seed must be an integer >= 0, got {self.seed}")

    @property
    def counts(self) -> dict[str, int]:
        """The number of images in each split."""
        return {split: getattr(self, split) or default for split, default in SPLITS[self.kind].items()}


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(__doc__, Config, argv)
    counts = config.counts
    cv2.setNumThreads(1)  # images this small gain nothing from threads, whose waiting costs others a core
    if config.kind == "faces":
        folder = config.dir / "celeba"
        write_faces(folder, [*counts.values()], config.seed)
    else:
        draw, name = (digits, "MNIST") if config.kind == "digits" else (garments, "FashionMNIST")
        folder = config.dir / name / "raw"
        write_idx_files(folder, draw, [*counts.values()], config.seed)
    listed = ", ".join(f"{split} {n}" for split, n in counts.items())
    print(f"{folder}: synthetic {config.kind} ({listed}), seed {config.seed}")


def write_idx_files(raw: Path, draw: Draw, counts: Sequence[int], seed: int) -> None:
    """Draw the training and the test split from two random streams of `seed`, and write them to the folder `raw`.

    The files are MNIST's four, and the MD5 sums of the uncompressed ones. Raises UserError if the folder holds a set
    without such sums, which is a real one, or can't be written.
    """
    found = [name for name in IDX_NAMES if os.path.lexists(raw / f"{name}.gz") or os.path.lexists(raw / name)]
    if found and not (raw / CHECKSUMS).is_file():
        raise UserError(f"{raw} holds {found[0]} without {CHECKSUMS}, so it isn't synthetic: choose another folder")
    check_writable(raw / CHECKSUMS)
    splits = [draw(n, np.random.default_rng([seed, stream])) for stream, n in enumerate(counts)]
    arrays = [array for split in splits for array in split]
    files = {name: idx_bytes(array) for name, array in zip(IDX_NAMES, arrays, strict=True)}
    # The sums come first: an incomplete set then fails its check, and is recognised as synthetic by the next call.
    sums = [f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}  {name}\n" for name, content in files.items()]
    write_atomically(raw / CHECKSUMS, "".join(sums).encode())
    for name, content in files.items():
        write_atomically(raw / f"{name}.gz", gzip.compress(content, compresslevel=1, mtime=0))


def idx_bytes(array: np.ndarray) -> bytes:
    """Return a uint8 array as an IDX file.

    The header is 0, 0, the type's code (8), the number of dimensions, and each size as a big-endian 32-bit integer.
    """
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_faces(folder: Path, counts: Sequence[int], seed: int) -> None:
    """Draw training, validation and test faces from three random streams of `seed`, and write the folder atomically.

    Raises UserError if the folder exists.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial") as name:
        whole = Path(name, folder.name)
        for part in ("img_align_celeba", "Anno", "Eval"):
            (whole / part).mkdir(parents=True)
        streams = [np.random.default_rng([seed, stream]) for stream in range(len(counts))]
        drawn = [attributes(n, rng) for n, rng in zip(counts, streams, strict=True)]
        painted = (face for rows, rng in zip(drawn, streams, strict=True) for face in faces(rows, rng))
        landmarks = []
        for i, (image, points) in enumerate(tqdm(painted, total=sum(counts), leave=False, disable=None), 1):
            _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            (whole / "img_align_celeba" / f"{i:06}.jpg").write_bytes(jpeg.tobytes())
            landmarks.append(points.ravel())
        splits = np.repeat(np.arange(len(counts)), counts)
        partition = "".join(f"{i:06}.jpg {split}\r\n" for i, split in enumerate(splits, 1))
        (whole / "Eval" / "list_eval_partition.txt").write_bytes(partition.encode())
        attribute_list = table(CELEBA_ATTRIBUTES.split(), all_attributes(np.concatenate(drawn)))
        (whole / "Anno" / "list_attr_celeba.txt").write_bytes(attribute_list)
        columns = [f"{axis}{i}" for i in range(68) for axis in "xy"]
        (whole / "Anno" / "list_landmarks_68.txt").write_bytes(table(columns, np.stack(landmarks)))
        whole.rename(folder)


def all_attributes(drawn: np.ndarray) -> np.ndarray:
    """Return CelebA's 40 attributes, (n, 40) int64 of 1 and -1, of faces with the 18 `drawn` ones, (n, 18) bool.

    Of the other 22, those are set that follow from a drawn one.
    """
    has = dict(zip(DRAWN, drawn.T, strict=True))
    has["High_Cheekbones"] = has["Smiling"]
    has["No_Beard"] = ~has["Mustache"]
    has["Wearing_Lipstick"] = has["Heavy_Makeup"]
    has["Young"] = ~has["Gray_Hair"]
    absent = np.zeros(len(drawn), dtype=bool)
    return np.stack([np.where(has.get(name, absent), 1, -1) for name in CELEBA_ATTRIBUTES.split()], axis=1)


def table(columns: Iterable[str], rows: np.ndarray) -> bytes:
    """Return a list in CelebA's format: the count, the columns' names, a row of integers for each image."""
    lines = [f"{len(rows)}", "".join(f"{name} " for name in columns)]
    lines += [f"{i:06}.jpg " + " ".join(f"{value:2}" for value in row) for i, row in enumerate(rows.tolist(), 1)]
    return "".join(f"{line}\r\n" for line in lines).encode()


if __name__ == "__main__":
    cli.run(main)
