"""Kinds of modalities as a user meets them: what a condition is given by, and how a value is written.

An experiment names its controls, such as {"image": Picture("L", 28, dark=True), "text": Label(CLASSES)}. The scripts
make flags of them, and the page of explore.py makes widgets. A control is a modality, or several that one flag gives.
"""

import argparse
import collections
import dataclasses
import difflib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import UsageError

if TYPE_CHECKING:  # torch is imported where it's needed, so that -h doesn't wait for it
    from torch import Tensor

log = logging.getLogger(__name__)


class Kind(ABC):
    """The kind of a control. A value is what `values` makes of words: a class's number, a text, a dict, a path."""

    metavar = "VALUE"
    help = "this value"
    names: Sequence[str] = ()

    def modalities(self, name: str) -> tuple[str, ...]:
        """The modalities of the control `name`."""
        return (name,)

    @abstractmethod
    def values(self, words: str) -> list[Any]:
        """An argparse type: the values that a flag's word gives."""

    @abstractmethod
    def say(self, value: Any) -> str:
        """The value in a few words, as for a row's label."""

    @abstractmethod
    def tensor(self, value: Any) -> "Tensor":
        """The value as a batch of one example, (1, *event)."""

    def batch(self, name: str, value: Any) -> dict[str, "Tensor"]:
        """The value as a batch of one example, by modality."""
        return {name: self.tensor(value)}

    def join(self, batch: Mapping[str, "Tensor"], name: str) -> "Tensor":
        """The control's part of a batch as one tensor (n, *event)."""
        return batch[name]

    @abstractmethod
    def likeliest(self, mean: "Tensor") -> "Tensor":
        """The most probable values (n, *event) by their means, as `join` gives them of `MVAE.mean`."""

    @abstractmethod
    def lines(self, x: "Tensor") -> list[str]:
        """Each of n values in words."""

    @abstractmethod
    def where(self, stored: "Tensor", value: Any) -> "Tensor":
        """Which of N stored examples have this value: bool (N,)."""

    def colours(self, name: str, x: "Tensor") -> dict[str, tuple["Tensor", Sequence[str]]]:
        """What n values can be coloured by in a plot: by its name, their classes (n,) and the classes' names."""
        return {}

    def probabilities(self, mean: "Tensor") -> list[tuple[str, float]]:
        """Values in words and their probabilities, by n means (n, *event) of draws of z; here the most frequent ones.

        Where the mean is a probability, that is averaged.
        """
        counts = collections.Counter(self.lines(self.likeliest(mean)))
        return [(words, count / len(mean)) for words, count in counts.most_common(10)]


Controls = Mapping[str, Kind]


def _is_file(words: str) -> bool:
    return os.path.isfile(os.path.expanduser(words))  # unlike Path's, it says no to any words


@dataclasses.dataclass(frozen=True)
class Picture(Kind):
    """A square picture of `size` pixels.

    dark: its ground is dark, so a file whose ground is light is inverted.
    pen: the width in pixels of a pen to draw it with, light on dark; 0 if it is nothing to draw.
    """

    mode: Literal["RGB", "L"]
    size: int
    dark: bool = False
    pen: float = 0

    metavar = "FILE"
    help = "a picture of your own, of any size and mode"

    def values(self, words: str) -> list[Any]:
        if not _is_file(words):
            raise argparse.ArgumentTypeError(f"there is no file {words!r}")
        return [Path(os.path.expanduser(words))]

    def say(self, value: Path) -> str:
        return value.name

    def tensor(self, value: Path) -> "Tensor":
        """The file as (1, channels, size, size) in [0, 1]. Raises UserError if it is no picture."""
        from ..datasets.picture_files import load_picture

        return self.on_its_ground(load_picture(value, self.mode, self.size), str(value))

    def on_its_ground(self, picture: "Tensor", what: str) -> "Tensor":
        """The picture (1, channels, size, size), inverted if its rim is light and `dark` is set; that is logged."""
        import torch

        rim = torch.ones(self.size, self.size, dtype=torch.bool)
        rim[2:-2, 2:-2] = False
        if self.dark and picture[..., rim].median() > 0.5:
            log.info("%s has a light ground, and the model's pictures have a dark one: inverted", what)
            return 1 - picture
        return picture

    def likeliest(self, mean: "Tensor") -> "Tensor":
        return mean

    def lines(self, x: "Tensor") -> list[str]:
        return ["a picture"] * len(x)

    def where(self, stored: "Tensor", value: Path) -> "Tensor":
        return (stored == (255 * self.tensor(value)).round()).flatten(1).all(dim=1)


@dataclasses.dataclass(frozen=True)
class Label(Kind):
    """One of several classes; a value is its number."""

    names: Sequence[str]

    metavar = "LABEL,LABEL"
    help = "these classes, by number or name, with commas between them"

    def values(self, words: str) -> list[int]:
        """The numbers of classes that are given by number or, in any case, by name, with commas between them."""
        return [self._number(word.strip()) for word in words.split(",")]

    def _number(self, word: str) -> int:
        numbers = [str(number) for number in range(len(self.names))]
        for known in (numbers, [name.casefold() for name in self.names]):
            if word.casefold() in known:
                return known.index(word.casefold())
        pairs = zip(numbers, self.names, strict=True)
        allowed = ", ".join(name if name == number else f"{number} {name}" for number, name in pairs)
        raise argparse.ArgumentTypeError(f"{word!r} is none of {allowed}")

    def say(self, value: int) -> str:
        return self.names[value]

    def tensor(self, value: int) -> "Tensor":
        import torch

        return torch.tensor([value])

    def likeliest(self, mean: "Tensor") -> "Tensor":
        return mean.argmax(dim=1)

    def lines(self, x: "Tensor") -> list[str]:
        return [self.names[number] for number in x.tolist()]

    def probabilities(self, mean: "Tensor") -> list[tuple[str, float]]:
        return list(zip(self.names, mean.mean(dim=0).tolist(), strict=True))

    def where(self, stored: "Tensor", value: int) -> "Tensor":
        return stored == value

    def colours(self, name: str, x: "Tensor") -> dict[str, tuple["Tensor", Sequence[str]]]:
        return {name: (x, self.names)}


@dataclasses.dataclass(frozen=True)
class Attributes(Kind):
    """Binary attributes; a value says of some of them if they are there.

    As one vector, the others are absent. With `apart`, each attribute is a modality, and the others aren't given.
    """

    names: Sequence[str]
    apart: bool = False

    metavar = "NAME,-NAME"

    @property
    def help(self) -> str:  # type: ignore[override]
        return f"these attributes, and with a - those that are to be absent; there are {', '.join(self.names)}"

    def modalities(self, name: str) -> tuple[str, ...]:
        return tuple(self.names) if self.apart else (name,)

    def values(self, words: str) -> list[dict[str, bool]]:
        """One value, of `Male,Eyeglasses,-Smiling`: attributes in any case, those with a - absent."""
        known = {name.casefold(): name for name in self.names}
        given: dict[str, bool] = {}
        for word in words.split(","):
            name = word.strip().removeprefix("-")
            if name.casefold() not in known:
                nearest = known[difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0)[0]]
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no attribute; the nearest is {nearest}, of {', '.join(self.names)}"
                )
            there = not word.strip().startswith("-")
            if given.setdefault(known[name.casefold()], there) != there:
                raise argparse.ArgumentTypeError(f"{words!r} wants {name} to be there and to be absent")
        return [given]

    def say(self, value: Mapping[str, bool]) -> str:
        """The names, those that are absent with a -; of a vector that is given whole, those that are there."""
        there = [name for name in self.names if value.get(name)]
        absent = [f"-{name}" for name in self.names if value.get(name) is False]
        whole = not self.apart and len(value) == len(self.names)
        return ", ".join(there if whole else there + absent) or "none of them"

    def tensor(self, value: Mapping[str, bool]) -> "Tensor":
        import torch

        return torch.tensor([[float(value.get(name, False)) for name in self.names]])

    def batch(self, name: str, value: Mapping[str, bool]) -> dict[str, "Tensor"]:
        import torch

        if not self.apart:
            return super().batch(name, value)
        return {attribute: torch.tensor([float(there)]) for attribute, there in value.items()}

    def join(self, batch: Mapping[str, "Tensor"], name: str) -> "Tensor":
        import torch

        return torch.stack([batch[one] for one in self.names], dim=1) if self.apart else batch[name]

    def likeliest(self, mean: "Tensor") -> "Tensor":
        return (mean > 0.5).float()

    def lines(self, x: "Tensor") -> list[str]:
        """The names of the attributes that are there."""
        return [" ".join(name for name, here in zip(self.names, row, strict=True) if here) for row in x.tolist()]

    def probabilities(self, mean: "Tensor") -> list[tuple[str, float]]:
        return list(zip(self.names, mean.mean(dim=0).tolist(), strict=True))

    def where(self, stored: "Tensor", value: Mapping[str, bool]) -> "Tensor":
        import torch

        fits = torch.ones(len(stored), dtype=torch.bool)
        for name, there in value.items():
            fits &= stored[:, self.names.index(name)] == there
        return fits

    def colours(self, name: str, x: "Tensor") -> dict[str, tuple["Tensor", Sequence[str]]]:
        """Each attribute; the one that is nearest to half of the examples comes first."""
        order = (x.float().mean(dim=0) - 0.5).abs().argsort().tolist()
        return {self.names[i]: (x[:, i], [f"-{self.names[i]}", self.names[i]]) for i in order}


class HeldOut(NamedTuple):
    """A condition's value: a random held-out example, which the control `name` of it has this `value`."""

    name: str
    value: Any


def described_by(controls: Controls) -> str | None:
    """The control that says what a picture shows: the first that is no picture; None if all are."""
    return next((name for name, kind in controls.items() if not isinstance(kind, Picture)), None)


def values(controls: Controls, name: str, words: str) -> list[Any]:
    """The values of the control `name` that a flag's word gives; a picture may be a held-out one, by what it shows.

    Raises argparse.ArgumentTypeError, with what is allowed.
    """
    kind, other = controls[name], described_by(controls)
    if not isinstance(kind, Picture) or other is None or _is_file(words):
        return kind.values(words)
    try:
        return [HeldOut(other, value) for value in controls[other].values(words)]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"there is no file {words!r}, and {error}") from None


def endpoint(controls: Controls, words: str) -> tuple[str, Any]:
    """A control's name and its value, of `NAME=VALUE`. Without a name, a file is the first control's.

    Other words are those of the control that says what a picture shows. Raises argparse.ArgumentTypeError.
    """
    name, equals, word = words.partition("=")
    if not equals or name not in controls:
        name, word = next(iter(controls)), words
        if not _is_file(words):
            name = described_by(controls) or name
    found = values(controls, name, word)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{words!r} are {len(found)} conditions, where one is wanted")
    return name, found[0]


def say(controls: Controls, name: str, value: Any) -> str:
    """A value in a few words, with its control's name."""
    if isinstance(value, HeldOut):
        return f"{name} of {value.name} {controls[value.name].say(value.value)}"
    return f"{name} {controls[name].say(value)}"


def check(controls: Controls, names: Sequence[str]) -> None:
    """Raises UsageError for a name that is no control's."""
    for name in names:
        if name not in controls:
            raise UsageError(f"`given` takes names of {', '.join(controls)}, not {name!r}")
