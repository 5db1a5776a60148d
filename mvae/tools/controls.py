"""Controls: what a user can condition on, how its values are parsed, and how they are shown.

An experiment names its controls, such as {"image": Picture("L", 28, dark=True), "text": Label(CLASSES)}. A control is
a modality, or several behind one name. `sample.py` takes conditions on them and `mvae.tools.explore` shows them.
"""

import collections
import difflib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.pictures import load_picture
from ..errors import UsageError, UserError

log = logging.getLogger(__name__)


class Kind(ABC):
    """The kind of a control. Its values have the type that `values` returns: an int, a str, a dict, a Path.

    names: of its classes or entries, if they have names.
    size: side in pixels of the square that a value is drawn in; 0 if it is only written as text. Values that are drawn
        may be given as a file.
    """

    names: Sequence[str] = ()
    size: int = 0

    def modalities(self, name: str) -> tuple[str, ...]:
        """Return the modalities of the control `name`."""
        return (name,)

    @abstractmethod
    def values(self, words: str) -> list[Any]:
        """Parse an argument, which may give several values. Raises UsageError."""

    def read(self, path: Path) -> list[Any]:
        """Return the values in a file. Raises UserError."""
        raise NotImplementedError

    @abstractmethod
    def say(self, value: Any) -> str:
        """Describe a value in a few words."""

    @abstractmethod
    def tensor(self, value: Any) -> Tensor:
        """Return a value as a batch of one example, (1, *event)."""

    def batch(self, name: str, value: Any) -> dict[str, Tensor]:
        """Return a value as a batch of one example, by modality."""
        return {name: self.tensor(value)}

    def join(self, batch: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the control's part of a batch as one tensor (n, *event)."""
        return batch[name]

    def likeliest(self, mean: Tensor) -> Tensor:
        """Return the most probable values (n, *event), from the means that `MVAE.mean` returns."""
        return mean

    def lines(self, x: Tensor) -> list[str]:
        """Write each of n values as a line of text."""
        raise NotImplementedError

    def pictures(self, x: Tensor) -> Tensor:
        """Draw n values as pictures (n, channels, size, size) in [0, 1]."""
        raise NotImplementedError

    def where(self, stored: Tensor, value: Any) -> Tensor:
        """Return which of N stored examples have this value, bool (N,)."""
        return (stored == self.tensor(value)).view(len(stored), -1).all(dim=1)

    def colours(self, name: str, x: Tensor) -> dict[str, tuple[Tensor, Sequence[str]]]:
        """Return what n values can be coloured by in a plot: classes (n,) and the classes' names, by name."""
        return {name: (x, self.names)} if self.names else {}

    def probabilities(self, mean: Tensor) -> list[tuple[str, float]]:
        """Return values as text with their probabilities over n draws of z: those of names, or of frequent values."""
        if self.size:
            return []
        if self.names:
            return list(zip(self.names, mean.mean(dim=0).tolist(), strict=True))
        counts = collections.Counter(self.lines(self.likeliest(mean)))
        return [(words, count / len(mean)) for words, count in counts.most_common(10)]


Controls = Mapping[str, Kind]


@dataclass(frozen=True)
class Picture(Kind):
    """A square picture. Its values are files.

    dark: the data have a dark background, so a file with a light one is inverted.
    pen: the width in pixels of the explorer's pen, which draws light on dark; 0: no drawing board.
    """

    mode: Literal["RGB", "L"]
    size: int
    dark: bool = False
    pen: float = 0

    def values(self, words: str) -> list[Path]:
        raise UsageError(f"no such file: {words!r}")

    def read(self, path: Path) -> list[Path]:
        return [path]

    def say(self, value: Path) -> str:
        return value.name

    def tensor(self, value: Path) -> Tensor:
        return self.on_dark(load_picture(value, self.mode, self.size), str(value))

    def on_dark(self, picture: Tensor, name: str) -> Tensor:
        """Invert the picture (1, channels, size, size) and log it, if `dark` is set and its border is light."""
        border = torch.ones(self.size, self.size, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        if self.dark and picture[..., border].median() > 0.5:
            log.info("%s has a light background, and the training data a dark one: inverted", name)
            return 1 - picture
        return picture

    def pictures(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Label(Kind):
    """One of several classes. Its values are class numbers."""

    names: Sequence[str]

    def values(self, words: str) -> list[int]:
        """Parse classes separated by commas, each a number or a name in any case."""
        return [self._number(word.strip()) for word in words.split(",")]

    def _number(self, word: str) -> int:
        known = {name.casefold(): number for number, name in enumerate(self.names)}
        known |= {str(number): number for number in range(len(self.names))}
        if word.casefold() not in known:
            allowed = ", ".join(name if name == str(i) else f"{i} {name}" for i, name in enumerate(self.names))
            raise UsageError(f"unknown class {word!r}; expected one of {allowed}")
        return known[word.casefold()]

    def say(self, value: int) -> str:
        return self.names[value]

    def tensor(self, value: int) -> Tensor:
        return torch.tensor([value])

    def likeliest(self, mean: Tensor) -> Tensor:
        return mean.argmax(dim=1)

    def lines(self, x: Tensor) -> list[str]:
        return [self.names[number] for number in x.tolist()]


@dataclass(frozen=True)
class Attributes(Kind):
    """Binary attributes. A value says of some of them whether they are present.

    separate: each attribute is a modality, and those that a value doesn't name are inferred. Otherwise the attributes
        are one vector, and those that a value doesn't name are absent.
    """

    names: Sequence[str]
    separate: bool = False

    def modalities(self, name: str) -> tuple[str, ...]:
        return tuple(self.names) if self.separate else (name,)

    def values(self, words: str) -> list[dict[str, bool]]:
        """Parse one value such as `Male,Eyeglasses,-Smiling`: attributes in any case, absent ones with a minus."""
        known = {name.casefold(): name for name in self.names}
        given: dict[str, bool] = {}
        for word in words.split(","):
            name = word.strip().removeprefix("-")
            if name.casefold() not in known:
                nearest = known[difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0)[0]]
                raise UsageError(f"unknown attribute {name!r}; did you mean {nearest}, of {', '.join(self.names)}?")
            present = not word.strip().startswith("-")
            if given.setdefault(known[name.casefold()], present) != present:
                raise UsageError(f"{words!r} has {name} both present and absent")
        return [given]

    def say(self, value: Mapping[str, bool]) -> str:
        """List the attributes, absent ones with a minus; of a complete vector, those that are present."""
        present = [name for name in self.names if value.get(name)]
        absent = [f"-{name}" for name in self.names if value.get(name) is False]
        complete = not self.separate and len(value) == len(self.names)
        return ", ".join(present if complete else present + absent) or "none of them"

    def tensor(self, value: Mapping[str, bool]) -> Tensor:
        return torch.tensor([[float(value.get(name, False)) for name in self.names]])

    def batch(self, name: str, value: Mapping[str, bool]) -> dict[str, Tensor]:
        if not self.separate:
            return super().batch(name, value)
        return {attribute: torch.tensor([float(present)]) for attribute, present in value.items()}

    def join(self, batch: Mapping[str, Tensor], name: str) -> Tensor:
        return torch.stack([batch[one] for one in self.names], dim=1) if self.separate else batch[name]

    def likeliest(self, mean: Tensor) -> Tensor:
        return (mean > 0.5).float()

    def lines(self, x: Tensor) -> list[str]:
        return [" ".join(name for name, here in zip(self.names, row, strict=True) if here) for row in x.tolist()]

    def where(self, stored: Tensor, value: Mapping[str, bool]) -> Tensor:
        columns = [self.names.index(name) for name in value]
        return (stored[:, columns] == torch.tensor([*value.values()])).all(dim=1)

    def colours(self, name: str, x: Tensor) -> dict[str, tuple[Tensor, Sequence[str]]]:
        """Each attribute, beginning with the one that most nearly half of the examples have."""
        order = (x.float().mean(dim=0) - 0.5).abs().argsort().tolist()
        return {self.names[i]: (x[:, i], [f"-{self.names[i]}", self.names[i]]) for i in order}


@dataclass(frozen=True)
class Vector(Kind):
    """A vector or a curve of `length` numbers, drawn as a curve between `low` and `high`. Its values are lists."""

    length: int
    low: float = -3
    high: float = 3

    size = 64

    def values(self, words: str) -> list[list[float]]:
        try:
            return self._checked([[float(word) for word in words.split(",")]], words)
        except ValueError:
            raise UsageError(f"{words!r} must be a file, or numbers separated by commas") from None

    def read(self, path: Path) -> list[list[float]]:
        """Read a .npy file, or a text file of numbers separated by commas: a value, or one in each row."""
        try:
            rows = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",")
            return self._checked(np.atleast_2d(np.asarray(rows, dtype=float)).tolist(), str(path))
        except (OSError, ValueError, TypeError, EOFError):
            raise UserError(f"can't read {path}: expected a .npy file, or numbers separated by commas") from None

    def _checked(self, rows: list[list[float]], source: str) -> list[list[float]]:
        for row in rows:
            if len(row) != self.length or not all(map(math.isfinite, row)):
                raise UsageError(f"{source} must be {self.length} finite numbers, got {len(row)} values")
        return rows

    def say(self, value: Sequence[float]) -> str:
        return ", ".join([*(f"{number:.3g}" for number in value[:3]), *["..."] * (len(value) > 3)])

    def tensor(self, value: Sequence[float]) -> Tensor:
        return torch.tensor([value])

    def lines(self, x: Tensor) -> list[str]:
        return [",".join(f"{number:.6g}" for number in row) for row in x.tolist()]

    def pictures(self, x: Tensor) -> Tensor:
        curve = F.interpolate(x.unsqueeze(1), self.size, mode="linear", align_corners=True)  # (n, 1, columns)
        height = ((self.high - curve) / (self.high - self.low)).clamp(0, 1).mul(self.size - 1).round()
        before = torch.cat([height[..., :1], height[..., :-1]], dim=-1)
        rows = torch.arange(self.size, device=x.device).view(-1, 1)
        low, high = torch.minimum(before, height).unsqueeze(2), torch.maximum(before, height).unsqueeze(2)
        return ((low <= rows) & (rows <= high)).float()


class HeldOut(NamedTuple):
    """A condition's value: a random held-out example for which the control `name` has this `value`."""

    name: str
    value: Any


def described_by(controls: Controls) -> str | None:
    """Return the control that describes what a picture shows: the first that isn't drawn, or None."""
    return next((name for name, kind in controls.items() if not kind.size), None)


def parse(controls: Controls, name: str, words: str) -> list[Any]:
    """Parse the values of the control `name`. A picture may be a file, or a held-out one by what it shows.

    Raises UsageError or, for a file that can't be read, UserError.
    """
    kind, label = controls[name], described_by(controls)
    if kind.size and _is_file(words):
        return kind.read(Path(words).expanduser())
    if not isinstance(kind, Picture) or label is None:
        return kind.values(words)
    try:
        return [HeldOut(label, value) for value in controls[label].values(words)]
    except UsageError as error:
        raise UsageError(f"no such file: {words!r}, and {error}") from None


def endpoint(controls: Controls, words: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE` as a control's name and its value.

    Without a name, a file belongs to the first control, and other words to the control that describes a picture. Raises
    UsageError.
    """
    name, equals, word = words.partition("=")
    if not equals or name not in controls:
        name, word = next(iter(controls)), words
        if not _is_file(words):
            name = described_by(controls) or name
    found = parse(controls, name, word)
    if len(found) != 1:
        raise UsageError(f"{words!r} must be one condition, got {len(found)}")
    return name, found[0]


def describe(controls: Controls, name: str, value: Any) -> str:
    """Describe a value in a few words, beginning with its control's name."""
    if isinstance(value, HeldOut):
        return f"{name} of {value.name} {controls[value.name].say(value.value)}"
    return f"{name} {controls[name].say(value)}"


def _is_file(words: str) -> bool:
    return os.path.isfile(os.path.expanduser(words))  # False for any invalid name; Path.is_file may raise
