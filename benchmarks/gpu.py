"""Measure on a GPU, in one command of some minutes, and write results/gpu.json after each row.

First every script with --cuda for a few steps, with a resumed run compared to a straight one; then a step of each
experiment, eager and captured as a CUDA graph, compared to the device's peak rates; then log-likelihoods. A
row that fails leaves the others' numbers, and rows that there is no time for are named. recipes.py mnist fast with
--flags="--cuda --compile" makes a whole run.

A step's floors are its matrix products at the rate of a large product, and the traffic of the weights (weight, gradient
and Adam's two moments, read and written) at the rate of a large copy. `busy` is the fraction of the step's time in
which a kernel runs. fp32 means TF32, in products as in convolutions, where torch uses it by default.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvae import cli, evaluate
from mvae.model import Precision
from mvae.run.checkpoint import BEST, LATEST, load
from synthetic import __main__ as synthetic

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, about, alone, in_turns, quartiles, write
from experiments import EXPERIMENTS, NAMES, build_model
from step import Setting, our_step, prepare, repeated, warm_seconds

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
PICTURES = "data/celeba/img_align_celeba"
FLAGS: dict[str, list[object]] = {
    **{name: ["--n-val", 20] for name in ("mnist", "fashionmnist", "multimnist")},
    "vision": [f"--{kind}-dir={PICTURES}" for kind in ("image", "gray", "edge", "mask")],
}
"""Flags of train.py; vision's are also loglike.py's."""


@dataclass(kw_only=True)
class Config:
    device: Literal["cuda", "cpu"] = "cuda"  # device to measure; cpu: to try the command out
    minutes: float = 8  # wall-clock minutes after which no row begins
    quick: bool = False  # almost no steps, eager and in fp32
    json: Path = ROOT / "results" / "gpu.json"  # file to write


def main() -> None:
    config = cli.parse(__doc__, Config)
    device, quick = config.device, config.quick
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available to torch: nothing is measured")
        return
    deadline = time.monotonic() + 60 * config.minutes
    content: dict[str, Any] = {**about(), "device": device, "quick": quick, "tf32": device == "cuda"}
    content["gpu"] = torch.cuda.get_device_name() if device == "cuda" else None
    content |= {"scripts": {}, "steps": {}, "likelihoods": {}, "left_out": [], "failed": {}}

    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def here(function: Callable[..., Any], *args: Any) -> Any:
        left()
        return function(*args)

    def apart(function: Callable[..., Any], *args: Any) -> Any:
        return alone(function, *args, timeout=left())

    def add(part: str, row: str, measure: Callable[..., Any], *args: Any) -> None:
        try:
            content[part][row] = measure(*args)
        except (TimeoutError, subprocess.TimeoutExpired):
            content["left_out"].append(f"{part}: {row}")
        except Exception as error:  # the other rows are worth measuring
            content["failed"][f"{part}: {row}"] = f"{type(error).__name__}: {error}"[-2000:]
        print(f"{part}, {row}: {content[part].get(row, 'failed or left out')}", flush=True)
        write(config.json, content)

    rows = [(name, precision) for precision in PRECISIONS[: 1 if quick else 2] for name in NAMES]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(8) as pool:
        folder = Path(place)
        for kind in ("digits", "fashion", "faces"):
            validation = ["--val", "20"] * (kind == "faces")
            synthetic.main([kind, str(folder / "data"), "--train", "100", "--test", "20", *validation])
        compared = {name: pool.submit(resumed_difference, name, device, folder, left) for name in NAMES}
        if not quick:  # torch keeps what it compiles, so that the timed rows find it in the cache
            for row in rows:
                pool.submit(functools.partial(alone, captured_step, *row, device, timeout=left() / 3))
        for name, found in compared.items():
            add("scripts", name, found.result)

    for row in rows:  # captured, each in its process: beyond eight shapes of a function torch runs it eager
        add("steps", ", ".join(row), here if quick else apart, step_row, *row, device, quick)
    for row in rows:
        add("likelihoods", ", ".join(row), here, loglike_seconds, *row, device, 2 if quick else 1000)


def script(name: str, *words: object, folder: Path, left: Callable[[], float]) -> None:
    """Run a script on the folder's data. Raises RuntimeError with its errors if it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    environment = {**os.environ, "MVAE_DATA_DIR": str(folder / "data"), "MVAE_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=left()
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")


def resumed_difference(name: str, device: str, folder: Path, left: Callable[[], float]) -> float:
    """Run the experiment's scripts; return the largest difference of a resumed run's weights from a straight one's."""
    run = functools.partial(script, folder=folder, left=left)
    cuda, flags, best = ["--cuda"] * (device == "cuda"), FLAGS.get(name, []), f"{name}/{BEST}"
    if name == "multimnist":
        run("multimnist/datasets.py", "--train", 100, "--test", 20)
    train: list[object] = ["--limit", 40, "--batch-size", 20, *flags, *cuda]
    run(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", f"{name}-straight")
    run(f"{name}/train.py", *train, "--epochs", 1, "--out-dir", name)
    run(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", name, "--resume")
    run(f"{name}/sample.py", best, "--n-samples", 4, "--out-dir", f"{name}-drawn", *cuda)
    run(f"{name}/loglike.py", best, "--n-samples", 4, "--limit", 4, *(flags if name == "vision" else []), *cuda)
    one, other = (load(folder / which / LATEST, name)["model"] for which in (name, f"{name}-straight"))
    return max((one[key].float() - other[key].float()).abs().max().item() for key in one)


def captured_step(name: str, precision: Precision, device: str) -> None:
    """Compile a step and take it."""
    start(name, precision, device, compiled=True)()


def start(name: str, precision: Precision, device: str, compiled: bool) -> Callable[[], None]:
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    setting = Setting(device, 1, precision, compiled)
    return our_step(name, prepare(name, setting), setting)


def rates(device: str, precision: Precision, quick: bool) -> tuple[float, float]:
    """Return the operations per second of a large matrix product, and the bytes per second of a large copy."""
    n = 256 if quick else 8192
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    x = torch.empty(n * n, device=device)
    product, copy = (warm_seconds(action, device, 5) for action in (lambda: a @ a, x.clone))
    return 2 * n**3 / product, 2 * x.nbytes / copy


def step_row(name: str, precision: Precision, device: str, quick: bool) -> dict[str, Any]:
    """Return milliseconds of a step, eager and captured, and its floors."""
    row: dict[str, Any] = {"experiment": name, "precision": precision}
    for kind, compiled in (("eager", False), *([] if quick else [("captured", True)])):
        step = start(name, precision, device, compiled)
        repeated(step, 3, device)()
        n, blocks = (1, 2) if quick else (5, 20)  # the median leaves out the ends of epochs
        times = in_turns({kind: repeated(step, n, device)}, blocks, time.perf_counter)[kind]
        seconds = quartiles(times)[1] / n
        row |= {f"{kind}_ms": 1e3 * seconds, f"{kind}_busy": busy(step, device, seconds)}
        if not compiled:
            with FlopCounterMode(display=False) as counter:
                step()
    n_weights = sum(weight.numel() for weight in build_model(name, EXPERIMENTS[name].n_latents).parameters())
    of_products, of_copies = rates(device, precision, quick)
    row["products_floor_ms"] = 1e3 * counter.get_total_flops() / of_products
    row["weights_floor_ms"] = 1e3 * 8 * 4 * n_weights / of_copies
    return row


def busy(step: Callable[[], object], device: str, seconds: float, n: int = 10) -> float | None:
    """Return the fraction of a step's time in which the device's kernels run; None on a CPU."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        repeated(step, n, device)()
    kernels = sum(event.self_device_time_total for event in found.key_averages())
    return 1e-6 * kernels / n / seconds


def loglike_seconds(name: str, precision: Precision, device: str, n_samples: int) -> list[float]:
    """Return the quartiles of the seconds that loglike.py takes for 10 examples."""
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    experiment, data = EXPERIMENTS[name], prepare(name, Setting(device))[:10]
    model = build_model(name, experiment.n_latents).to(device)

    def estimate() -> None:
        evaluate(
            model,
            data,
            quantities=experiment.quantities,
            predictions=experiment.predictions,
            n_samples=n_samples,
            precision=precision,
        )

    estimate()  # the first call starts the device
    return quartiles(in_turns({"loglike": estimate}, 5, time.perf_counter)["loglike"])


if __name__ == "__main__":
    cli.run(main)
