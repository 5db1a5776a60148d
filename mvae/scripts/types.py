"""The types of flags: what argparse makes of a word, or one line of what would be right."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from ..files import check_writable


def path(text: str) -> Path:
    """A file or a folder; ~ is the user's home."""
    try:
        text.encode()
        found = Path(text).expanduser()
    except UnicodeEncodeError:  # torch and TensorBoard don't take such names
        raise argparse.ArgumentTypeError(f"the name {text!r} is not UTF-8") from None
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such home") from None
    if not text:
        raise argparse.ArgumentTypeError("'' names no file or folder")
    return found


def output(text: str) -> Path:
    """A file to write. One that can't be written is known before the work and not after it: raises UserError."""
    found = path(text)
    check_writable(found)
    return found


def csv_or_npz(text: str) -> Path:
    """A file to write, whose name ends in .csv or .npz."""
    if not text.endswith((".csv", ".npz")):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .csv nor in .npz")
    return output(text)


def _number(kind: type, allowed: Callable, wanted: str, text: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
    return value


def host(text: str) -> str:
    """An address to listen at: any text but the empty one."""
    if not text:  # to a socket that is any address: the page would be open to other machines
        raise argparse.ArgumentTypeError("'' is no address")
    return text


MOST = 10**9
"""The largest number of anything that is counted: a larger one isn't meant."""


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of whole numbers from `least` to `most`."""
    return functools.partial(_number, int, lambda value: least <= value <= most, f"whole number from {least} to {most}")


positive_int, non_negative_int, two_or_more = whole_number(1), whole_number(0), whole_number(2)

seed_number = whole_number(0, 2**63 - 1)

concurrency = whole_number(1, 1024)
"""Threads, or processes."""


def real_number(least: float, most: float, wanted: str) -> Callable[[str], float]:
    """The type of numbers from `least` to `most`; `wanted` says so in the message."""
    return functools.partial(_number, float, lambda value: least <= value <= most, wanted)


LARGEST = 1e30
"""Of real numbers: float32 ends at 3e38, and begins at 1e-38."""

positive_float = real_number(1 / LARGEST, LARGEST, f"number above 0, from {1 / LARGEST:g} to {LARGEST:g}")

non_negative_float = real_number(0, LARGEST, f"number from 0 to {LARGEST:g}")

share = real_number(0, 1, "number from 0 to 1")

fraction = real_number(1 / LARGEST, 1, "number above 0, and 1 at most")

probability = real_number(0, 1 - 1e-9, "number from 0 to below 1")
