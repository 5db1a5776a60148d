"""CelebA in the scripts: its flags and its preparation."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..datasets.celeba import find, pictures, summary
from . import flags

if TYPE_CHECKING:
    from ..data import Data

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


def examples(
    split: str,
    args: argparse.Namespace,
    training_data: Callable[..., tuple["Data", "Data"]],
    test_data: Callable[..., "Data"],
) -> "Data":
    """The official split "train", "validation" or "test", by an experiment's two functions."""
    how: dict[str, Any] = {"allow_missing": args.allow_missing, "workers": args.workers}
    if split == "test":
        return test_data(args.data_dir, args.cache_dir, **how)
    train, validation = training_data(args.data_dir, args.cache_dir, **how)
    return train if split == "train" else validation


def arguments() -> list[str]:
    """The command line, with `--condition-on-attrs -Name` as one word: argparse would take -Name for a flag."""
    words: list[str] = []
    for word in sys.argv[1:]:
        if words and words[-1] in CONDITIONS and word.startswith("-") and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
