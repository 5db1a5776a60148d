"""Time a training step of each experiment against the plain reference: a pass of its own for every ELBO term.

A plain step (plain.py) encodes and decodes every modality again in every term, in the layers and formulas of the
published 2018 code, and ends in torch's default Adam. That code spares itself the encoders of what a term isn't given,
and so does the plain step called 'given only'. Ours is what `mvae.training.fit` does per step: a batch from the uint8
data set, seeds, objective, gradients, the watch for values that are not finite, fused Adam, and sums for the reports.
Every row comes from a process of its own, where blocks of plain steps and of ours take turns; a ratio is that of
neighbouring blocks.
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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvae import training
from mvae.data import Data, permuted_rows, seed_of
from mvae.estimators import evaluate
from mvae.model import MVAE
from mvae.objective import Objective, random_subsets
from mvae.run import Run, sums_of

import plain
from experiments import EXPERIMENTS, Experiment

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
BLOCK_SECONDS = 0.2
PRECISIONS = ["fp32", "bf16"]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure per row, beside the warm-up")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="CPU threads")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="of the networks")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    gpu = f", {torch.cuda.get_device_name()}" if "cuda" in devices else ""
    print(f"torch {torch.__version__}, {_processor()} with {os.cpu_count()} cores{gpu}")
    for name in args.experiments:
        print(f"\n## {name}: a step of {EXPERIMENTS[name].batch_size} examples\n")
        _report_times(name, devices, args)
        _report_memory(name, devices, args)
        _report_loglike(name, devices)


def _report_times(name: str, devices: Sequence[str], args: argparse.Namespace) -> None:
    print(ABOUT_TIMES)
    _row("device", "threads", "precision", "compiled", "plain", "ours", "plain / ours", "given only / ours", "data")
    _row(*["---"] * 9)
    for device in devices:
        threads_here = args.threads if device == "cpu" else args.threads[:1]
        for threads, precision, compiled in itertools.product(threads_here, args.precision, [False, True]):
            if compiled and (args.eager or EXPERIMENTS[name].approx_m):  # random terms can't be compiled
                continue
            setting = {"device": device, "threads": threads, "precision": precision, "compiled": compiled}
            found = _child(task="time", name=name, seconds=args.seconds, **setting)
            times, ours = found["times"], found["times"]["ours"]
            _row(
                device,
                str(threads) if device == "cpu" else "–",
                precision,
                "yes" if compiled else "no",
                *(_spread([1e3 * value for value in times[kind]], ".1f") for kind in ("plain", "ours")),
                *(_spread(np.divide(times[kind], ours), ".2f") for kind in ("plain", "given only")),
                f"{100 * found['data_share']:.1f} %",
            )


def _report_memory(name: str, devices: Sequence[str], args: argparse.Namespace) -> None:
    print(ABOUT_MEMORY)
    with_compiled = not (args.eager or EXPERIMENTS[name].approx_m)
    _row("device", "precision", "plain", "ours", *(["ours, compiled"] * with_compiled))
    _row(*["---"] * (4 + with_compiled))
    for device, precision in itertools.product(devices, args.precision):
        cells = []
        for kind, compiled in [("plain", False), ("ours", False), *([("ours", True)] * with_compiled)]:
            setting = {"device": device, "threads": 1, "precision": precision, "compiled": compiled}
            found = _child(task="memory", name=name, kind=kind, **setting)
            cells.append(f"{found['peak'] / MIB:.0f}" + f" ({found['before'] / MIB:.0f})" * (device == "cpu"))
        _row(device, precision, *cells)


def _report_loglike(name: str, devices: Sequence[str]) -> None:
    print("\nloglike.py on 1,000 examples with 1,000 importance samples each, extrapolated from runs of 10 examples:")
    for device in devices:
        found = _child(task="loglike", name=name, device=device, threads=1)
        minutes = [100 * seconds / 60 for seconds in found["times"]]
        print(f"{_spread(minutes, '.1f')} minutes on {'one CPU thread' if device == 'cpu' else device}", flush=True)


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _spread(values: Sequence[float] | np.ndarray, digits: str) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _child(**task: Any) -> dict[str, Any]:
    """What `measure` returns for this task, in a process of its own with the threads asked for."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(task: str, name: str, **setting: Any) -> dict[str, Any]:
    """Runs one task: "time", "memory" or "loglike"."""
    before = _peak_memory(torch.device("cpu"))
    sys.path.insert(0, str(ROOT / name))  # where the experiment's model.py is
    torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    experiment, device = EXPERIMENTS[name], torch.device(setting["device"])
    if task == "loglike":
        return {"times": _time_loglike(experiment, device)}
    with tempfile.TemporaryDirectory() as out_dir:
        options = training.Options(
            epochs=1,
            annealing_epochs=0,
            batch_size=experiment.batch_size,
            lr=experiment.lr,
            approx_m=experiment.approx_m,
            precision=setting["precision"],
            compile=setting["compiled"],
            device=device,
            out_dir=Path(out_dir),
        )
        data = experiment.data().to(device)
        if task == "memory":
            step = {"plain": _plain_step, "ours": _our_step}[setting["kind"]](experiment, data, options)
            for _ in range(10):
                step()
            return {"before": before, "peak": _peak_memory(device)}
        return _time(experiment, data, options, setting["seconds"])


def _time(experiment: Experiment, data: Data, options: training.Options, seconds: float) -> dict[str, Any]:
    """Seconds per step of each kind, by block, and the share of our step that making the batch takes."""
    _check(experiment, data, options)
    if options.device.type == "cpu":
        # glibc hands big freed blocks back to the system, and every step would fault them in anew, unless a block of
        # nearly 32 MiB has been freed once; in a real run, loading the data does that.
        torch.empty(32 * MIB - 2**16, dtype=torch.uint8)
    rows = _rows(data, options.batch_size)
    steps = {
        "plain": _plain_step(experiment, data, options),
        "given only": _plain_step(experiment, data, options, given_only=True),
        "ours": _our_step(experiment, data, options),
        "data": lambda: data.batch(next(rows)),
    }
    times = _in_turns(steps, seconds, options.device)
    shuffling = min(_seconds(lambda: permuted_rows(data, options.batch_size, 0), 1, options.device) for _ in range(3))
    fetching = float(np.median(times["data"])) + shuffling / (len(data) // options.batch_size)
    return {"times": times, "data_share": fetching / float(np.median(times["ours"]))}


def _in_turns(steps: Mapping[str, Callable], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each step in every round; a round runs a block of each, in an order that turns about."""
    for step in steps.values():
        _seconds(step, 3, device)
    slowest = max(_seconds(step, 1, device) for step in steps.values())
    n = max(1, round(BLOCK_SECONDS / slowest))
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    order = list(steps)
    while time.perf_counter() - started < seconds or len(times[order[0]]) < 5:
        for name in order:
            times[name].append(_seconds(steps[name], n, device))
        order.reverse()
    return times


def _seconds(step: Callable[[], Any], n: int, device: torch.device) -> float:
    """Seconds per call of n calls in a row, the device's work included."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(n):
        step()
    _synchronize(device)
    return (time.perf_counter() - started) / n


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch has allocated on a CUDA device; on a CPU, all that the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _objective(experiment: Experiment, device: torch.device, build: Callable[[int], MVAE] | None = None) -> Objective:
    from model import build_model  # of the experiment's folder

    model = (build or build_model)(experiment.n_latents)
    objective = Objective(model, weights=experiment.weights, reconstruct=experiment.reconstruct)
    return objective.to(device).train()


def _rows(data: Data, batch_size: int) -> Iterator[Tensor]:
    """The rows of one batch after the other, epoch after epoch."""
    return itertools.chain.from_iterable(permuted_rows(data, batch_size, seed_of(epoch)) for epoch in itertools.count())


def _our_step(experiment: Experiment, data: Data, options: training.Options) -> Callable[[], None]:
    """A step as `mvae.training.fit` takes it."""
    objective = _objective(experiment, options.device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.lr, fused=True)
    run = Run(objective, optimizer, out_dir=options.out_dir, experiment="benchmark", settings={})
    step_module: Callable = objective
    if options.compile:
        step_module = torch.compile(objective, mode="reduce-overhead" if options.device.type == "cuda" else None)
    watch = training._Watch(objective)
    all_rows = _rows(data, options.batch_size)
    beta = torch.zeros((), device=options.device)

    def step() -> None:
        rows = next(all_rows)
        torch.manual_seed(seed_of(options.seed, run.epoch, run.step, 0))
        subset_rng = np.random.default_rng(seed_of(options.seed, run.epoch, run.step))
        subsets = random_subsets(objective.model.modalities, options.approx_m, subset_rng)
        beta.fill_(training.annealing(run.epoch, run.step, len(data) // options.batch_size, options.annealing_epochs))
        batch, present = data.batch(rows)
        with training._precision(options):
            loss, totals = step_module(batch, beta, subsets, present)
        loss.backward()
        run.step += 1
        asked = run.step % options.log_interval == 0
        watch.look(loss, totals, raise_now=asked or options.device.type == "cpu", run=run)
        optimizer.step()
        optimizer.zero_grad()
        run.add(sums_of(loss, totals, len(rows)))

    return step


def _plain_step(
    experiment: Experiment, data: Data, options: training.Options, given_only: bool = False
) -> Callable[[], None]:
    """A step of the plain reference, on one batch that is there from the start."""
    objective = _objective(experiment, options.device, experiment.plain_model)
    model = objective.model
    plain.published(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    batch, _ = data.batch(next(_rows(data, options.batch_size)))
    rng = np.random.default_rng(0)

    def step() -> None:
        optimizer.zero_grad()
        subsets = random_subsets(model.modalities, options.approx_m, rng)
        terms = [*objective.terms, *(objective.term(subset) for subset in subsets)]
        with training._precision(options):
            loss = plain.loss(
                model, batch, terms, experiment.weights, encode=experiment.plain_encode, given_only=given_only
            )
        loss.item()  # the published code adds it to a running mean
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def _check(experiment: Experiment, data: Data, options: training.Options) -> None:
    """Makes sure that both steps compute the same loss, with as many weights."""
    objective = _objective(experiment, options.device).eval()
    if experiment.plain_model:
        others = _objective(experiment, options.device, experiment.plain_model)
        assert _n_weights(others) == _n_weights(objective), "the plain model is another"
    batch, _ = data.batch(next(_rows(data, options.batch_size)))
    noise = torch.randn(len(objective.terms), options.batch_size, experiment.n_latents, device=options.device)
    with training._precision(options):
        ours = objective(batch, noise=noise)[0].item()
        other = plain.loss(
            objective.model,
            batch,
            objective.terms,
            experiment.weights,
            encode=experiment.plain_encode,
            noise=noise,
        ).item()
    if not math.isclose(ours, other, rel_tol=1e-4 if options.precision == "fp32" else 1e-2):
        raise AssertionError(f"the plain loss is {other}, ours {ours}")


def _n_weights(objective: Objective) -> int:
    return sum(weight.numel() for weight in objective.parameters())


def _time_loglike(experiment: Experiment, device: torch.device) -> list[float]:
    """Seconds that 10 examples with 1,000 importance samples take, in several runs."""
    from loglike import QUANTITIES  # of the experiment's folder

    model, data = _objective(experiment, device).model, experiment.data()[:10].to(device)

    def run() -> None:
        evaluate(model, data, quantities=QUANTITIES, predictions=experiment.predictions, n_samples=1000)

    _seconds(run, 1, device)
    return [_seconds(run, 1, device) for _ in range(5)]


if __name__ == "__main__":
    main()
