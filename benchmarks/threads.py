"""Measure how the speed of a training step depends on CPU threads and glibc's memory, alone and beside busy processes.

Threads that wait for each other spin for milliseconds (OpenMP's default), or sleep at once, or spin for a moment and
then sleep (mvae's setting). Processes of each kind take turns, first on the machine as it is, then beside loops that
keep one core each. The result is examples per second, relative to one thread with nothing beside it. "Memory kept"
means that glibc keeps freed blocks instead of returning them to the system.
"""

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from mvae import OPENMP, cli

import numpy as np
import torch
from common import KEEP_MEMORY, about, quartiles, write
from step import MIB, Setting, our_step, prepare, warm_seconds

from experiments import EXPERIMENTS, NAMES, Name

SPINNING = {"GOMP_SPINCOUNT": "300000"}  # libgomp's default
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "1 thread": (1, {}),
    "1 thread, memory kept": (1, KEEP_MEMORY),
    "2 threads": (2, OPENMP),
    "2 threads, asleep at once": (2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "2 threads, spinning": (2, SPINNING),
}
"""Threads and environment, by name. The others are compared with the first."""


@dataclass(kw_only=True)
class Config:
    experiments: tuple[Name, ...] = NAMES  # experiments to measure
    busy: tuple[int, ...] = (0, 1, 2)  # numbers of other processes
    seconds: float = 2  # seconds of a turn, at least one step
    rounds: int = 3  # turns of each
    json: Path | None = None  # file for the numbers


SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    config = cli.parse(__doc__, Config)
    rows = []
    for name in config.experiments:
        rates = measure(name, config)
        usual = np.median(next(iter(rates.values())))
        for (busy, way), found in rates.items():
            rows.append({"experiment": name, "busy": busy, "way": way, "rate": quartiles(np.divide(found, usual))})
            print(f"{name}, {busy} busy, {way}: {rows[-1]['rate'][1]:.2f}", flush=True)
    write(config.json, {**about(), "device": "cpu", "rows": rows})


def measure(name: str, config: Config) -> dict[tuple[int, str], list[float]]:
    """Return the examples per second of each turn, by the number of busy processes and by way."""
    rates: dict[tuple[int, str], list[float]] = {}
    with ExitStack() as stack:
        trainers = {}
        for way, (threads, environment) in WAYS.items():
            cleared = {key: value for key, value in os.environ.items() if key not in OPENMP}
            with mock.patch.dict(os.environ, {**cleared, "OMP_NUM_THREADS": str(threads), **environment}, clear=True):
                ours, theirs = SPAWN.Pipe()
                stack.enter_context(running(SPAWN.Process(target=train, args=(name, config.seconds, theirs))))
            trainers[way] = ours
        for busy in config.busy:
            with ExitStack() as others:
                for _ in range(busy):
                    others.enter_context(running(SPAWN.Process(target=spin)))
                for way in [*WAYS, *reversed(WAYS)] * config.rounds:
                    trainers[way].send(None)
                    rates.setdefault((busy, way), []).append(trainers[way].recv())
    return rates


@contextmanager
def running(process: BaseProcess) -> Iterator[None]:
    """Run a process until the block ends."""
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def spin() -> None:
    for _ in itertools.count():
        pass


def train(name: str, seconds: float, connection: Connection) -> None:
    """Train for some seconds for each message received, and answer with the examples per second."""
    setting = Setting(threads=torch.get_num_threads())
    step = our_step(name, prepare(name, setting), setting)
    torch.empty(32 * MIB - 2**16, dtype=torch.uint8)  # freed at once: glibc then keeps large blocks, as after loading
    warm_seconds(step, setting.device, 1)
    while True:
        connection.recv()
        started, steps = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds or not steps:
            step()
            steps += 1
        connection.send(steps * EXPERIMENTS[name].batch_size / took)


if __name__ == "__main__":
    cli.run(main)
