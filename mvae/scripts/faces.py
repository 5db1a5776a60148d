"""CelebA in the scripts: its flags, its preparation, and attributes as a condition and as text."""

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..datasets.celeba import ATTRIBUTES, find, pictures, summary, training_data
from ..datasets.picture_cache import load_picture
from . import flags

if TYPE_CHECKING:
    from torch import Tensor

CONDITIONS = ("--condition-on-attrs", "--condition-on-image")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags --cache-dir, --workers and --allow-missing of the scripts that read the pictures."""
    flags.add_cache_flags(parser).add_argument(
        "--allow-missing", action="store_true", help="do with the images that are there, where the lists name more"
    )


def prepare(description: str | None) -> None:
    """What a datasets.py does as a command: says how many of the images are there, and decodes them."""
    parser = flags.parser(description)
    add_flags(parser)
    args = parser.parse_args()
    faces = find(args.data_dir, args.allow_missing)
    print(summary(faces), flush=True)
    pictures(faces, args.cache_dir, args.workers)
    print(f"its pictures are decoded in {args.cache_dir}")


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """The flags --condition-on-attrs and --condition-on-image of a sample.py; see `attributes` and `condition`."""
    names = ", ".join(ATTRIBUTES)
    parser.add_argument(
        CONDITIONS[0],
        type=attributes,
        metavar="NAME,-NAME",
        help=f"these attributes, and with a - those that are to be absent, with commas between them; there are {names}",
    )
    parser.add_argument(
        CONDITIONS[1],
        type=picture_or_attributes,
        metavar="FILE|NAME",
        help="a picture of your own, of any size; or a random held-out one with these attributes, chosen by --seed",
    )


def arguments() -> list[str]:
    """The command line, with `--condition-on-attrs -Name` as one word: argparse would take -Name for a flag."""
    words: list[str] = []
    for word in sys.argv[1:]:
        if words and words[-1] in CONDITIONS and word.startswith("-") and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def attributes(text: str) -> dict[str, bool]:
    """An argparse type, of `Male,Eyeglasses,-Smiling`: attributes by name, in any case, and whether each is there."""
    known = {name.casefold(): name for name in ATTRIBUTES}
    given: dict[str, bool] = {}
    for word in text.split(","):
        name = word.strip().removeprefix("-")
        if name.casefold() not in known:
            nearest = known[difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0)[0]]
            raise argparse.ArgumentTypeError(
                f"{name!r} is no attribute; the nearest is {nearest}, of {', '.join(ATTRIBUTES)}"
            )
        there = not word.strip().startswith("-")
        if given.setdefault(known[name.casefold()], there) != there:
            raise argparse.ArgumentTypeError(f"{text!r} wants {name} to be there and to be absent")
    return given


def picture_or_attributes(text: str) -> Path | dict[str, bool]:
    """An argparse type: the path of a file that is there, or else `attributes`."""
    if os.path.isfile(text):  # unlike Path's, it says no to any words
        return Path(text)
    try:
        return attributes(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"there is no file {text!r}, and {error}") from None


def condition(args: argparse.Namespace) -> "Tensor":
    """The picture (1, 3, 64, 64) in [0, 1] that --condition-on-image asks for: a file, or a validation example.

    Raises UserError if the file is no picture, or CelebA can't be had, or no example has the attributes.
    """
    import torch

    from ..data import random_example

    wanted = args.condition_on_image
    if isinstance(wanted, Path):
        return load_picture(wanted, "RGB", 64)
    _, held_out = training_data(args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers)
    fits = torch.ones(len(held_out), dtype=torch.bool)
    for name, there in wanted.items():
        fits &= held_out.tensors["attrs"][:, ATTRIBUTES.index(name)] == there
    what = " and ".join(name if there else f"no {name}" for name, there in wanted.items())
    return random_example(held_out, fits, what)["image"]


def lines(there: "Tensor") -> str:
    """A line for each row of (n, 18) bool: the names of the attributes that are there."""
    rows = ([name for name, here in zip(ATTRIBUTES, row, strict=True) if here] for row in there.tolist())
    return "".join(" ".join(row) + "\n" for row in rows)
