"""What the benchmarks share: processes of their own, timing in turns, and files of results."""

import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mvae.files import write_atomically
from mvae.run.checkpoint import origin

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""The environment in which glibc keeps freed memory, as all scripts of mvae let it (mvae/cli.py)."""

T = TypeVar("T")


def alone(function: Callable[..., T], *args: Any, timeout: float | None = None) -> T:
    """Return what the function returns in a process of its own, which prints nothing and keeps freed memory.

    timeout: seconds after which that process is killed. Raises TimeoutError then.
    """
    os.environ.update(KEEP_MEMORY)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=silence) as pool:
        try:
            return pool.submit(function, *args).result(timeout)
        except TimeoutError:
            for process in (pool._processes or {}).values():  # Python 3.14 has kill_workers
                process.kill()
            raise


def silence() -> None:
    """Print nothing any more in this process."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def in_turns(
    actions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Return the seconds of each action in each round; the order is reversed from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order = list(actions)
    for _ in range(rounds):
        for name in order:
            started = clock()
            actions[name]()
            seconds[name].append(clock() - started)
        order.reverse()
    return seconds


def quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def spread(values: Sequence[float], digits: str = ".2f") -> str:
    """Format quartiles as median (lower to upper)."""
    low, middle, high = values
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def as_json(mean_and_standard_error: tuple[float, float | None]) -> dict[str, Any]:
    return dict(zip(["mean", "standard_error"], mean_and_standard_error, strict=True))


def about() -> dict[str, Any]:
    """Return the command, the commit and the machine, with which every file of results begins."""
    return {**origin(), "processor": f"{_processor()}, {os.cpu_count()} cores", "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a file of results, if there is a path."""
    if path:
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
