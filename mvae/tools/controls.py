"""Controls: what a user can condition on, how its values are parsed, and how they are shown.

An experiment names its controls, such as {"image": Picture("L", 28, dark=True), "text": Label(CLASSES)}. A control is
a modality, or several behind one name. `sample.py` takes conditions on them and `mvae.tools.explore` shows them.
"""

import difflib
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.pictures import load_picture
from ..errors import UsageError
from ..files import check_readable

log = logging.getLogger(__name__)


class Value(NamedTuple):
    """A value that a user gives."""

    said: str  # the value in a few words
    x: Tensor  # the value as a batch of one example, (1, *event); NaN for an attribute that it doesn't name
    of: str = ""  # control that has this value in a random held-out example, which is given; "" to give x itself


class Kind:
    """The kind of a control."""

    names: Sequence[str] = ()  # of its classes or entries, if they have names
    size: int = 0  # side in pixels of a drawn value, which may be given as a file; 0 if values are only written as text

    def modalities(self, name: str) -> tuple[str, ...]:
        """Return the modalities of the control `name`."""
        return (name,)

    def values(self, words: str) -> list[Value]:
        """Parse an argument, which may give several values; raise UsageError for a wrong one."""
        raise NotImplementedError

    def read(self, path: Path) -> list[Value]:
        """Return the values in a file. Raises UserError."""
        raise NotImplementedError

    def batch(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Return a value's `x` by modality."""
        return {name: x}

    def join(self, batch: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the control's part of a batch as one tensor (n, *event)."""
        return batch[name]

    def lines(self, x: Tensor) -> list[str]:
        """Write n values, or the most probable values of n means, as a line of text each."""
        raise NotImplementedError

    def pictures(self, x: Tensor) -> Tensor:
        """Draw n values as pictures (n, channels, size, size) in [0, 1]."""
        raise NotImplementedError

    def colours(self, name: str, x: Tensor) -> dict[str, tuple[Tensor, Sequence[str]]]:
        """Return what n values can be coloured by in a plot: classes (n,) and the classes' names, by name."""
        return {name: (x, self.names)} if self.names else {}


Controls = Mapping[str, Kind]


@dataclass(frozen=True)
class Picture(Kind):
    """A square picture, given as a file.

    dark: the data have a dark background, so a file with a light one is inverted.
    pen: the width in pixels of the explorer's pen, which draws light on dark; 0: no drawing board.
    """

    mode: Literal["RGB", "L"]
    size: int
    dark: bool = False
    pen: float = 0

    def values(self, words: str) -> list[Value]:
        raise UsageError(f"no such file: {words!r}")

    def read(self, path: Path) -> list[Value]:
        return [Value(path.name, self.on_dark(load_picture(path, self.mode, self.size), str(path)))]

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
    """One of several classes."""

    names: Sequence[str]

    def values(self, words: str) -> list[Value]:
        """Parse classes separated by commas, each a number or a name in any case."""
        known = {name.casefold(): i for i, name in enumerate(self.names)}
        known |= {str(i): i for i in range(len(self.names))}
        found = []
        for word in map(str.strip, words.split(",")):
            if word.casefold() not in known:
                allowed = ", ".join(name if name == str(i) else f"{i} {name}" for i, name in enumerate(self.names))
                raise UsageError(f"unknown class {word!r}; expected one of {allowed}")
            i = known[word.casefold()]
            found.append(Value(self.names[i], torch.tensor([i])))
        return found

    def lines(self, x: Tensor) -> list[str]:
        return [self.names[i] for i in (x.argmax(dim=1) if x.dim() == 2 else x).tolist()]


@dataclass(frozen=True)
class Attributes(Kind):
    """Binary attributes. A value names some of them, as present or absent.

    separate: each attribute is a modality, and those that a value doesn't name are inferred. Otherwise the attributes
        are one vector, and those that a value doesn't name are absent.
    """

    names: Sequence[str]
    separate: bool = False

    def modalities(self, name: str) -> tuple[str, ...]:
        return tuple(self.names) if self.separate else (name,)

    def values(self, words: str) -> list[Value]:
        """Parse one value such as `Male,Eyeglasses,-Smiling`: attributes in any case, absent ones with a minus."""
        known = {name.casefold(): name for name in self.names}
        given: dict[str, bool] = {}
        for word in map(str.strip, words.split(",")):
            name, present = word.removeprefix("-"), not word.startswith("-")
            if name.casefold() not in known:
                nearest = known[difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0)[0]]
                raise UsageError(f"unknown attribute {name!r}; did you mean {nearest}, of {', '.join(self.names)}?")
            if given.setdefault(known[name.casefold()], present) != present:
                raise UsageError(f"{words!r} has {name} both present and absent")
        said = [name for name in self.names if given.get(name)]
        said += [f"-{name}" for name in self.names if given.get(name) is False]
        return [Value(", ".join(said), torch.tensor([[float(given.get(name, math.nan)) for name in self.names]]))]

    def batch(self, name: str, x: Tensor) -> dict[str, Tensor]:
        if not self.separate:
            return {name: x.nan_to_num()}
        return {one: here for one, here in zip(self.names, x.unbind(dim=1), strict=True) if not here.isnan()}

    def join(self, batch: Mapping[str, Tensor], name: str) -> Tensor:
        return torch.stack([batch[one] for one in self.names], dim=1) if self.separate else batch[name]

    def lines(self, x: Tensor) -> list[str]:
        return [" ".join(itertools.compress(self.names, row)) for row in (x > 0.5).tolist()]

    def colours(self, name: str, x: Tensor) -> dict[str, tuple[Tensor, Sequence[str]]]:
        """Each attribute, beginning with the one that most nearly half of the examples have."""
        order = (x.float().mean(dim=0) - 0.5).abs().argsort().tolist()
        return {self.names[i]: (x[:, i], [f"-{self.names[i]}", self.names[i]]) for i in order}


@dataclass(frozen=True)
class Vector(Kind):
    """A vector or a curve of `length` numbers, drawn as a curve between `low` and `high`."""

    length: int
    low: float = -3
    high: float = 3

    size = 64

    def values(self, words: str) -> list[Value]:
        return self._parsed(words, lambda: np.array(words.split(","), dtype=np.float32))

    def read(self, path: Path) -> list[Value]:
        """Read a .npy file, or a text file of numbers separated by commas: a value, or one in each row."""
        check_readable(path)
        return self._parsed(
            str(path), lambda: np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",")
        )

    def _parsed(self, source: str, load: Callable[[], np.ndarray]) -> list[Value]:
        try:
            rows = torch.from_numpy(np.atleast_2d(load()).astype(np.float32))
        except (OSError, ValueError, TypeError, EOFError):
            raise UsageError(f"{source} must be numbers separated by commas, or a file of them") from None
        if rows.shape[1:] != (self.length,) or not rows.isfinite().all():
            raise UsageError(f"{source} must be {self.length} finite numbers, got {rows.shape[-1]} values")
        more = ", ..." * (self.length > 3)
        return [Value(", ".join(f"{x:.3g}" for x in row[0, :3].tolist()) + more, row) for row in rows.split(1)]

    def lines(self, x: Tensor) -> list[str]:
        return [",".join(f"{number:.6g}" for number in row) for row in x.tolist()]

    def pictures(self, x: Tensor) -> Tensor:
        curve = F.interpolate(x.unsqueeze(1), self.size, mode="linear", align_corners=True)  # (n, 1, columns)
        height = ((self.high - curve) / (self.high - self.low)).clamp(0, 1).mul(self.size - 1).round()
        before = torch.cat([height[..., :1], height[..., :-1]], dim=-1)
        rows = torch.arange(self.size, device=x.device).view(-1, 1)
        low, high = torch.minimum(before, height).unsqueeze(2), torch.maximum(before, height).unsqueeze(2)
        return ((low <= rows) & (rows <= high)).float()


def described_by(controls: Controls) -> str | None:
    """Return the control that describes what a picture shows: the first that isn't drawn, or None."""
    return next((name for name, kind in controls.items() if not kind.size), None)


def parse(controls: Controls, name: str, words: str) -> list[Value]:
    """Parse the values of the control `name`. A picture may be a file, or a held-out one by what it shows."""
    kind, label = controls[name], described_by(controls)
    if kind.size and is_file(words):
        return kind.read(Path(words).expanduser())
    if not isinstance(kind, Picture) or label is None:
        return kind.values(words)
    try:
        return [value._replace(of=label) for value in controls[label].values(words)]
    except UsageError as error:
        raise UsageError(f"no such file: {words!r}, and {error}") from None


def endpoint(controls: Controls, words: str) -> tuple[str, Value]:
    """Parse `NAME=VALUE` as a control's name and its value.

    Without a name, a file belongs to the first control, and other words to the control that describes a picture.
    """
    name, equals, word = words.partition("=")
    if not equals or name not in controls:
        name, word = next(iter(controls)), words
        if not is_file(words):
            name = described_by(controls) or name
    found = parse(controls, name, word)
    if len(found) != 1:
        raise UsageError(f"{words!r} must be one condition, got {len(found)}")
    return name, found[0]


def is_file(words: str) -> bool:
    return os.path.isfile(os.path.expanduser(words))  # False for any invalid name; Path.is_file may raise
