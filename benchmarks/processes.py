"""Time steps of several processes that share each batch against steps of one, in mnist's shapes.

The processes of a group exchange gradients over gloo on this machine, one thread each. Blocks of all groups' steps take
turns. Every process takes as many examples as the one alone, so n processes are at best n times as fast, given as many
cores. With fewer, their CPU time shows the overhead, since waiting processes use none.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from mvae import cli

import numpy as np

from common import KEEP_MEMORY, about, in_turns, quartiles, silence, write
from step import Setting, loop, prepare

FORKED = multiprocessing.get_context("forkserver")  # torch is imported once
FORKED.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "step"])


@dataclass(kw_only=True)
class Config:
    groups: tuple[int, ...] = (2, 4, 8)  # numbers of processes to compare with one
    examples: tuple[int, ...] = (100, 12)  # numbers of examples per process and step
    steps: int = 5  # steps of a block
    rounds: int = 15  # blocks of each group
    json: Path | None = None  # file for the numbers


def main() -> None:
    config = cli.parse(__doc__, Config)
    worlds = sorted({1, *config.groups})
    cases = list(itertools.product(config.examples, worlds))
    cpu: dict[tuple[int, int], list[float]] = defaultdict(list)
    os.environ.update(KEEP_MEMORY)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = {world: stack.enter_context(group(world, folder / f"{world}")) for world in worlds}

        def block(examples: int, world: int) -> None:
            for pipe in groups[world]:
                pipe.send((examples, config.steps))
            cpu[examples, world].append(sum(pipe.recv() for pipe in groups[world]) / world)

        blocks = {f"{case}": functools.partial(block, *case) for case in cases}
        in_turns(blocks, 1)  # the first steps don't count
        cpu.clear()
        seconds = in_turns(blocks, config.rounds, time.perf_counter)
    rows = []
    for examples, world in cases:
        alone, together = (np.array(seconds[f"{(examples, n)}"]) for n in (1, world))
        row = {
            "examples": examples,
            "processes": world,
            "step_ms": quartiles(1e3 * together / config.steps),
            "rate": quartiles(world * alone / together),
            "cpu": quartiles(np.array(cpu[examples, world]) / cpu[examples, 1]),
        }
        rows.append(row)
        print(row, flush=True)
    write(config.json, {**about(), "rows": rows})


@contextlib.contextmanager
def group(world: int, folder: Path) -> Iterator[list[Connection]]:
    """Start the processes of a group, and yield a pipe to each; see `take_steps`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [FORKED.Pipe() for _ in range(world)]
    processes = [
        FORKED.Process(target=take_steps, args=(rank, world, port, folder, pair[1])) for rank, pair in enumerate(pairs)
    ]
    for process, pair in zip(processes, pairs, strict=True):
        process.start()
        pair[1].close()  # so that the end of the process is the end of its pipe
    try:
        yield [pair[0] for pair in pairs]
        for pipe, _ in pairs:
            pipe.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()  # if another one failed


def take_steps(rank: int, world: int, port: int, folder: Path, pipe: Connection) -> None:
    """Be one process of a group: receive numbers of examples and of steps, take these, and send their CPU seconds.

    It ends when it receives None.
    """
    silence()
    names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    setting = Setting()
    data = prepare("mnist", setting)
    loops = functools.cache(lambda examples: loop("mnist", data, setting, examples * world, folder / f"{examples}"))
    while asked := pipe.recv():
        examples, n = asked
        started = time.process_time()
        for _ in range(n):
            next(loops(examples))
        pipe.send(time.process_time() - started)


if __name__ == "__main__":
    cli.run(main)
