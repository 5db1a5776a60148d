"""Measure on a GPU, in one command of some minutes, and write results/gpu.json after each part.

The parts: every script with --cuda for a few steps, with a resumed run compared to a straight one; a step of each
experiment, eager and captured as a CUDA graph, in both precisions, compared to what the device could do at best;
log-likelihoods in both precisions. A part that fails leaves the others' numbers. recipes.py mnist fast with
--flags="--cuda --compile" makes a whole run.

A step's floors are its matrix products at the rate of a large product, and the traffic of the weights (weight, gradient
and Adam's two moments, read and written) at the rate of a large copy. `busy` is the fraction of the step's time in
which a kernel runs.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvae import cli
from mvae.model import Precision
from mvae.run.checkpoint import BEST, LATEST, load

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, about, alone, quartiles, write
from experiments import EXPERIMENTS, NAMES, build_model
from step import Setting, our_step, prepare, repeated, time_loglike, warm_seconds

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(kw_only=True)
class Config:
    device: Literal["cuda", "cpu"] = "cuda"  # device to measure; cpu: to try the command out
    quick: bool = False  # measure mnist only, and almost no steps
    json: Path = ROOT / "results" / "gpu.json"  # file to write


def main() -> None:
    config = cli.parse(__doc__, Config)
    if config.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available to torch: nothing is measured")
        return
    content: dict[str, Any] = {**about(), "device": config.device, "quick": config.quick}
    content["gpu"] = torch.cuda.get_device_name() if config.device == "cuda" else None
    parts: list[Callable[[str, bool], dict[str, Any]]] = [scripts, steps, likelihoods]
    for part in parts:
        began = time.perf_counter()
        try:
            content[part.__name__] = part(config.device, config.quick)
        except Exception as error:  # the other parts are worth measuring
            content[part.__name__] = {"failed": f"{type(error).__name__}: {error}"[-2000:]}
        print(f"{part.__name__}: {time.perf_counter() - began:.0f} s, {content[part.__name__]}", flush=True)
        write(config.json, content)


def asked(quick: bool) -> Sequence[str]:
    return NAMES[:1] if quick else NAMES


def script(name: str, *words: object, folder: Path) -> None:
    """Run a script on the folder's data. Raises RuntimeError with its errors if it fails."""
    command = [sys.executable, *(["-m", name] if name == "synthetic" else [str(ROOT / name)]), *map(str, words)]
    environment = {**os.environ, "MVAE_DATA_DIR": str(folder / "data"), "MVAE_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")


def scripts(device: str, quick: bool) -> dict[str, Any]:
    """Return by experiment the largest difference between the weights of a resumed run and a straight one."""
    cuda = ["--cuda"] if device == "cuda" else []

    def difference(name: str, folder: Path) -> float:
        data: list[object] = ["--n-val", 60] if name in ("mnist", "fashionmnist", "multimnist") else []
        folders: list[object] = []
        if name == "multimnist":
            script("multimnist/datasets.py", "--train", 400, "--test", 60, folder=folder)
        if name == "vision":
            folders = [f"--{kind}-dir=data/celeba/img_align_celeba" for kind in ("image", "gray", "edge", "mask")]
        train = ["--limit", 200, "--batch-size", 50, *data, *folders, *cuda]
        script(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", f"{name}-straight", folder=folder)
        script(f"{name}/train.py", *train, "--epochs", 1, "--out-dir", name, folder=folder)
        script(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", name, "--resume", folder=folder)
        best = f"{name}/{BEST}"
        script(f"{name}/sample.py", best, "--n-samples", 4, "--out-dir", f"{name}-drawn", *cuda, folder=folder)
        script(f"{name}/loglike.py", best, "--n-samples", 20, "--limit", 20, *folders, *cuda, folder=folder)
        one, other = (load(folder / which / LATEST, name)["model"] for which in (name, f"{name}-straight"))
        return max((one[key].float() - other[key].float()).abs().max().item() for key in one)

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor() as pool:
        folder = Path(place)
        for kind in ("digits",) if quick else ("digits", "fashion", "faces"):
            script("synthetic", kind, folder / "data", "--train", 400, "--test", 60, folder=folder)
        found = pool.map(lambda name: difference(name, folder), asked(quick))
        return {"resumed - straight": dict(zip(asked(quick), found, strict=True))}


def rates(device: str, quick: bool) -> dict[str, float]:
    """Return the operations per second of a large matrix product in each precision, and bytes per second of a copy."""
    n = 256 if quick else 8192
    found: dict[str, float] = {}
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        a = torch.randn(n, n, device=device).to(dtype)
        found[precision] = 2 * n**3 / warm_seconds(functools.partial(torch.mm, a, a), device, 5)
    x = torch.empty(n * n, device=device)
    found["bytes"] = 2 * x.nbytes / warm_seconds(lambda: x.clone(), device, 5)
    return found


def steps(device: str, quick: bool) -> dict[str, Any]:
    """Return a row for each experiment and precision: milliseconds of a step, eager and captured, and its floors."""
    best = alone(rates, device, quick)
    precisions = PRECISIONS[:1] if quick else PRECISIONS
    rows = [alone(step_row, name, device, precision, quick, best) for name in asked(quick) for precision in precisions]
    return {"rates": best, "rows": rows}


def step_row(name: str, device: str, precision: Precision, quick: bool, best: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"experiment": name, "precision": precision}
    for kind, compiled in (("eager", False), *([] if quick else [("captured", True)])):
        setting = Setting(device, 1, precision, compiled)
        step = our_step(name, prepare(name, setting), setting)
        seconds = warm_seconds(step, device, 2 if quick else 100)
        row |= {f"{kind}_ms": 1e3 * seconds, f"{kind}_busy": busy(step, device, seconds)}
        if not compiled:
            with FlopCounterMode(display=False) as counter:
                step()
    n_weights = sum(weight.numel() for weight in build_model(name, EXPERIMENTS[name].n_latents).parameters())
    row["products_floor_ms"] = 1e3 * counter.get_total_flops() / best[precision]
    row["weights_floor_ms"] = 1e3 * 8 * 4 * n_weights / best["bytes"]
    return row


def busy(step: Callable[[], object], device: str, seconds: float, n: int = 10) -> float | None:
    """Return the fraction of a step's time in which the device's kernels run; None on a CPU."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        repeated(step, n, device)()
    kernels = sum(event.self_device_time_total for event in found.key_averages())
    return 1e-6 * kernels / n / seconds


def likelihoods(device: str, quick: bool) -> dict[str, Any]:
    """Return the quartiles of the seconds that loglike.py takes for 10 examples with 1,000 importance samples."""
    precisions = PRECISIONS[:1] if quick else PRECISIONS
    tasks = [(name, device, precision) for name in asked(quick) for precision in precisions]
    return {
        f"{name}, {precision}": quartiles(alone(time_loglike, name, device, precision)) for name, _, precision in tasks
    }


if __name__ == "__main__":
    cli.run(main)
