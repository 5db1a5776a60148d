"""Made data in the layout of the real sets, for machines that cannot download them.

    python -m mvae.synthetic digits DIR     # 60,000 + 10,000 made digits, as torchvision keeps MNIST: DIR/MNIST/raw
    python -m mvae.synthetic fashion DIR    # as many made garments, shoes and bags: DIR/FashionMNIST/raw
    python -m mvae.synthetic faces DIR      # 8,000 + 1,000 + 1,000 made faces, as CelebA is published: DIR/celeba

digits.py, fashion.py and faces.py beside this file say what is drawn. Figures got on made sets say that the code runs
and learns; they are no figures for the real ones. The bytes follow from the seed, for one version of NumPy and OpenCV.
"""

import argparse
import functools
import gzip
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import UsageError
from ..scripts import flags, running, types
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


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array as an IDX file: 0, 0, the type's code (8), the number of dimensions, each size as a big-endian
    32-bit number, then the data in row-major order. Raises TypeError for another dtype."""
    if array.dtype != np.uint8:
        raise TypeError(f"an IDX file of images or labels holds uint8, not {array.dtype}")
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, which then takes its name. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes a uint8 array as a gzipped IDX file, the same bytes each time. Raises TypeError, OSError."""
    replace_file(path, gzip.compress(idx_bytes(array), compresslevel=1, mtime=0))


def unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"cannot write in {folder} ({error.strerror}): give a folder that can be written")


def claim_folder(raw: Path) -> None:
    """Makes the folder `raw`, and sees that it can be written. Raises OSError, its message being one line for the user:
    FileExistsError where the set in it is not made, which is to say has no checksums beside it."""
    found = [name for name in IDX_NAMES if os.path.lexists(raw / f"{name}.gz") or os.path.lexists(raw / name)]
    if found and not (raw / CHECKSUMS).is_file():
        raise FileExistsError(f"{raw} holds {found[0]} without {CHECKSUMS}, so it is no made set: give another folder")
    try:
        raw.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=raw).close()
    except OSError as error:
        raise unwritable(raw, error) from error


def write_set(draw: Draw, raw: Path, counts: Sequence[int], seed: int) -> None:
    """Draws labelled images for training and testing, as many as `counts` says, from two random streams of `seed`.

    They go to the folder `raw` as MNIST's four files, with the MD5 sums of the uncompressed ones. Raises OSError.
    """
    claim_folder(raw)
    splits = [draw(n, np.random.default_rng([seed, stream])) for stream, n in enumerate(counts)]
    files = dict(zip(IDX_NAMES, [array for split in splits for array in split], strict=True))
    sums = {name: hashlib.md5(idx_bytes(array), usedforsecurity=False).hexdigest() for name, array in files.items()}
    # The sums come first: a set that was cut short then fails its check, and is known as made when it is written again.
    replace_file(raw / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in files).encode())
    for name, array in files.items():
        write_idx(raw / f"{name}.gz", array)


def all_attributes(drawn: np.ndarray) -> np.ndarray:
    """The 40 attributes, (n, 40) int64 of 1 and -1, of faces with the 18 `drawn`, (n, 18) bool: of the other 22, those
    that follow from the drawn ones."""
    has = dict(zip(DRAWN, drawn.T, strict=True))
    has["High_Cheekbones"] = has["Smiling"]
    has["No_Beard"] = ~has["Mustache"]
    has["Wearing_Lipstick"] = has["Heavy_Makeup"]
    has["Young"] = ~has["Gray_Hair"]
    absent = np.zeros(len(drawn), dtype=bool)
    return np.stack([np.where(has.get(name, absent), 1, -1) for name in CELEBA_ATTRIBUTES.split()], axis=1)


def table(columns: Iterable[str], rows: np.ndarray) -> bytes:
    """A list in the manner of CelebA's: the count, the columns' names, a row of whole numbers for each image."""
    lines = [f"{len(rows)}", "".join(f"{name} " for name in columns)]
    lines += [f"{i:06}.jpg " + " ".join(f"{value:2}" for value in row) for i, row in enumerate(rows.tolist(), 1)]
    return "".join(f"{line}\r\n" for line in lines).encode()


def write_faces(folder: Path, counts: Sequence[int], seed: int) -> None:
    """Draws faces for training, validation and testing, as many as `counts` says, from three random streams of `seed`,
    and makes the folder of them: whole, or not at all. Raises OSError, its message being one line for the user."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already: give another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial")
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    with temporary as name:
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


MNIST_SPLITS = {"train": 60_000, "test": 10_000}
CELEBA_SPLITS = {"train": 8_000, "val": 1_000, "test": 1_000}

WORDS = {"train": "training", "val": "validation", "test": "testing"}

SETS: dict[str, tuple[str, str, dict[str, int], Callable[[Path, Sequence[int], int], None]]] = {
    "digits": ("MNIST/raw", "28x28 grey digits", MNIST_SPLITS, functools.partial(write_set, digits)),
    "fashion": ("FashionMNIST/raw", "28x28 grey garments", MNIST_SPLITS, functools.partial(write_set, garments)),
    "faces": ("celeba", "178x218 coloured faces", CELEBA_SPLITS, write_faces),
}
"""By command: the folder, what is drawn, how many for each split, and what writes them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Raises UsageError, in one line for the user, if the set can't be written."""
    parser = flags.Parser(prog="python -m mvae.synthetic", description="Make a data set.", exit_on_error=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (folder, what, splits, _) in SETS.items():
        dataset = folder.removesuffix("/raw").replace("celeba", "CelebA")
        command = commands.add_parser(
            name,
            help=f"{what}, as {dataset}'s files",
            description=f"Writes made images, {what}, to DIR/{folder}, in the layout of {dataset}'s files.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            exit_on_error=False,
        )
        command.add_argument("dir", metavar="DIR", type=types.path, help="the data folder, made if it is absent")
        for split, n in splits.items():
            command.add_argument(
                f"--{split}", type=types.whole_number(1, 10**6), default=n, help=f"images to draw for {WORDS[split]}"
            )
        command.add_argument(
            "--seed", type=types.whole_number(0, 2**32 - 1), default=0, help="the same seed, the same bytes"
        )
    cv2.setNumThreads(1)  # images this small gain nothing from threads, whose waiting costs others a core
    try:
        options = parser.parse_args(arguments)
        name, what, splits, write = SETS[options.command]
        folder, counts = options.dir / name, [getattr(options, split) for split in splits]
        write(folder, counts, options.seed)
    except (argparse.ArgumentError, OSError) as error:
        raise UsageError(str(error)) from None
    numbers = " + ".join(map(str, counts))
    print(f"{folder}: {numbers} made {what.split()[-1]} ({' + '.join(splits)}), seed {options.seed}")


if __name__ == "__main__":
    running.run(main)
