"""The experiment in the current folder, and the flags that the tools share."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..data.dataset import Data
from ..errors import UsageError
from ..files import check_writable
from ..model import MVAE
from ..run import checkpoint
from ..run.device import Machine
from ..run.resume import DIVERGED
from .controls import Controls

Build = Callable[[int], MVAE]  # from the number of latents
Examples = Callable[[str, Any, Mapping[str, Any]], Data]  # from a split, a Config and the checkpoint's settings

RUN_FILES = (checkpoint.LATEST, checkpoint.BEST, DIVERGED, "stats.jsonl", ".lock")

T = TypeVar("T")


@dataclass(kw_only=True)
class Tool(Machine):
    """The flags of every script that reads a model and data."""

    model_path: Path  # checkpoint, such as trained_models/model_best.pth.tar

    # General
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed}")

    def check_counts(self, least: int, *names: str) -> None:
        """Raise UsageError unless each of these fields is None or an integer >= `least`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be an integer >= {least}, got {value}")

    def check_outputs(self, *outputs: Path | None, inputs: Collection[Path] = ()) -> None:
        """Raise UsageError if an output would overwrite another, an input, or a file of a run; UserError if it can't be
        written. An input may be a folder, into which no output may go."""
        used = {path.resolve() for path in (self.model_path, *inputs, *files_of(inputs))}
        for path in filter(None, outputs):
            real = path.resolve()
            if used & {real, real.parent}:
                raise UsageError(f"{path} is also read or written: choose another output")
            if real.name in RUN_FILES:
                raise UsageError(f"{path} is a file of a run: choose another output")
            used.add(real)
            check_writable(path)


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Return the paths, with each folder replaced by its entries in order."""
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def with_source(tool: type[T], source: type) -> type[T]:
    """Return a tool's flags with those that locate the experiment's data."""
    return dataclasses.make_dataclass("Config", [], bases=(tool, source), kw_only=True)


class Experiment(NamedTuple):
    """What a folder's datasets.py and model.py define. `source` is the dataclass of flags that locate the data."""

    name: str
    controls: Controls
    source: type
    examples: Examples
    build_model: Build


def experiment() -> Experiment:
    """Import the current folder's datasets.py and model.py. Raises UsageError if they don't make an experiment."""
    if not (os.path.isfile("datasets.py") and os.path.isfile("model.py")):
        raise UsageError("no datasets.py and model.py here: run this in an experiment's folder, such as mnist")
    sys.path.insert(0, os.getcwd())
    datasets, model = importlib.import_module("datasets"), importlib.import_module("model")
    try:
        return Experiment(datasets.NAME, datasets.CONTROLS, datasets.Source, datasets.examples, model.build_model)
    except AttributeError as error:
        raise UsageError(f"this folder is not an experiment: {error}") from None
