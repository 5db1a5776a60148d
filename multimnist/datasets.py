"""MultiMNIST: canvases (1, 50, 50) in [0, 1] with 0 to 4 MNIST digits as `image`, and the digits' string as `text`.

As a command it makes the canvases from MNIST, in place of any others: python datasets.py [--canvas-dir DIR]. train.py
with the same --canvas-dir uses them; if they are missing, it makes the default ones.
"""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvae import cli
from mvae.data import mnist
from mvae.data.dataset import Data, DataDir, pictures_and_labels, split
from mvae.errors import UsageError, UserError
from mvae.files import write_atomically
from mvae.run.checkpoint import digest
from mvae.tools.controls import Kind, Picture, Value

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "multimnist"
LENGTH = 4  # symbols of a text: up to four digits, then FILL
FILL = 10  # the symbol after the digits 0 to 9

CANVAS, DIGIT = 50, 28  # pixels
SCALE = 1.3
CORNERS = ((4, 4), (4, 23), (23, 4), (23, 23))  # (top, left) of each digit's square, in reading order
FILE = "canvases.pt"
HELD_OUT = 12  # the last twelfth of the training canvases shows the last twelfth of MNIST's training digits


@dataclass(kw_only=True)
class Recipe:
    """The canvases to make: with MNIST, it determines every byte."""

    # Canvases
    min_digits: int = 0  # fewest digits on a canvas
    max_digits: int = LENGTH  # most digits on a canvas; all numbers of digits are equally likely
    fixed: bool = True  # digits of 21x21 pixels at the four corners in reading order, otherwise anywhere
    no_resize: bool = False  # with --no-fixed: digits of 28x28 pixels
    no_translate: bool = False  # with --no-fixed: a single digit in the centre
    scramble: bool = False  # texts list the digits in random order
    reverse: bool = False  # half of the texts, chosen at random, are reversed
    no_repeat: bool = False  # the digits of a canvas differ
    seed: int = 0  # random seed
    train: int = 60_000  # number of training canvases
    test: int = 10_000  # number of test canvases

    def __post_init__(self) -> None:
        if not 0 <= self.min_digits <= self.max_digits <= LENGTH:
            raise UsageError(
                f"need 0 <= min_digits <= max_digits <= {LENGTH}, got {self.min_digits} and {self.max_digits}"
            )
        if self.fixed and (self.no_resize or self.no_translate):
            raise UsageError("--no-resize and --no-translate need --no-fixed: the four corners hold scaled digits")
        if self.no_translate and self.max_digits > 1:
            raise UsageError("--no-translate needs --max-digits 1: the centre holds one digit")
        if self.no_resize and self.max_digits > 2:
            raise UsageError("--no-resize needs --max-digits 2 or less: more digits of this size overlap")
        if self.scramble and self.reverse:
            raise UsageError("--scramble and --reverse can't be combined: a scrambled text has a random order already")
        for name, least in (("seed", 0), ("train", 1), ("test", 1)):
            if not least <= getattr(self, name) < 2**32:
                raise UsageError(f"{name} must be an integer >= {least}, got {getattr(self, name)}")

    @property
    def side(self) -> int:
        """The height and width of a digit's square in pixels."""
        return DIGIT if self.no_resize else int(DIGIT / SCALE)

    @property
    def command(self) -> str:
        """The command that makes these canvases."""
        words = ["python datasets.py"]
        for field in dataclasses.fields(self):
            flag, value = field.name.replace("_", "-"), getattr(self, field.name)
            if value != field.default:
                words.append(
                    f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}"
                )
        return " ".join(words)


@dataclass(kw_only=True)
class Source(DataDir):
    # Data
    canvas_dir: Path = Path("data/MultiMNIST")  # folder of the canvases, made from MNIST


def encode(text: str) -> Tensor:
    """Return the symbols (LENGTH,) of a string of digits: '17' -> 1, 7, FILL, FILL. Raises UsageError."""
    if not re.fullmatch(f"[0-9]{{0,{LENGTH}}}", text):
        raise UsageError(f"a text must have 0 to {LENGTH} digits, such as 1773 or 007, got {text!r}")
    return torch.tensor([*map(int, text), *[FILL] * (LENGTH - len(text))])


def decode(symbols: Tensor) -> list[str]:
    """Return the strings of (n, LENGTH) symbols, each up to its first FILL."""
    return ["".join("0123456789|"[symbol] for symbol in row).split("|")[0] for row in symbols.tolist()]


class Text(Kind):
    """Up to four digits; '' is the empty canvas."""

    def values(self, words: str) -> list[Value]:
        """Parse texts separated by commas; leading zeros count."""
        return [Value(text or "of no digits", encode(text).unsqueeze(0)) for text in words.split(",")]

    def lines(self, x: Tensor) -> list[str]:
        return decode(x.argmax(dim=2) if x.dim() == 3 else x)

    def colours(self, name: str, x: Tensor) -> dict[str, tuple[Tensor, Sequence[str]]]:
        """Return each text's number of digits."""
        return {"digits": ((x != FILL).sum(dim=1), [f"{n} digits" for n in range(LENGTH + 1)])}


CONTROLS = {"image": Picture("L", CANVAS, dark=True, pen=2), "text": Text()}


def prepare(data_dir: Path, canvas_dir: Path, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make the canvases if `canvas_dir` has none, and return the fields of their recipe.

    Args:
        recipe: the fields of the recipe that a model was trained on; None accepts any canvases, and makes the default
            ones.

    Raises UserError if MNIST is missing, the file is damaged or can't be written, or it has another recipe.
    """
    path = canvas_dir / FILE
    wanted = Recipe() if recipe is None else Recipe(**recipe)
    if not path.exists():
        print(f"making the canvases {path}", flush=True)
        make(data_dir, canvas_dir, wanted)
        return dataclasses.asdict(wanted)
    found = _read(canvas_dir)["recipe"]
    if recipe is not None and found != recipe:
        remedy = f"pass the folder of the right ones, or make them: {wanted.command} --canvas-dir FOLDER"
        raise UserError(f"{path} holds other canvases than the model was trained on: {remedy}")
    return found


def training_data(canvas_dir: Path, *, n_val: int, limit: int | None = None) -> tuple[Data, Data]:
    """Return training and validation canvases. Raises UserError if the file is missing or damaged.

    In the default set, the digits of the last 5,000 canvases occur in no other training canvas.
    """
    return split(_data(canvas_dir, "train"), n_val, limit)


def test_data(canvas_dir: Path) -> Data:
    """Return the test canvases, made of MNIST's test digits. Raises UserError as `training_data` does."""
    return _data(canvas_dir, "test")


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the split "train", "validation" or "test" of the canvases that a model with these settings is for."""
    prepare(config.data_dir, config.canvas_dir, settings["canvases"])
    if split == "test":
        return test_data(config.canvas_dir)
    train, validation = training_data(config.canvas_dir, n_val=settings["n_val"])
    return train if split == "train" else validation


def make(data_dir: Path, canvas_dir: Path, recipe: Recipe) -> None:
    """Draw both splits and write them as one file, in place of any other. Raises UserError as `prepare` does."""
    content: dict[str, Any] = {"recipe": dataclasses.asdict(recipe)}
    for stream, (part, source, n) in enumerate((("train", "train", recipe.train), ("test", "t10k", recipe.test))):
        images, labels = (tensor.numpy() for tensor in mnist.load_idx(data_dir, "MNIST", source))
        rng = np.random.default_rng([recipe.seed, stream])
        image, text = draw(images, labels, n, recipe, rng, held_out=HELD_OUT if part == "train" else None)
        content |= {f"{part}_image": torch.from_numpy(image), f"{part}_text": torch.from_numpy(text)}
    buffer = io.BytesIO()
    torch.save({**content, "digest": digest(content)}, buffer)
    write_atomically(canvas_dir / FILE, buffer.getvalue())


def draw(
    images: np.ndarray,
    labels: np.ndarray,
    n: int,
    recipe: Recipe,
    rng: np.random.Generator,
    held_out: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw n canvases (n, 50, 50) and their texts' symbols (n, 4) from digits (N, 28, 28) and their labels (N,), uint8.

    With `held_out` K, the last 1/K of the canvases shows the last 1/K of the digits, and the others show the others.
    Raises UserError if the digits have too few classes for `no_repeat`, or are too large to place.
    """
    counts = rng.integers(recipe.min_digits, recipe.max_digits + 1, n)
    used = np.arange(LENGTH) < counts[:, None]
    digits = _draw_digits(labels, used, recipe.no_repeat, rng, held_out)
    squares = _scaled(images, recipe.side)
    if recipe.fixed:
        corners = np.broadcast_to(CORNERS, (n, LENGTH, 2))
    elif recipe.no_translate:
        corners = np.full((n, LENGTH, 2), (CANVAS - recipe.side) // 2)
    else:
        corners = _draw_corners(_ink_boxes(squares)[digits], used, CANVAS - recipe.side, rng)
    order = _reading_order(corners, used, recipe.side)
    digits = np.take_along_axis(digits, order, axis=1)
    corners = np.take_along_axis(corners, order[:, :, None], axis=1)

    canvases = np.zeros((n, CANVAS, CANVAS), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(
        canvases, (recipe.side, recipe.side), axis=(1, 2), writeable=True
    )
    for place in range(LENGTH):
        rows = used[:, place].nonzero()[0]
        where = rows, *corners[rows, place].T
        # the squares of two corners overlap by two rows or columns, where at most one digit has ink: keep the brighter
        windows[where] = np.maximum(windows[where], squares[digits[rows, place]])

    rank = np.tile(np.arange(LENGTH, dtype=float), (n, 1))
    if recipe.scramble:
        rank = rng.random((n, LENGTH))
    elif recipe.reverse:
        rank = rank * rng.choice([-1, 1], (n, 1))
    rank = np.where(used, rank, np.inf).argsort(axis=1, kind="stable")
    return canvases, np.take_along_axis(np.where(used, labels[digits], FILL), rank, axis=1).astype(np.uint8)


def _draw_digits(
    labels: np.ndarray, used: np.ndarray, no_repeat: bool, rng: np.random.Generator, held_out: int | None
) -> np.ndarray:
    """Return which digits each canvas shows, (n, LENGTH) indices into `labels`."""
    n, total = len(used), len(labels)
    low, high = np.zeros(n, int), np.full(n, total)
    if held_out and total >= held_out:
        last = np.arange(n) >= n - n // held_out
        low, high = np.where(last, total - total // held_out, 0), np.where(last, total, total - total // held_out)
    pools = set(zip(low.tolist(), high.tolist(), strict=True))
    most = int(used.sum(axis=1).max(initial=0))
    if no_repeat and any(len(np.unique(labels[slice(*pool)])) < most for pool in pools):
        raise UserError(f"--no-repeat: these digits don't have {most} classes")
    digits = np.empty(used.shape, int)
    rows = np.arange(n)
    while len(rows):
        digits[rows] = rng.integers(low[rows, None], high[rows, None], (len(rows), LENGTH))
        if not no_repeat:
            break
        shown = np.sort(np.where(used[rows], labels[digits[rows]], -1 - np.arange(LENGTH)), axis=1)
        rows = rows[(np.diff(shown, axis=1) == 0).any(axis=1)]
    return digits


def _scaled(images: np.ndarray, side: int) -> np.ndarray:
    """Resize (N, 28, 28) uint8 to (N, side, side) uint8, antialiased."""
    if side == DIGIT:
        return images
    pixels = torch.from_numpy(images).unsqueeze(1)
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).squeeze(1).numpy()


def _ink_boxes(squares: np.ndarray) -> np.ndarray:
    """Return the bounding box of each square's ink, (N, 2, 2): its (top, left) and its (bottom, right), exclusive."""
    side = squares.shape[1]
    ink = np.stack([squares.max(axis=2), squares.max(axis=1)], axis=1) > 0  # (N, 2, side): which rows, which columns
    return np.stack([ink.argmax(axis=2), side - ink[..., ::-1].argmax(axis=2)], axis=1)


def _draw_corners(boxes: np.ndarray, used: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Draw positions (n, LENGTH, 2) from 0 to `most`, each canvas's until no two ink boxes overlap."""
    corners = np.empty((*used.shape, 2), int)
    rows = np.arange(len(used))
    for _ in range(10_000):  # one in six tries succeeds for two digits of 28 pixels, one in 85 for four of 21
        corners[rows] = rng.integers(0, most + 1, (len(rows), LENGTH, 2))
        start, end = (boxes[rows, :, edge] + corners[rows] for edge in (0, 1))
        before = np.all(start[:, :, None] < end[:, None], axis=3)
        pairs = used[rows, :, None] & used[rows, None] & ~np.eye(LENGTH, dtype=bool)
        rows = rows[np.any(before & before.swapaxes(1, 2) & pairs, axis=(1, 2))]
        if not len(rows):
            return corners
    raise UserError(f"{len(rows)} canvases have digits that are too large to place: lower --max-digits")


def _reading_order(corners: np.ndarray, used: np.ndarray, side: int) -> np.ndarray:
    """Return the reading order, (n, LENGTH): upper half from left to right, lower half, unused.

    A digit belongs to the half that holds the centre of its square.
    """
    lower = corners[..., 0] + side / 2 >= CANVAS / 2
    return np.where(used, lower * CANVAS + corners[..., 1], 2 * CANVAS).argsort(axis=1, kind="stable")


def _read(canvas_dir: Path) -> dict[str, Any]:
    path = canvas_dir / FILE
    try:
        content = torch.load(path, weights_only=True)
        if content.pop("digest") == digest(content):
            return content
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    except Exception:  # torch.load raises many kinds of error for a damaged file
        pass
    raise UserError(f"{path} is damaged: delete it, or make it again by `python datasets.py` with the same flags")


def _data(canvas_dir: Path, part: str) -> Data:
    content = _read(canvas_dir)
    tensors = {"image": content[f"{part}_image"].unsqueeze(1), "text": content[f"{part}_text"]}
    return Data(tensors=tensors, transform=pictures_and_labels)


@dataclass(kw_only=True)
class Config(Source, Recipe):
    pass


def main() -> None:
    config = cli.parse(__doc__, Config)
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    make(config.data_dir, config.canvas_dir, recipe)
    print(f"MultiMNIST in {config.canvas_dir}: {recipe.train} training and {recipe.test} test canvases")


if __name__ == "__main__":
    cli.run(main)
