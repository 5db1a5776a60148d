"""MultiMNIST: canvases (1, 50, 50) in [0, 1] with 0 to 4 MNIST digits as `image`, and their digits as `text`.

As a command it makes the set anew from MNIST: python datasets.py [--fixed] [--data-dir DIR] [--canvas-dir DIR].
The canvases go to --canvas-dir, by default ./data/MultiMNIST, since the folder of MNIST may be read-only; train.py
with the same --canvas-dir trains on the set that stands there, and makes the default one if there is none.
"""

import argparse
import dataclasses
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvae.datasets import mnist
from mvae.errors import UsageError, UserError
from mvae.files import write_atomically
from mvae.scripts import flags, running, training, types
from mvae.scripts.kinds import Kind, Picture

if TYPE_CHECKING:
    from torch import Tensor

    from mvae import Data

MODALITIES = ("image", "text")
LENGTH = 4  # symbols of a text: up to four digits, then FILL
FILL = 10  # the symbol after the digits 0 to 9

CANVAS, DIGIT = 50, 28  # pixels
SCALE = 1.3
CORNERS = ((4, 4), (4, 23), (23, 4), (23, 23))  # (top, left) of each digit's square, in reading order
FILE = "canvases.pt"
HELD_OUT = 12  # the last twelfth of the training canvases shows the last twelfth of MNIST's training digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the canvases are: with MNIST it decides every byte. The fields are the flags; see `_parser`.

    Raises UsageError for a combination that can't be made.
    """

    min_digits: int = 0
    max_digits: int = LENGTH
    fixed: bool = True
    no_resize: bool = False
    no_translate: bool = False
    scramble: bool = False
    reverse: bool = False
    no_repeat: bool = False
    seed: int = 0
    train: int = 60_000
    test: int = 10_000

    def __post_init__(self) -> None:
        if self.min_digits > self.max_digits:
            raise UsageError(f"--min-digits {self.min_digits} is more than --max-digits {self.max_digits}")
        if self.fixed and (self.no_resize or self.no_translate):
            raise UsageError("--no-resize and --no-translate go with --no-fixed: the four corners hold scaled digits")
        if self.no_translate and self.max_digits > 1:
            raise UsageError("--no-translate puts digits in the centre, where but one has room: add --max-digits 1")
        if self.no_resize and self.max_digits > 2:
            raise UsageError("--no-resize leaves room for two digits that don't overlap: add --max-digits 2 or less")
        if min(self.train, self.test) < 1:
            raise UsageError(f"--train {self.train} and --test {self.test} are canvases of each split: 1 or more")
        if self.scramble and self.reverse:
            raise UsageError("--scramble and --reverse exclude each other: a scrambled text has any order already")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Recipe":
        """The recipe of these fields, as `dataclasses.asdict` gives them. Raises UserError if they are no recipe's."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if {name: type(value) for name, value in fields.items()} != kinds:
            raise UserError(f"there is no such recipe of canvases, which has {', '.join(kinds)}: {dict(fields)!r:.200}")
        return cls(**fields)

    @property
    def side(self) -> int:
        """The height and width of a digit's square in pixels."""
        return DIGIT if self.no_resize else int(DIGIT / SCALE)

    @property
    def command(self) -> str:
        """The command that makes this set."""
        fields = dataclasses.asdict(self)
        flags = {f"--{name.replace('_', '-')}": value for name, value in fields.items() if value is not False}
        words = [flag if value is True else f"{flag} {value}" for flag, value in flags.items()]
        return " ".join(["python datasets.py", *words, *["--no-fixed"] * (not self.fixed)])


def encode(text: str) -> "Tensor":
    """The symbols (LENGTH,) of a string of digits: '17' -> 1, 7, FILL, FILL. Raises ValueError for any other string."""
    import torch

    if not _is_text(text):
        raise ValueError(f"{text!r} is not a string of up to {LENGTH} digits")
    return torch.tensor([*map(int, text), *[FILL] * (LENGTH - len(text))])


def _is_text(text: str) -> bool:
    return re.fullmatch(f"[0-9]{{0,{LENGTH}}}", text) is not None


def decode(symbols: "Tensor") -> list[str]:
    """The strings of (n, LENGTH) symbols, each up to its first FILL."""
    return ["".join("0123456789|"[symbol] for symbol in row).split("|")[0] for row in symbols.tolist()]


class Text(Kind):
    """The kind of `text`: up to four digits. A value is a string."""

    metavar = "TEXT,TEXT"
    help = "these texts, up to four digits each, with commas between them; '' is the empty canvas"

    def values(self, words: str) -> list[str]:
        """Texts with commas between them; leading zeros count, and '' is the empty canvas."""
        for word in words.split(","):
            if not _is_text(word):
                allowed = f"0 to {LENGTH} digits, such as 1773 or 007, or '' for the empty canvas"
                raise argparse.ArgumentTypeError(f"{word!r} is not a text of MultiMNIST: {allowed}")
        return words.split(",")

    def say(self, value: str) -> str:
        return value or "of no digits"

    def tensor(self, value: str) -> "Tensor":
        return encode(value).unsqueeze(0)

    def likeliest(self, mean: "Tensor") -> "Tensor":
        return mean.argmax(dim=2)

    def lines(self, x: "Tensor") -> list[str]:
        return decode(x)

    def where(self, stored: "Tensor", value: str) -> "Tensor":
        return (stored == encode(value)).all(dim=1)

    def colours(self, name: str, x: "Tensor") -> dict[str, tuple["Tensor", Sequence[str]]]:
        """How many digits a text has."""
        return {"digits": ((x != FILL).sum(dim=1), [f"{n} digits" for n in range(LENGTH + 1)])}


CONTROLS = {"image": Picture("L", CANVAS, dark=True, pen=2), "text": Text()}


def add_canvas_dir(parser: argparse.ArgumentParser) -> None:
    """The flag --canvas-dir, which every script has."""
    default = Path("./data/MultiMNIST")
    parser.add_argument(
        "--canvas-dir", type=types.path, default=default, help="folder of the canvases, made from MNIST"
    )


def prepare(data_dir: Path, canvas_dir: Path, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Makes the canvases if there are none in `canvas_dir`, and returns the recipe of those that are there.

    Args:
        recipe: the fields of the `Recipe` wanted; None: those of the canvases that are there, else the default.

    Raises UserError if MNIST can't be had, the file is damaged or can't be written, or its recipe isn't the wanted one.
    """
    path = canvas_dir / FILE
    if not path.exists():
        wanted = Recipe() if recipe is None else Recipe.of(recipe)
        print(f"making the canvases {path}", flush=True)
        make(data_dir, canvas_dir, wanted)
        return dataclasses.asdict(wanted)
    found = _read(canvas_dir)["recipe"]
    if recipe is not None and found != recipe:
        remedy = f"name the folder of those, or make them in another: {Recipe.of(recipe).command} --canvas-dir FOLDER"
        raise UserError(f"{path} holds other canvases than the model was trained on: {remedy}")
    return found


def training_data(canvas_dir: Path, *, n_val: int, limit: int | None = None) -> tuple["Data", "Data"]:
    """Training and validation canvases. Raises UserError if the file is absent or damaged.

    Of the default set, the last 5,000 canvases show digits that no other training canvas shows.
    """
    from mvae.data import split

    return split(_data(canvas_dir, "train"), n_val, limit)


def test_data(canvas_dir: Path) -> "Data":
    """The test canvases, of MNIST's test digits. Raises UserError as `training_data` does."""
    return _data(canvas_dir, "test")


def examples(split: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> "Data":
    """The split "train", "validation" or "test" of the canvases that a model of these settings is of."""
    prepare(args.data_dir, args.canvas_dir, training.recorded(settings, "canvases", dict))
    if split == "test":
        return test_data(args.canvas_dir)
    train, validation = training_data(args.canvas_dir, n_val=training.recorded(settings, "n_val", int))
    return train if split == "train" else validation


def make(data_dir: Path, canvas_dir: Path, recipe: Recipe) -> None:
    """Draws both splits and writes them as one file, in place of any other. Raises UserError as `prepare` does.

    Runs that make it at the same time write a file each, and rename it when it is complete.
    """
    import torch

    content: dict[str, Any] = {"recipe": dataclasses.asdict(recipe)}
    for stream, (part, source, n) in enumerate((("train", "train", recipe.train), ("test", "t10k", recipe.test))):
        images, labels = (tensor.numpy() for tensor in mnist.load_idx(data_dir, "MNIST", source))
        rng = np.random.default_rng([recipe.seed, stream])
        image, text = draw(images, labels, n, recipe, rng, held_out=HELD_OUT if part == "train" else None)
        content |= {f"{part}_image": torch.from_numpy(image), f"{part}_text": torch.from_numpy(text)}
    content["digest"] = _digest(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        canvas_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=canvas_dir) as own:
            write_atomically(Path(own, FILE), buffer.getvalue())
            os.replace(Path(own, FILE), canvas_dir / FILE)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write {canvas_dir / FILE} ({reason}): name a folder with --canvas-dir") from None


def draw(
    images: np.ndarray,
    labels: np.ndarray,
    n: int,
    recipe: Recipe,
    rng: np.random.Generator,
    held_out: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws canvases from digits (N, 28, 28) and their labels (N,), uint8.

    Returns:
        The canvases (n, 50, 50) and their texts' symbols (n, 4), uint8.

    Args:
        held_out: K, to have the last 1/K of the canvases show the last 1/K of the digits, and the others the others.

    Raises UserError if the digits can't be had without repeats, or find no place.
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
        # the squares of two corners share two columns or rows, where at most one digit has ink: the brighter one counts
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
    """Which digits each canvas shows: (n, LENGTH) indices into `labels`."""
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
    """(N, 28, 28) uint8 -> (N, side, side) uint8, antialiased."""
    if side == DIGIT:
        return images
    import torch
    from torch.nn import functional as F

    pixels = torch.from_numpy(images).unsqueeze(1)
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).squeeze(1).numpy()


def _ink_boxes(squares: np.ndarray) -> np.ndarray:
    """The smallest box around each square's ink: (N, 2, 2), its (top, left) and its (bottom, right), exclusive."""
    side = squares.shape[1]
    ink = np.stack([squares.max(axis=2), squares.max(axis=1)], axis=1) > 0  # (N, 2, side): which rows, which columns
    return np.stack([ink.argmax(axis=2), side - ink[..., ::-1].argmax(axis=2)], axis=1)


def _draw_corners(boxes: np.ndarray, used: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Free places, (n, LENGTH, 2): each canvas's drawn from 0 to `most` until no two ink boxes overlap."""
    corners = np.empty((*used.shape, 2), int)
    rows = np.arange(len(used))
    for _ in range(10_000):  # a try is good for one in six pairs of whole digits, for one in 85 fours of scaled ones
        corners[rows] = rng.integers(0, most + 1, (len(rows), LENGTH, 2))
        start, end = (boxes[rows, :, edge] + corners[rows] for edge in (0, 1))
        before = np.all(start[:, :, None] < end[:, None], axis=3)
        pairs = used[rows, :, None] & used[rows, None] & ~np.eye(LENGTH, dtype=bool)
        rows = rows[np.any(before & before.swapaxes(1, 2) & pairs, axis=(1, 2))]
        if not len(rows):
            return corners
    raise UserError(f"{len(rows)} canvases have digits too large to place without overlap: lower --max-digits")


def _reading_order(corners: np.ndarray, used: np.ndarray, side: int) -> np.ndarray:
    """(n, LENGTH) columns by reading order: the upper half's digits from left to right, the lower half's, the unused.

    A digit is in the half where the centre of its square is.
    """
    lower = corners[..., 0] + side / 2 >= CANVAS / 2
    return np.where(used, lower * CANVAS + corners[..., 1], 2 * CANVAS).argsort(axis=1, kind="stable")


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the recipe and of every canvas and text."""
    digest = hashlib.sha256(repr(content["recipe"]).encode())
    for part in ("train", "test"):
        for name in MODALITIES:
            digest.update(content[f"{part}_{name}"].numpy())
    return digest.hexdigest()


def _read(canvas_dir: Path) -> dict[str, Any]:
    import torch

    path = canvas_dir / FILE
    try:
        file = open(path, "rb")  # noqa: SIM115 (what is wrong with its content is another error)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    with file:
        try:
            content = torch.load(file, weights_only=True)
            sound = content["digest"] == _digest(content) and _fits(content)
        except Exception:  # torch.load fails in many ways on a damaged file; each means the same to the user
            sound = False
    if not sound:
        remedy = (
            "`python datasets.py`, with the flags that it was made with, makes it anew; delete it for the default set"
        )
        raise UserError(f"{path} is damaged: {remedy}")
    return content


def _fits(content: Mapping[str, Any]) -> bool:
    """Whether the canvases and texts are as many as the recipe says, and of the right types and shapes."""
    import torch

    recipe = Recipe.of(content["recipe"])
    return all(
        (x.dtype, x.shape) == (torch.uint8, (n, *event))
        for part, n in (("train", recipe.train), ("test", recipe.test))
        for x, event in ((content[f"{part}_image"], (CANVAS, CANVAS)), (content[f"{part}_text"], (LENGTH,)))
    )


def _data(canvas_dir: Path, part: str) -> "Data":
    from mvae.data import Data, pictures_and_labels

    content = _read(canvas_dir)
    tensors = {"image": content[f"{part}_image"].unsqueeze(1), "text": content[f"{part}_text"]}
    return Data(tensors=tensors, transform=pictures_and_labels)


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    add_canvas_dir(parser)
    counts: dict[str, Any] = {"type": int, "choices": range(LENGTH + 1), "metavar": "N"}
    parser.add_argument("--min-digits", default=Recipe.min_digits, **counts, help="the least digits on a canvas")
    parser.add_argument("--max-digits", default=Recipe.max_digits, **counts, help="the most; all numbers are as likely")
    parser.add_argument(
        "--fixed",
        action=argparse.BooleanOptionalAction,
        default=Recipe.fixed,
        help="digits scaled by 1/1.3 at the four corners, in reading order; else anywhere, without overlap",
    )
    parser.add_argument("--no-resize", action="store_true", help="with --no-fixed: digits of 28x28 pixels, not 21x21")
    parser.add_argument("--no-translate", action="store_true", help="with --no-fixed: the one digit in the centre")
    parser.add_argument("--scramble", action="store_true", help="the text has the digits in random order")
    parser.add_argument("--reverse", action="store_true", help="every other text, at random, is read backwards")
    parser.add_argument("--no-repeat", action="store_true", help="the digits of a canvas are all different")
    parser.add_argument("--train", type=types.whole_number(1, 10**6), default=Recipe.train, help="training canvases")
    parser.add_argument("--test", type=types.whole_number(1, 10**6), default=Recipe.test, help="test canvases")
    return parser


def main() -> None:
    args = _parser().parse_args()
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    make(args.data_dir, args.canvas_dir, recipe)
    print(f"MultiMNIST in {args.canvas_dir}: {recipe.train} training and {recipe.test} test canvases")


if __name__ == "__main__":
    running.run(main)
