"""Time a training step of each experiment against the plain reference: which has a pass for every ELBO term.

A plain step (plain.py) encodes and decodes every modality again in every term, in the layers and formulas of the
published 2018 code, and ends in torch's default Adam. That code spares itself the encoders of what a term isn't given,
and so does the plain step called 'given only'. Ours is what `mvae.fit` does per step: a batch from the uint8 data set,
seeds, subsets, `mvae.train_step` with fused Adam, and the sums of its parts. Before it is timed, both losses are found
equal in evaluation mode; in training mode, too, where there is neither batch norm nor dropout (see plain.py). Every row
comes from a process in which blocks of plain steps and of ours take turns; a ratio is that of neighbouring
blocks.
"""

import argparse
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mvae import MVAE, Data, Objective, Term, evaluate, random_subsets, train_step
from mvae.data import permuted_rows, seed_of
from mvae.files import write_atomically
from mvae.scripts import running, types
from mvae.training import Precision

import plain
from experiments import EXPERIMENTS, Experiment, build_model

MIB = 2**20
BLOCK_SECONDS = 0.2
PRECISIONS = ["fp32", "bf16"]
NORMS_AND_DROPOUT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)

ABOUT_TIMES = """\
Milliseconds: median (lower to upper quartile). The plain step is never compiled; 'given only' is a plain one whose
terms encode just what they are given. 'data' is the share of our step that its batch takes, made from the uint8 data
set on the device.
"""
ABOUT_MEMORY = """
Peak memory in MiB of a process that takes 10 steps. On a CPU that is all it holds: Python, torch, the data set,
weights, gradients, Adam's moments, activations, and where it compiles the compiler; in brackets, Python and torch
alone. On CUDA it is what torch has allocated on the device.
"""


class Setting(NamedTuple):
    """How a step is to run. `threads` are of the CPU."""

    device: torch.device
    threads: int
    precision: Precision = "fp32"
    compiled: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which")
    parser.add_argument("--seconds", type=types.positive_float, default=5.0, help="to measure per row, after a warm-up")
    parser.add_argument("--threads", nargs="+", type=types.positive_int, default=[1], help="CPU threads")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="of the networks")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--json", type=types.output, metavar="FILE", help="write the numbers to this file, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return
    started = time.perf_counter()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    gpu = torch.cuda.get_device_name() if "cuda" in devices else None
    content: dict[str, Any] = {
        **running.origin(),
        "device": ", ".join(devices),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": args.threads,
        "steps": [],
        "memory": [],
        "loglike": [],
    }
    print(f"torch {torch.__version__}, {content['processor']}{f', {gpu}' if gpu else ''}")
    for name in args.experiments:
        print(f"\n## {name}: a step of {EXPERIMENTS[name].batch_size} examples\n")
        content["steps"] += _report_times(name, devices, args)
        content["memory"] += _report_memory(name, devices, args)
        content["loglike"] += _report_loglike(name, devices)
    content["seconds"] = time.perf_counter() - started
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def _report_times(name: str, devices: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    print(ABOUT_TIMES)
    _row("device", "threads", "precision", "compiled", "plain", "ours", "plain / ours", "given only / ours", "data")
    _row(*["---"] * 9)
    found = []
    for device in devices:
        threads_here = args.threads if device == "cpu" else args.threads[:1]
        for threads, precision, compiled in itertools.product(threads_here, args.precision, [False, True]):
            if compiled and args.eager:
                continue
            setting = {"device": device, "threads": threads, "precision": precision, "compiled": compiled}
            measured = _child(task="time", name=name, seconds=args.seconds, **setting)
            times, ours = measured["times"], measured["times"]["ours"]
            row = {
                "experiment": name,
                "batch_size": EXPERIMENTS[name].batch_size,
                **setting,
                "plain_ms": _quartiles(1e3 * np.array(times["plain"])),
                "ours_ms": _quartiles(1e3 * np.array(ours)),
                "plain / ours": _quartiles(np.divide(times["plain"], ours)),
                "given only / ours": _quartiles(np.divide(times["given only"], ours)),
                "blocks": len(ours),
                "data_share": measured["data_share"],
            }
            found.append(row)
            _row(
                device,
                str(threads) if device == "cpu" else "–",
                precision,
                "yes" if compiled else "no",
                *(_spread(row[column], ".1f") for column in ("plain_ms", "ours_ms")),
                *(_spread(row[column], ".2f") for column in ("plain / ours", "given only / ours")),
                f"{100 * measured['data_share']:.1f} %",
            )
    return found


def _report_memory(name: str, devices: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    print(ABOUT_MEMORY)
    kinds = {"plain": ("plain", False), "ours": ("ours", False)}
    if not args.eager:
        kinds["ours, compiled"] = "ours", True
    _row("device", "precision", *kinds)
    _row(*["---"] * (2 + len(kinds)))
    rows = []
    for device, precision in itertools.product(devices, args.precision):
        row: dict[str, Any] = {"experiment": name, "device": device, "precision": precision}
        for column, (kind, compiled) in kinds.items():
            setting = {"device": device, "threads": 1, "precision": precision, "compiled": compiled}
            found = _child(task="memory", name=name, kind=kind, **setting)
            row[column] = {"peak_mib": found["peak"] / MIB}
            if device == "cpu":
                row[column]["before_mib"] = found["before"] / MIB
        rows.append(row)
        cells = (row[column] for column in kinds)
        _row(
            device,
            precision,
            *(
                f"{cell['peak_mib']:.0f}" + (f" ({cell['before_mib']:.0f})" if device == "cpu" else "")
                for cell in cells
            ),
        )
    return rows


def _report_loglike(name: str, devices: Sequence[str]) -> list[dict[str, Any]]:
    print("\nloglike.py on 1,000 examples with 1,000 importance samples each, extrapolated from runs of 10 examples:")
    rows = []
    for device in devices:
        found = _child(task="loglike", name=name, device=device, threads=1)
        minutes = _quartiles([100 * seconds / 60 for seconds in found["times"]])
        rows.append({"experiment": name, "device": device, "threads": 1, "minutes": minutes})
        print(f"{_spread(minutes, '.1f')} minutes on {'one CPU thread' if device == 'cpu' else device}", flush=True)
    return rows


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def _spread(quartiles: Sequence[float], digits: str) -> str:
    low, middle, high = quartiles
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _child(**task: Any) -> dict[str, Any]:
    """What `measure` returns for this task, in another process with the threads asked for."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(task: str, name: str, device: str, seconds: float = 1.0, kind: str = "ours", **how: Any) -> dict[str, Any]:
    """Runs one task: "time", "memory" or "loglike". `how`: the further fields of a Setting."""
    before = _peak_memory(torch.device("cpu"))
    setting = Setting(torch.device(device), **how)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    if task == "loglike":
        return {"times": _time_loglike(name, setting.device)}
    data = EXPERIMENTS[name].data().to(setting.device)
    if task == "memory":
        step = {"plain": _plain_step, "ours": our_step}[kind](name, data, setting)
        for _ in range(10):
            step()
        return {"before": before, "peak": _peak_memory(setting.device)}
    return _time(name, data, setting, seconds)


def _time(name: str, data: Data, setting: Setting, seconds: float) -> dict[str, Any]:
    """Seconds per step of each kind, by block, and the share of our step that making the batch takes."""
    _check(name, data, setting)
    batch_size = EXPERIMENTS[name].batch_size
    if setting.device.type == "cpu":
        as_after_loading()
    rows = _rows(data, batch_size)
    steps = {
        "plain": _plain_step(name, data, setting),
        "given only": _plain_step(name, data, setting, given_only=True),
        "ours": our_step(name, data, setting),
        "data": lambda: data.batch(next(rows)[1]),
    }
    times = _in_turns(steps, seconds, setting.device)
    shuffling = min(seconds_of(lambda: permuted_rows(data, batch_size, 0), 1, setting.device) for _ in range(3))
    fetching = float(np.median(times["data"])) + shuffling / (len(data) // batch_size)
    return {"times": times, "data_share": fetching / float(np.median(times["ours"]))}


def as_after_loading() -> None:
    """Has glibc keep memory as it does in a real run.

    It hands big freed blocks back to the system, and every step would fault them in anew, unless a block of nearly
    32 MiB has been freed once; loading the data does that.
    """
    torch.empty(32 * MIB - 2**16, dtype=torch.uint8)


def _in_turns(steps: Mapping[str, Callable], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each step in every round; a round runs a block of each, in an order that turns about."""
    for step in steps.values():
        seconds_of(step, 3, device)
    slowest = max(seconds_of(step, 1, device) for step in steps.values())
    n = max(1, round(BLOCK_SECONDS / slowest))
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    order = list(steps)
    while time.perf_counter() - started < seconds or len(times[order[0]]) < 5:
        for name in order:
            times[name].append(seconds_of(steps[name], n, device))
        order.reverse()
    return times


def seconds_of(step: Callable[[], Any], n: int, device: torch.device) -> float:
    """Seconds per call of n calls in a row, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(n):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / n


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch has allocated on a CUDA device; on a CPU, all that the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _objective(experiment: Experiment, model: MVAE, device: torch.device) -> Objective:
    objective = Objective(model, weights=experiment.weights, reconstruct=experiment.reconstruct)
    return objective.to(device).train()


def _our_objective(name: str, device: torch.device) -> Objective:
    return _objective(EXPERIMENTS[name], build_model(name, EXPERIMENTS[name].n_latents), device)


def _plain_objective(name: str, device: torch.device) -> Objective:
    """Of the plain reference's model, where ours has other modules."""
    experiment = EXPERIMENTS[name]
    build = experiment.plain_model
    return _objective(experiment, build(experiment.n_latents), device) if build else _our_objective(name, device)


def _rows(data: Data, batch_size: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """One batch after the other, epoch after epoch: (epoch, step), and the batch's rows."""
    for epoch in itertools.count(1):
        for step, rows in enumerate(permuted_rows(data, batch_size, seed_of(epoch))):
            yield (epoch, step), rows


def our_step(name: str, data: Data, setting: Setting) -> Callable[[], None]:
    """A step as `mvae.fit` takes it."""
    experiment = EXPERIMENTS[name]
    objective = _our_objective(name, setting.device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=experiment.lr, fused=True)
    step_module: Callable = objective
    if setting.compiled:
        step_module = torch.compile(objective, mode="reduce-overhead" if setting.device.type == "cuda" else None)
    all_rows = _rows(data, experiment.batch_size)
    beta = torch.zeros((), device=setting.device)
    fixed = setting.compiled or setting.device.type == "cuda"
    sums: list[Tensor] = []

    def step() -> None:
        (epoch, number), rows = next(all_rows)
        torch.manual_seed(seed_of(0, epoch, number, 0))
        subset_rng = np.random.default_rng(seed_of(0, epoch, number))
        subsets = random_subsets(objective.model.modalities, experiment.approx_m, subset_rng)
        masks = objective.mask(subsets).to(setting.device) if subsets and fixed else subsets
        batch, present = data.batch(rows)
        beta.fill_(1.0)
        totals = train_step(
            step_module, optimizer, batch, present, beta=beta, subsets=masks, precision=setting.precision
        )
        sums[:] = [sums[0] + totals.vector() if sums else totals.vector()]

    return step


def _plain_step(name: str, data: Data, setting: Setting, given_only: bool = False) -> Callable[[], None]:
    """A step of the plain reference, on one batch that is there from the start."""
    experiment = EXPERIMENTS[name]
    objective = _plain_objective(name, setting.device)
    model = objective.model
    plain.published(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.lr)
    batch, _ = data.batch(next(_rows(data, experiment.batch_size))[1])
    rng = np.random.default_rng(0)

    def step() -> None:
        optimizer.zero_grad()
        subsets = random_subsets(model.modalities, experiment.approx_m, rng)
        terms = [*objective.terms, *(Term(subset, subset) for subset in subsets)]
        with _precision(setting):
            loss = plain.loss(
                model, batch, terms, experiment.weights, encode=experiment.plain_encode, given_only=given_only
            )
        loss.item()  # the published code adds it to a running mean
        loss.backward()
        optimizer.step()

    return step


def _precision(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")


@torch.no_grad()
def _check(name: str, data: Data, setting: Setting) -> None:
    """Makes sure that both steps compute the same loss, with as many weights.

    In evaluation mode; in training mode, too, if the networks do the same there: batch norm takes its statistics over
    all terms together in our step and over each term in the plain one, and dropout draws at random.
    """
    experiment, objective = EXPERIMENTS[name], _our_objective(name, setting.device)
    if experiment.plain_model:
        others = _plain_objective(name, setting.device)
        assert _n_weights(others) == _n_weights(objective), "the plain model is another"
    batch, _ = data.batch(next(_rows(data, experiment.batch_size))[1])
    noise = torch.randn(len(objective.terms), experiment.batch_size, experiment.n_latents, device=setting.device)
    differs_in_training = any(isinstance(module, NORMS_AND_DROPOUT) for module in objective.modules())
    for training in [False] if differs_in_training else [False, True]:
        objective.train(training)
        with _precision(setting):
            ours = objective(batch, noise=noise)[0].item()
            other = plain.loss(
                objective.model,
                batch,
                objective.terms,
                experiment.weights,
                encode=experiment.plain_encode,
                noise=noise,
            ).item()
        if not math.isclose(ours, other, rel_tol=1e-4 if setting.precision == "fp32" else 1e-2):
            mode = "training" if training else "evaluation"
            raise AssertionError(f"in {mode} mode, the plain loss is {other}, ours {ours}")


def _n_weights(objective: Objective) -> int:
    return sum(weight.numel() for weight in objective.parameters())


def _time_loglike(name: str, device: torch.device) -> list[float]:
    """Seconds that 10 examples with 1,000 importance samples take, in several runs."""
    experiment = EXPERIMENTS[name]
    model, data = _our_objective(name, device).model, experiment.data()[:10].to(device)

    def run() -> None:
        evaluate(model, data, quantities=experiment.quantities, predictions=experiment.predictions, n_samples=1000)

    seconds_of(run, 1, device)
    return [seconds_of(run, 1, device) for _ in range(5)]


if __name__ == "__main__":
    running.run(main)
