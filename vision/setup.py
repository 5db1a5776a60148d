"""Derive the grey pictures, edge maps and landmark masks of a folder of pictures, each in another folder.

    python setup.py grayscale ./data/images ./data/grayscale
    python setup.py edge      ./data/images ./data/edge
    python setup.py mask      ./data/images ./data/mask --predictor ./data/shape_predictor_68_face_landmarks.dat

Each result keeps its picture's file name. Run again, it goes on where it ended: what is there and whole is kept.
"""

# torch is not imported here, nor what imports it: to start would take several times as long.

import argparse
import bz2
import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image
from skimage import feature
from tqdm import tqdm

from mvae.datasets.picture_files import eight_bit
from mvae.errors import UsageError, UserError
from mvae.scripts import flags, running, types

if TYPE_CHECKING:  # only masks need dlib
    import dlib

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
JPEG_QUALITY = 95

N_LANDMARKS = 68
PREDICTOR = Path("./data/shape_predictor_68_face_landmarks.dat")
PREDICTOR_URL = "http://dlib.net/files/shape_predictor_68_face_landmarks.dat.bz2"

ALIGNED_SIZE = (178, 218)
ALIGNED_FACE = (46, 86, 135, 176)
"""Width and height of CelebA's aligned pictures, and the left, top, right and bottom of the face in them, in pixels:
the median of dlib's detections in 200 of the pictures, in 196 of which it found a face."""


class Outcome(NamedTuple):
    """What became of a picture: "made", "kept" (there and whole) or "damaged"."""

    name: str
    status: str
    content: bytes = b""
    face_found: bool = True
    reason: str = ""


def grayscale(image: Image.Image) -> Image.Image:
    """A picture's luminance (ITU-R 601-2), of mode "L"."""
    return image.convert("L")


def edge(image: Image.Image) -> Image.Image:
    """Canny's edges of the grey picture in [0, 1] smoothed by a Gaussian of σ = 2 pixels: white on black, mode "L"."""
    edges = feature.canny(np.asarray(grayscale(image)) / 255, sigma=2)
    return Image.fromarray(edges.astype(np.uint8) * 255)


def mask(image: Image.Image, face: "dlib.rectangle", predictor: "dlib.shape_predictor") -> Image.Image:
    """The regions of the face, black on white, mode "L": filled mouth, brows, eyes and nose, the jaw as a line."""
    from imutils.face_utils import FACIAL_LANDMARKS_68_IDXS, shape_to_np

    rgb = np.asarray(image.convert("RGB"))
    landmarks = shape_to_np(predictor(rgb, face), dtype="int32")  # (68, 2): x, y in pixels
    result = np.full(rgb.shape[:2], 255, dtype=np.uint8)
    for region, (start, end) in FACIAL_LANDMARKS_68_IDXS.items():
        points = landmarks[start:end]
        if region == "jaw":
            cv2.polylines(result, [points], isClosed=False, color=0, thickness=2)
        else:
            cv2.fillConvexPoly(result, cv2.convexHull(points), color=0)
    return Image.fromarray(result)


def find_face(image: Image.Image) -> "dlib.rectangle | None":
    """The face that dlib's detector finds; of several, the one that is nearest to the middle for its size."""
    faces = _detector()(np.asarray(image.convert("RGB")), 1)  # upsampled once, it finds faces from 40 pixels on
    middle = np.array(image.size) / 2

    def distance(face: "dlib.rectangle") -> float:
        return float(np.hypot(*(middle - (face.center().x, face.center().y)))) / face.width()

    return min(faces, key=distance, default=None)


def aligned_face(size: tuple[int, int]) -> "dlib.rectangle":
    """Where the face is in a picture aligned as CelebA's are, scaled to `size` (width, height)."""
    import dlib

    scales = (size[0] / ALIGNED_SIZE[0], size[1] / ALIGNED_SIZE[1]) * 2
    return dlib.rectangle(*(round(side * scale) for side, scale in zip(ALIGNED_FACE, scales, strict=True)))


@functools.cache
def load_predictor(path: Path) -> "dlib.shape_predictor":
    """A 68-point predictor from a file in dlib's format, read once by each process.

    Raises ValueError if the file holds none.
    """
    import dlib

    try:
        predictor = dlib.shape_predictor(str(path))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(str(error)) from None
    if predictor(np.zeros((8, 8), dtype=np.uint8), dlib.rectangle(0, 0, 7, 7)).num_parts != N_LANDMARKS:
        raise ValueError(f"not a predictor of {N_LANDMARKS} points")
    return predictor


@contextlib.contextmanager
def predictor_file(path: Path) -> Iterator[Path]:
    """The predictor's file, read once and found good; a decompressed copy of it if `path` is compressed by bzip2.

    Raises UserError if there is no such file, or no predictor in it.
    """
    compressed = Path(f"{PREDICTOR}.bz2")
    if path == PREDICTOR and not path.exists() and compressed.exists():
        path = compressed
    with tempfile.TemporaryDirectory(prefix="mvae-") as folder:
        unpacked = path
        try:
            with open(path, "rb") as source:
                is_packed = source.read(3) == b"BZh"
            if is_packed:
                unpacked = Path(folder, PREDICTOR.name)
                with bz2.open(path) as packed, open(unpacked, "wb") as copy:
                    shutil.copyfileobj(packed, copy)
            load_predictor(unpacked)  # processes that are forked have it from here
        except FileNotFoundError:
            raise UserError(
                f"there is no {path}: download {PREDICTOR_URL}, put it there (unpacked or not) or name --predictor FILE"
            ) from None
        except (OSError, EOFError) as error:
            raise UserError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
        except ValueError:
            raise UserError(
                f"{path} is no {N_LANDMARKS}-point predictor of dlib's, or a damaged one; a good one is {PREDICTOR_URL}"
            ) from None
        yield unpacked


def is_whole(path: Path) -> bool:
    """Whether there is a picture at `path` that can be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # PIL fails in many ways on a damaged file; each means the same
        return False
    return True


def convert(
    command: str,
    destination: Path,
    overwrite: bool,
    predictor: Path | None,
    fallback: bool,
    source: Path,
) -> Outcome:
    """Makes one picture's result, as the bytes of a file of its format; nothing is written.

    `predictor` is what a mask needs; where the detector finds no face, a mask is taken from the aligned frame if
    `fallback`, and otherwise left blank.
    """
    if not overwrite and is_whole(destination / source.name):
        return Outcome(source.name, "kept")
    try:
        with Image.open(source) as opened:
            image = eight_bit(opened)
    except Exception as error:  # as in is_whole
        return Outcome(source.name, "damaged", reason=getattr(error, "strerror", None) or str(error))
    face_found = True
    if command == "mask":
        assert predictor
        face = find_face(image)
        face_found = face is not None
        if face is None and fallback:
            face = aligned_face(image.size)
        result = Image.new("L", image.size, 255) if face is None else mask(image, face, load_predictor(predictor))
    else:
        result = {"grayscale": grayscale, "edge": edge}[command](image)
    return Outcome(source.name, "made", encode(result, source.suffix), face_found)


def encode(image: Image.Image, suffix: str) -> bytes:
    """The picture as a file of the format that `suffix` names."""
    buffer = io.BytesIO()
    bare = Image.fromarray(np.asarray(image))  # without the picture's colour profile, which isn't the result's
    bare.save(buffer, format=Image.registered_extensions()[suffix.lower()], quality=JPEG_QUALITY)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises UserError if it can't be written.

    It is not synced, which would take longer than all the rest: a file that a power cut spoils is found not to be whole
    and made anew.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; run again to go on") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder by name. Raises UserError if there are none."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    except OSError as error:
        raise UserError(f"can't read the folder of pictures {folder}: {error.strerror or error}") from None
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(EXTENSIONS)})")
    return found


def in_parallel(job: Callable[[Path], Outcome], sources: Sequence[Path], workers: int) -> Generator[Outcome]:
    """The job's outcomes, in the order of the sources. Raises BrokenProcessPool if a worker was killed.

    A few jobs a worker are handed out at a time, as those must be waited for when the run is stopped.
    """
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),)) as executor:
        futures: deque[Future[Outcome]] = deque()
        for source in sources:
            futures.append(executor.submit(job, source))
            if len(futures) >= 4 * workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def start_worker(parent: int) -> None:
    """Leaves a worker's end to its parent: Ctrl-C reaches both, and a fork has the parent's way with SIGTERM.

    Where the parent is killed and can't end it, the worker ends within a second.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_after_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_after_parent, daemon=True).start()


def convert_all(args: argparse.Namespace, sources: Sequence[Path], predictor: Path | None) -> None:
    """Converts the pictures in parallel, writes the results to args.dst and reports what became of them.

    Raises UserError if a picture was damaged (the others being done), a result can't be written, or a worker died.
    """
    try:
        args.dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the folder {args.dst}: {error.strerror or error}") from None
    fallback = args.command == "mask" and args.fallback
    job = functools.partial(convert, args.command, args.dst, args.overwrite, predictor, fallback)
    statuses: Counter[str] = Counter()
    try:
        with contextlib.closing(in_parallel(job, sources, args.workers)) as outcomes:
            for outcome in tqdm(outcomes, args.command, len(sources), leave=False, unit="picture", disable=None):
                statuses[outcome.status] += 1
                statuses["no face"] += not outcome.face_found
                if outcome.status == "made":
                    write(args.dst / outcome.name, outcome.content)
                elif outcome.status == "damaged":
                    tqdm.write(f"can't read {args.src / outcome.name}: {outcome.reason}", file=sys.stderr)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed: run again to go on, with fewer --workers if memory is short"
        ) from None
    print(f"{args.dst}: made {statuses['made']}, kept {statuses['kept']} that were there")
    if statuses["no face"]:
        then = f"their masks are {'from the aligned frame' if fallback else 'blank'}"
        print(f"the detector found no face in {statuses['no face']} of the {statuses['made']}: {then}")
    if statuses["damaged"]:
        raise UserError(f"{statuses['damaged']} of {len(sources)} pictures can't be read, named above")


def parse_arguments() -> argparse.Namespace:
    shared = flags.Parser(add_help=False)
    shared.add_argument("src", metavar="SRC", type=types.path, help="folder of the pictures")
    shared.add_argument("dst", metavar="DST", type=types.path, help="folder to write into, made if it is absent")
    shared.add_argument(
        "--workers", type=types.concurrency, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    shared.add_argument("--overwrite", action="store_true", help="make anew what is there, too")
    shared.add_argument("--limit", type=types.positive_int, metavar="N", help="the first N pictures only")
    description, usage = (__doc__ or "").split("\n\n", 1)
    parser = flags.Parser(description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("grayscale", parents=[shared], help="luminance, by PIL")
    commands.add_parser("edge", parents=[shared], help="Canny's edges, white on black, by scikit-image")
    masks = commands.add_parser("mask", parents=[shared], help="regions of the face, black on white, by dlib")
    masks.add_argument(
        "--predictor",
        type=types.path,
        default=PREDICTOR,
        metavar="FILE",
        help="dlib's 68-point predictor, .dat or .dat.bz2 (default: %(default)s)",
    )
    masks.add_argument(
        "--no-fallback",
        dest="fallback",
        action="store_false",
        help="leave a mask blank where no face is found, not to take it from the frame that CelebA is aligned to",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    sources = list_pictures(args.src)[: args.limit]
    if args.src.resolve() == args.dst.resolve():
        raise UsageError(f"SRC and DST are both {args.src}: name another folder to write into")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the workers and the temporary file would stay
    if args.command != "mask":
        convert_all(args, sources, None)
        return
    try:
        import dlib  # noqa: F401
        import imutils.face_utils  # noqa: F401
    except ImportError as error:
        raise UserError(f"masks need dlib and imutils ({error}): pip install dlib-bin imutils") from None
    with predictor_file(args.predictor) as predictor:
        convert_all(args, sources, predictor)


@functools.cache
def _detector():
    import dlib

    return dlib.get_frontal_face_detector()


if __name__ == "__main__":
    running.run(main)
