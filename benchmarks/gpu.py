"""Measure what a GPU alone can show, in one command of some minutes, and write it to results/gpu.json.

Its parts are: every script with --cuda for a few steps, and a resumed run beside a straight one; a step of each
experiment, eager and captured, in both precisions, beside what the device could do at best; a step under NCCL with one
process; log-likelihoods in both precisions; and a run on MNIST with its numbers. Each is a process by itself, so that
one that fails leaves the others' numbers. Without a GPU it says so.

A step's floors are its matrix products at the rate of a large product, and the weights' traffic (weight, gradient and
Adam's two moments, read and written) at the rate of a large copy. `busy` is the share of the step's time in which some
kernel runs: the rest are the gaps between launches.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from step import Setting, our_step, seconds_of, synchronize
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mvae import Objective, evaluate, train_step
from mvae.checkpoint import LATEST, load
from mvae.files import write_atomically
from mvae.model import Precision
from mvae.scripts import flags, running

from experiments import EXPERIMENTS, build_model

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the command out")
    parser.add_argument("--quick", action="store_true", help="mnist alone, and next to no steps")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "gpu.json", help="file to write")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device that torch can use: nothing is measured")
        return
    if args.part:
        print(json.dumps(PARTS[args.part](args.device, args.quick)))
        return
    started = time.perf_counter()
    content: dict[str, Any] = {
        **running.origin(),
        "device": args.device,
        "quick": args.quick,
        "torch": torch.__version__,
    }
    content["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    for part in PARTS:
        begun = time.perf_counter()
        words = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--device",
            args.device,
            *(["--quick"] if args.quick else []),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        last = (done.stdout.splitlines() or [""])[-1]
        content[part] = json.loads(last) if done.returncode == 0 else {"failed": done.stderr.splitlines()[-20:]}
        print(
            f"{part}: {time.perf_counter() - begun:.0f} s, {last if done.returncode == 0 else done.stderr}", flush=True
        )
    content["seconds"] = time.perf_counter() - started
    write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def asked(quick: bool) -> list[str]:
    """The experiments to run."""
    return ["mnist"] if quick else list(EXPERIMENTS)


def script(name: str, *words: object, folder: Path) -> None:
    """Runs a script to its end on made data. Raises RuntimeError with what it said if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, words)],
        cwd=folder,
        env={**os.environ, "MVAE_DATA_DIR": str(folder / "data"), "MVAE_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} {words}: {done.stderr[-2000:]}")


def made_data(folder: Path, names: Sequence[str]) -> None:
    """Small made sets of the kinds that the experiments `names` read."""
    kinds = {"digits": {"mnist", "multimnist"}, "fashion": {"fashionmnist"}, "faces": {"celeba", "celeba19", "vision"}}
    for kind, readers in kinds.items():
        if readers.intersection(names):
            sizes = ["--train", "400", "--test", "60", *(["--val", "60"] if kind == "faces" else [])]
            words = [sys.executable, "-m", "mvae.synthetic", kind, str(folder / "data"), *sizes]
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    if "multimnist" in names:
        script("multimnist/datasets.py", "--train", 400, "--test", 60, folder=folder)


def scripts(device: str, quick: bool) -> dict[str, Any]:
    """By experiment, the largest difference between the weights of a resumed run and of a straight one."""
    cuda = ["--cuda"] if device == "cuda" else []

    def of(name: str, folder: Path) -> float:
        data: list[object] = ["--n-val", 60] if name in ("mnist", "fashionmnist", "multimnist") else []
        if name == "vision":
            faces = "data/celeba/img_align_celeba"
            data = [f"--{kind}-dir={faces}" for kind in ("image", "gray", "edge", "mask")]
        train: list[object] = ["--limit", 200, "--batch-size", 50, *data, *cuda]
        script(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", f"{name}-straight", folder=folder)
        script(f"{name}/train.py", *train, "--epochs", 1, "--out-dir", name, folder=folder)
        script(f"{name}/train.py", *train, "--epochs", 2, "--out-dir", name, "--resume", folder=folder)
        best = f"{name}/model_best.pth.tar"
        script(f"{name}/sample.py", best, "--n-samples", 4, "--out-dir", f"{name}-drawn", *cuda, folder=folder)
        few = ["--n-samples", 20, "--limit", 20]
        more = data if name == "vision" else []
        script(f"{name}/loglike.py", best, *few, *more, *cuda, folder=folder)
        runs = [load(folder / which / LATEST, name)["model"] for which in (name, f"{name}-straight")]
        return max((runs[0][key].float() - runs[1][key].float()).abs().max().item() for key in runs[0])

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor() as pool:
        folder = Path(place)
        made_data(folder, asked(quick))
        found = pool.map(lambda name: of(name, folder), asked(quick))
        return {"resumed less straight": dict(zip(asked(quick), found, strict=True))}


def warm_seconds(step: Callable[[], object], device: str, n: int) -> float:
    """Seconds of a call, a mean over n of them, after some that aren't counted."""
    seconds_of(step, min(n, 5), torch.device(device))
    return seconds_of(step, n, torch.device(device))


def rates(device: str, quick: bool) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product in each precision, and bytes a second of a copy."""
    n = 256 if quick else 8192
    found: dict[str, float] = {}
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        a = torch.randn(n, n, device=device).to(dtype)
        found[precision] = 2 * n**3 / warm_seconds(functools.partial(torch.mm, a, a), device, 5)
    x = torch.empty(n * n, device=device)
    found["bytes"] = 2 * x.nbytes / warm_seconds(lambda: x.clone(), device, 5)
    return found


def steps(device: str, quick: bool) -> dict[str, Any]:
    """A row for each experiment and precision: milliseconds of a step, eager and captured, and the floors' shares."""
    best, rows = rates(device, quick), []
    for name in asked(quick):
        data = EXPERIMENTS[name].data()[:1000].to(torch.device(device))
        for precision in PRECISIONS[:1] if quick else PRECISIONS:
            row: dict[str, Any] = {"experiment": name, "precision": precision}
            for kind, compiled in (("eager", False), ("captured", True)):
                if compiled and quick:
                    continue
                step = our_step(name, data, Setting(torch.device(device), 1, precision, compiled))
                took = warm_seconds(step, device, 2 if quick else 100)
                row[f"{kind}_ms"], row[f"{kind}_busy"] = 1e3 * took, busy(step, device, took, 2 if quick else 10)
                if not compiled:
                    with FlopCounterMode(display=False) as counter:
                        step()
            weights = sum(weight.numel() for weight in build_model(name, EXPERIMENTS[name].n_latents).parameters())
            floors = {
                "products": counter.get_total_flops() / best[precision],
                "weights": 8 * 4 * weights / best["bytes"],
            }
            row |= {f"{floor}_floor_ms": 1e3 * least for floor, least in floors.items()}
            rows.append(row)
    return {"rates": best, "rows": rows}


def busy(step: Callable[[], object], device: str, took: float, n: int) -> float | None:
    """The share of a step's time in which the device's kernels run; None on a CPU."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(n):
            step()
        synchronize(torch.device(device))
    kernels = sum(event.self_device_time_total for event in found.key_averages())
    return 1e-6 * kernels / n / took


def one_process(device: str, quick: bool) -> dict[str, Any]:
    """The loss after a few steps in a group of one process, and of the same steps without a group."""
    data, losses = EXPERIMENTS["mnist"].data()[:1000].to(torch.device(device)), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=address, rank=0, world_size=1)
    for grouped in (False, True):
        torch.manual_seed(0)
        objective = Objective(build_model("mnist", 64)).to(device)
        module = DistributedDataParallel(objective) if grouped else objective
        optimizer = torch.optim.Adam(objective.parameters(), fused=True)
        for i in range(2 if quick else 20):
            torch.manual_seed(i)
            batch, _ = data.batch(torch.arange(100 * (i % 10), 100 * (i % 10 + 1), device=data.stored_on))
            totals = train_step(module, optimizer, batch)
        losses.append((totals.loss / totals.n).item())
    distributed.destroy_process_group()
    return {"backend": backend, "alone": losses[0], "in a group": losses[1]}


def likelihoods(device: str, quick: bool) -> dict[str, Any]:
    """Seconds for each example with 1,000 importance samples, in both precisions, and how far log p differs."""
    found: dict[str, Any] = {}
    for name in asked(quick):
        torch.manual_seed(0)
        experiment, n = EXPERIMENTS[name], 2 if quick else 50
        model = build_model(name, experiment.n_latents).to(device).eval()
        data = experiment.data()[:n].to(torch.device(device))
        means = {}
        for precision in PRECISIONS[:1] if quick else PRECISIONS:
            started = time.perf_counter()
            estimates = evaluate(
                model,
                data,
                quantities=experiment.quantities,
                predictions=experiment.predictions,
                n_samples=10 if quick else 1000,
                precision=precision,
            ).estimates
            found[f"{name}, {precision}"] = {"seconds": (time.perf_counter() - started) / n}
            means[precision] = torch.stack([e.log_p.mean() for e in estimates.values() if len(e.log_p) == n])
        if len(means) == 2:
            found[f"{name}, bf16"]["nats"] = (means["bf16"] - means["fp32"]).abs().max().item()
    return found


def mnist(device: str, quick: bool) -> dict[str, Any]:
    """A run on MNIST, or with `quick` on a few made digits: the last epoch's record, and what loglike.py writes."""
    cuda = ["--cuda", "--compile", "--precision", "bf16"] if device == "cuda" else []
    with tempfile.TemporaryDirectory() as place:
        folder, length, few = Path(place), ["--epochs", 20, "--annealing-epochs", 8], ["--limit", 1000]
        data: list[object] = ["--data-dir", Path(flags.parser(None).get_default("data_dir")).resolve()]
        if quick:
            made_data(folder, ["mnist"])
            length, few, data = ["--epochs", 1, "--n-val", 60, "--limit", 100], ["--limit", 10, "--n-samples", 10], []
        script("mnist/train.py", "--preset", "fast", *length, *data, *cuda, "--out-dir", "run", folder=folder)
        words = ["run/model_best.pth.tar", *few, *data, *(["--cuda"] if device == "cuda" else [])]
        script("mnist/loglike.py", *words, "--json", "numbers.json", folder=folder)
        record = json.loads((folder / "run" / "stats.jsonl").read_text().splitlines()[-1])
        return {"last epoch": record, "loglike": json.loads((folder / "numbers.json").read_text())}


PARTS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "scripts": scripts,
    "steps": steps,
    "one_process": one_process,
    "likelihoods": likelihoods,
    "mnist": mnist,
}

if __name__ == "__main__":
    running.run(main)
