"""Measure how fast a training step is by the CPU's threads and by glibc's memory, alone and beside busy processes.

Threads that wait for each other spin for some milliseconds, as OpenMP has them do; or sleep at once; or spin for a
moment and then sleep, as mvae has them do. Processes of each kind take turns, on the machine as it is and then beside
loops that keep one core each. A number is the examples a second, divided by those of one thread beside nothing else.
Memory is kept where glibc doesn't give freed blocks back to the system, which hands out new ones empty.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from step import Setting, as_after_loading, our_step, processor

from mvae import OPENMP  # after torch, which has read its variables by now: mvae would set them
from mvae.files import write_atomically
from mvae.scripts import running, types

from experiments import EXPERIMENTS

ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "1 thread": (1, {}),
    "1 thread, memory kept": (1, {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}),
    "2 threads": (2, OPENMP),
    "2 threads, asleep at once": (2, ASLEEP),
    "2 threads, spinning": (2, {}),
}
"""Threads and environment, by name. The first is what the others are compared with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which")
    parser.add_argument("--busy", nargs="+", type=types.non_negative_int, default=[0, 1, 2], help="other processes")
    parser.add_argument("--seconds", type=types.positive_float, default=2.0, help="of a turn, one step at least")
    parser.add_argument("--rounds", type=types.positive_int, default=3, help="turns of each")
    parser.add_argument("--json", type=types.output, metavar="FILE", help="write the numbers to this file, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        take_turns(args.child, args.seconds)
        return
    rows = []
    for name in args.experiments:
        found = measure(name, args)
        usual = np.median(found[min(args.busy), next(iter(WAYS))])
        for (busy, way), rates in found.items():
            rate = np.quantile(np.divide(rates, usual), [0.25, 0.5, 0.75]).tolist()
            rows.append({"experiment": name, "busy": busy, "way": way, "rate": rate})
            print(f"{name}, beside {busy}: {way}: {rate[1]:.2f} ({rate[0]:.2f} to {rate[2]:.2f})", flush=True)
    content = {
        **running.origin(),
        "device": "cpu",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def measure(name: str, args: argparse.Namespace) -> dict[tuple[int, str], list[float]]:
    """Examples a second of each turn, by the number of busy processes and by way."""
    found: dict[tuple[int, str], list[float]] = {(busy, way): [] for busy in args.busy for way in WAYS}
    with ExitStack() as stack:
        children = {way: stack.enter_context(child(name, *how, args.seconds)) for way, how in WAYS.items()}
        for busy in args.busy:
            with ExitStack() as others:
                for _ in range(busy):
                    others.enter_context(process_of([sys.executable, "-c", "while True: pass"]))
                order = list(WAYS)
                for _ in range(args.rounds):
                    for way in order:
                        found[busy, way].append(turn(children[way]))
                    order.reverse()
    return found


@contextmanager
def process_of(command: list[str], **how: object) -> Iterator[subprocess.Popen]:
    """A process that ends with the block."""
    process = subprocess.Popen(command, **how)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def child(name: str, threads: int, how: dict[str, str], seconds: float) -> Iterator[subprocess.Popen]:
    """A process that trains when it is told to."""
    environment = {key: value for key, value in os.environ.items() if key not in OPENMP}
    environment |= {"OMP_NUM_THREADS": str(threads), **how}
    command = [sys.executable, __file__, "--seconds", str(seconds), "--child", name]
    with process_of(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        turn(process)  # the first steps take longer
        yield process


def turn(process: subprocess.Popen) -> float:
    """Has a child train for a while; gives its examples a second."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def take_turns(name: str, seconds: float) -> None:
    """Trains for some seconds whenever a line is read, and prints the examples a second."""
    torch.manual_seed(0)
    experiment = EXPERIMENTS[name]
    step = our_step(name, experiment.data(), Setting(torch.device("cpu"), torch.get_num_threads()))
    as_after_loading()
    for _ in sys.stdin:
        started, steps = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds or not steps:
            step()
            steps += 1
        print(steps * experiment.batch_size / took, flush=True)


if __name__ == "__main__":
    running.run(main)
