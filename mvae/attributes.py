"""Faces' attributes in the scripts: as a condition, in a text file, and how well they are predicted."""

import argparse
import difflib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from .celeba import ATTRIBUTES, training_data
from .data import random_example
from .pictures import load_picture

CONDITIONS = ("--condition-on-attrs", "--condition-on-image")


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


def condition(args: argparse.Namespace) -> Tensor:
    """The picture (1, 3, 64, 64) in [0, 1] that --condition-on-image asks for: a file, or a validation example.

    Raises UserError if the file is no picture, or CelebA can't be had, or no example has the attributes.
    """
    wanted = args.condition_on_image
    if isinstance(wanted, Path):
        return load_picture(wanted, "RGB", 64)
    _, held_out = training_data(args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers)
    fits = torch.ones(len(held_out), dtype=torch.bool)
    for name, there in wanted.items():
        fits &= held_out.tensors["attrs"][:, ATTRIBUTES.index(name)] == there
    what = " and ".join(name if there else f"no {name}" for name, there in wanted.items())
    return random_example(held_out, fits, what)["image"]


def lines(there: Tensor) -> str:
    """A line for each row of (n, 18) bool: the names of the attributes that are there."""
    rows = ([name for name, here in zip(ATTRIBUTES, row, strict=True) if here] for row in there.tolist())
    return "".join(" ".join(row) + "\n" for row in rows)


def measures(probabilities: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """How well attributes are predicted: values (n,) by name, whose means are accuracies, overall and of each.

    Balanced accuracy is the mean of the accuracies among the faces that have the attribute and those that haven't; its
    values are such that their standard error is that of this mean (the delta method). An attribute that all or none
    of the faces have has none.

    Args:
        probabilities: (n, 18), of each attribute.
        truth: (n, 18), 0 and 1.
    """
    positive = truth.bool()
    right = ((probabilities > 0.5) == positive).double()
    balanced: dict[str, Tensor] = {}
    for i, name in enumerate(ATTRIBUTES):
        here = positive[:, i]
        if here.any() and not here.all():
            of_those = [right[here, i].mean(), right[~here, i].mean()]
            error = torch.where(here, right[:, i] - of_those[0], right[:, i] - of_those[1])
            share = torch.where(here, here.double().mean(), 1 - here.double().mean())
            balanced[name] = (of_those[0] + of_those[1] + error / share) / 2
    found = {"accuracy of an attribute predicted from the image": right.mean(dim=1)}
    if balanced:
        found["balanced accuracy, likewise"] = torch.stack(list(balanced.values())).mean(dim=0)
    for i, name in enumerate(ATTRIBUTES):
        found[f"accuracy of {name}"] = right[:, i]
        if name in balanced:
            found[f"balanced accuracy of {name}"] = balanced[name]
    return found
