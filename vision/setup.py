"""Derive the grey pictures, edge maps and landmark masks of a folder of pictures, each in another folder.

    python setup.py grayscale ./data/images ./data/grayscale
    python setup.py edge      ./data/images ./data/edge
    python setup.py mask      ./data/images ./data/mask --predictor ./data/shape_predictor_68_face_landmarks.dat

Each result has its picture's file name. A rerun continues where the last one ended: it keeps results that are complete.
"""

import bz2
import contextlib
import functools
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvae import cli
from mvae.data.pictures import eight_bit, fault, is_named_as_picture, open_picture
from mvae.data.pool import in_parallel
from mvae.errors import UsageError, UserError
from mvae.files import check_readable, write_atomically
from mvae.progress import progress

import cv2
import numpy as np
from PIL import Image
from skimage import feature
from tqdm import tqdm

try:
    import dlib
except ImportError:  # only masks need it
    dlib = None

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
JPEG_QUALITY = 95

PREDICTOR = Path("./data/shape_predictor_68_face_landmarks.dat")
PREDICTOR_URL = "http://dlib.net/files/shape_predictor_68_face_landmarks.dat.bz2"

N_LANDMARKS = 68
JAW = slice(0, 17)
FILLED = (slice(17, 22), slice(22, 27), slice(27, 36), slice(36, 42), slice(42, 48), slice(48, 68))
"""The landmarks of the brows, nose, eyes and mouth."""

ALIGNED_SIZE = (178, 218)
ALIGNED_FACE = (46, 86, 135, 176)
"""Width and height of CelebA's aligned pictures, and left, top, right and bottom of the face in them, in pixels: the
median of dlib's detections in 200 pictures (it found a face in 196)."""


@dataclass(kw_only=True)
class Config:
    command: Literal["grayscale", "edge", "mask"]  # luminance, edges (white on black) or face regions (black on white)
    src: Path  # folder of the pictures
    dst: Path  # folder to write into, created if missing

    # Pictures
    limit: int | None = None  # number of pictures to use, evenly spaced by name, so that all splits have some
    overwrite: bool = False  # replace results that are complete
    workers: int = os.cpu_count() or 1  # number of processes

    # Masks
    predictor: Path = PREDICTOR  # dlib's 68-point predictor, .dat or .dat.bz2
    fallback: bool = True  # where no face is found, use the frame that CelebA is aligned to instead of a blank mask

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be an integer >= 1, got {self.limit}")
        if self.src.resolve() == self.dst.resolve():
            raise UsageError(f"src and dst must differ, got {self.src} for both")
        if self.command != "mask" and (self.predictor != PREDICTOR or not self.fallback):
            raise UsageError(f"--predictor and --no-fallback apply to masks only, not to {self.command}")


def grayscale(image: Image.Image) -> Image.Image:
    """Return the luminance (ITU-R 601-2), of mode "L"."""
    return image.convert("L")


def edge(image: Image.Image) -> Image.Image:
    """Return the edges, white on black, mode "L": Canny's with σ = 2 pixels on the grey picture in [0, 1]."""
    edges = feature.canny(np.asarray(grayscale(image)) / 255, sigma=2)
    return Image.fromarray(edges.astype(np.uint8) * 255)


def mask(image: Image.Image, face: "dlib.rectangle", predictor: "dlib.shape_predictor") -> Image.Image:
    """Return the face's regions, black on white, mode "L": filled mouth, brows, eyes and nose, the jaw as a line."""
    rgb = np.asarray(image.convert("RGB"))
    landmarks = np.array([(point.x, point.y) for point in predictor(rgb, face).parts()], dtype=np.int32)
    result = np.full(rgb.shape[:2], 255, dtype=np.uint8)
    for region in FILLED:
        cv2.fillConvexPoly(result, cv2.convexHull(landmarks[region]), color=0)
    cv2.polylines(result, [landmarks[JAW]], isClosed=False, color=0, thickness=2)
    return Image.fromarray(result)


def find_face(image: Image.Image) -> "dlib.rectangle | None":
    """Return the face that dlib's detector finds; of several, the most central for its size."""
    faces = _detector()(np.asarray(image.convert("RGB")), 1)  # upsampled once, it finds faces from 40 pixels on
    middle = np.array(image.size) / 2

    def distance(face: "dlib.rectangle") -> float:
        return float(np.hypot(*(middle - (face.center().x, face.center().y)))) / face.width()

    return min(faces, key=distance, default=None)


@functools.cache
def _detector():
    return dlib.get_frontal_face_detector()


def aligned_face(size: tuple[int, int]) -> "dlib.rectangle":
    """Return where the face is in a picture aligned as CelebA's are, scaled to `size` (width, height)."""
    scales = (size[0] / ALIGNED_SIZE[0], size[1] / ALIGNED_SIZE[1]) * 2
    return dlib.rectangle(*(round(side * scale) for side, scale in zip(ALIGNED_FACE, scales, strict=True)))


@functools.cache
def load_predictor(path: Path) -> "dlib.shape_predictor":
    """Read a predictor of 68 points, once in each process. Raises RuntimeError, MemoryError or ValueError."""
    predictor = dlib.shape_predictor(str(path))
    if predictor(np.zeros((8, 8), dtype=np.uint8), dlib.rectangle(0, 0, 7, 7)).num_parts != N_LANDMARKS:
        raise ValueError("it has another number of points")
    return predictor


@contextlib.contextmanager
def predictor_file(path: Path) -> Iterator[Path]:
    """Check the predictor and yield its path, or that of a decompressed copy if the file is packed by bzip2.

    Raises UserError if the file is missing or isn't a 68-point predictor.
    """
    packed = PREDICTOR.with_name(f"{PREDICTOR.name}.bz2")
    if path == PREDICTOR and not path.exists() and packed.exists():
        path = packed
    with tempfile.TemporaryDirectory(prefix="mvae-") as folder:
        unpacked = path
        try:
            if path.exists():
                check_readable(path)
            content = path.read_bytes()
            if content.startswith(b"BZh"):
                unpacked = Path(folder, PREDICTOR.name)
                unpacked.write_bytes(bz2.decompress(content))
            load_predictor(unpacked)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: download {PREDICTOR_URL} to it (packed or not), or pass --predictor FILE"
            ) from None
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise UserError(
                f"{path} isn't dlib's {N_LANDMARKS}-point predictor, or is damaged ({error}): download {PREDICTOR_URL}"
            ) from None
        yield unpacked


def is_whole(path: Path) -> bool:
    """Return whether the file is a picture that can be read to its end."""
    try:
        check_readable(path)
        with Image.open(path) as image:
            image.load()
    except Exception:  # PIL raises many kinds of error for a damaged file
        return False
    return True


def convert(config: Config, predictor: Path | None, source: Path) -> tuple[str, str]:
    """Make one picture's result and write it.

    Returns "made", "no face" (made without one), "kept" or "damaged", and what is wrong with a damaged picture.
    """
    destination = config.dst / source.name
    if not config.overwrite and is_whole(destination):
        return "kept", ""
    written = destination.resolve()
    if written == source.resolve() or written.parent == config.src.resolve():
        raise UserError(f"{destination} is the same file as a picture of {config.src}: choose another dst")
    try:
        with open_picture(source) as opened:
            image = eight_bit(opened)
    except Exception as error:
        return "damaged", f"can't read {source}: {fault(error)}"
    status = "made"
    if predictor:
        face = find_face(image)
        if face is None:
            status, face = "no face", aligned_face(image.size) if config.fallback else None
        result = mask(image, face, load_predictor(predictor)) if face else Image.new("L", image.size, 255)
    else:
        result = edge(image) if config.command == "edge" else grayscale(image)
    buffer = io.BytesIO()
    bare = Image.fromarray(np.asarray(result))  # without the colour profile of the source, which doesn't apply
    bare.save(buffer, Image.registered_extensions()[source.suffix.lower()], quality=JPEG_QUALITY)
    write_atomically(destination, buffer.getvalue(), sync=False)  # a file that a power cut spoils is made again
    return status, ""


def convert_all(config: Config, sources: Sequence[Path], predictor: Path | None = None) -> None:
    """Convert the pictures in parallel and report the outcomes.

    Raises UserError if pictures were damaged (the others are done), a result can't be written, or a worker died.
    """
    statuses: Counter[str] = Counter()
    job = functools.partial(convert, config, predictor)
    with contextlib.closing(in_parallel(job, sources, config.workers)) as outcomes:
        for status, what in progress(outcomes, config.command, len(sources)):
            statuses[status] += 1
            if status == "damaged":
                tqdm.write(what, file=sys.stderr)  # not into the progress bar
    n_made = statuses["made"] + statuses["no face"]
    print(f"{config.dst}: made {n_made}, kept {statuses['kept']} that are complete")
    if statuses["no face"]:
        then = "from the aligned frame" if config.fallback else "blank"
        print(f"the detector found no face in {statuses['no face']} of the {n_made}: their masks are {then}")
    if statuses["damaged"]:
        raise UserError(f"{statuses['damaged']} of {len(sources)} pictures can't be read, listed above")


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder by name. Raises UserError if it has none."""
    paths = sorted(folder.iterdir())
    found = [path for path in paths if path.is_file() and is_named_as_picture(path.name, EXTENSIONS)]
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(EXTENSIONS)})")
    if others := len(paths) - len(found):
        print(f"skipped {others} of {len(paths)} entries of {folder}, which aren't pictures ({', '.join(EXTENSIONS)})")
    return found


def main() -> None:
    config = cli.parse(__doc__, Config)
    sources = list_pictures(config.src)
    n = min(config.limit or len(sources), len(sources))
    sources = [sources[i * len(sources) // n] for i in range(n)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    if config.command != "mask":
        convert_all(config, sources)
        return
    if dlib is None:
        raise UserError("masks need dlib: pip install dlib-bin")
    with predictor_file(config.predictor) as predictor:
        convert_all(config, sources, predictor)


if __name__ == "__main__":
    cli.run(main)
