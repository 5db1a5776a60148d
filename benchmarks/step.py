"""Time a training step of each experiment against the plain reference, which has a pass for every ELBO term.

A plain step (plain.py) encodes and decodes every modality in every term, in the layers and formulas of the published
2018 code, and ends in torch's default Adam. The published code encodes a term's inputs only; so does the plain step
called "given only". Ours is the loop of train.py. Before it is timed, both losses are found equal in evaluation mode.

Each row comes from a process in which blocks of plain steps and of ours take turns; a ratio is that of neighbouring
blocks.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mvae import Data, Run, Term, Training, cli, random_subsets
from mvae.data.dataset import permuted_rows
from mvae.model import Precision, autocast

import numpy as np
import torch

import plain
from common import about, alone, in_turns, quartiles, write
from experiments import EXPERIMENTS, NAMES, Name, build_model

BLOCK_SECONDS = 0.2


class Setting(NamedTuple):
    """How a step runs."""

    device: str = "cpu"
    threads: int = 1
    precision: Precision = "fp32"
    compiled: bool = False


@dataclass(kw_only=True)
class Config:
    experiments: tuple[Name, ...] = NAMES  # experiments to measure
    seconds: float = 5  # seconds to measure per row, after a warm-up
    threads: tuple[int, ...] = (1,)  # numbers of CPU threads
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)  # precisions of the networks
    eager: bool = False  # omit the compiled steps
    json: Path | None = None  # file for the numbers


def main() -> None:
    config = cli.parse(__doc__, Config)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    content: dict[str, Any] = {**about(), "device": ", ".join(devices), "steps": []}
    content["gpu"] = torch.cuda.get_device_name() if len(devices) > 1 else None
    compiled = (False,) if config.eager else (False, True)
    for name, device in itertools.product(config.experiments, devices):
        threads = config.threads if device == "cpu" else config.threads[:1]
        for setting in itertools.starmap(Setting, itertools.product([device], threads, config.precision, compiled)):
            times = alone(time_steps, name, setting, config.seconds)
            row = {"experiment": name, "batch_size": EXPERIMENTS[name].batch_size, **setting._asdict(), **times}
            content["steps"].append(row)
            print(row, flush=True)
    write(config.json, content)


def time_steps(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Return the times of both steps, their ratios, and the share of our step that making the batch takes."""
    data = prepare(name, setting)
    check(name, data, setting)
    rows = itertools.cycle(permuted_rows(data, EXPERIMENTS[name].batch_size, 0))
    steps: dict[str, Callable[[], object]] = {
        "plain": plain_step(name, data, setting),
        "given only": plain_step(name, data, setting, given_only=True),
        "ours": our_step(name, data, setting),
        "batch": lambda: data.batch(next(rows)),
    }
    slowest = max(warm_seconds(step, setting.device, 1) for step in steps.values())
    n = max(1, round(BLOCK_SECONDS / slowest))
    blocks = {kind: repeated(step, n, setting.device) for kind, step in steps.items()}
    rounds = max(5, round(seconds / (n * slowest * len(blocks))))
    times = {kind: np.array(found) / n for kind, found in in_turns(blocks, rounds, time.perf_counter).items()}
    return {
        **{f"{kind}_ms": quartiles(1e3 * times[kind]) for kind in ("plain", "ours")},
        **{f"{kind} / ours": quartiles(times[kind] / times["ours"]) for kind in ("plain", "given only")},
        "data_share": float(np.median(times["batch"]) / np.median(times["ours"])),
    }


def prepare(name: str, setting: Setting) -> Data:
    """Seed, set the threads and return the experiment's data on the device."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    return EXPERIMENTS[name].data().to(torch.device(setting.device))


def repeated(step: Callable[[], object], n: int, device: str) -> Callable[[], None]:
    """Return n steps in a row, the device's work included."""

    def run() -> None:
        for _ in range(n):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def warm_seconds(step: Callable[[], object], device: str, n: int) -> float:
    """Return the seconds per call of n calls, after some that don't count."""
    repeated(step, min(n, 3), device)()
    started = time.perf_counter()
    repeated(step, n, device)()
    return (time.perf_counter() - started) / n


def our_step(name: str, data: Data, setting: Setting) -> Callable[[], None]:
    """Return a step of the loop of train.py."""
    steps = loop(name, data, setting)
    return lambda: next(steps)


def loop(
    name: str, data: Data, setting: Setting, batch_size: int | None = None, out_dir: Path | None = None
) -> Iterator[None]:
    """Train as train.py does, and yield after each step."""
    experiment = EXPERIMENTS[name]
    objective = experiment.objective(build_model(name, experiment.n_latents))
    optimizer = torch.optim.AdamW(objective.parameters(), experiment.lr, weight_decay=0, fused=True)
    validation = data[:100]
    with tempfile.TemporaryDirectory() as folder:
        config = Training(
            out_dir=out_dir or Path(folder, "run"), cuda=setting.device == "cuda", threads=setting.threads,
            precision=setting.precision, compile=setting.compiled, log_interval=10**9, save_every=1e9,
        )  # fmt: skip
        with Run(name, objective, optimizer, config) as run:
            for _ in run.epochs(10**9):
                for batch, present in run.batches(data, batch_size or experiment.batch_size):
                    run.set(lr=experiment.lr, beta=1)
                    subsets = run.random_subsets(experiment.approx_m)
                    loss, parts = run.objective(batch, run.beta, subsets, present)
                    run.backward(loss, parts)
                    run.step()
                    yield
                run.validate(validation)


def plain_step(name: str, data: Data, setting: Setting, given_only: bool = False) -> Callable[[], None]:
    """Return a step of the plain reference, on one batch that is made before."""
    experiment = EXPERIMENTS[name]
    objective = experiment.objective(build_model(name, experiment.n_latents)).to(setting.device).train()
    model = objective.model
    plain.published(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.lr)
    batch, _ = data.batch(torch.arange(experiment.batch_size))
    rng = np.random.default_rng(0)

    def step() -> None:
        optimizer.zero_grad()
        masks = random_subsets(len(model.modalities), experiment.approx_m, rng).tolist()
        subsets = [tuple(itertools.compress(model.modalities, mask)) for mask in masks]
        terms = [*objective.terms, *(Term(subset, subset) for subset in subsets)]
        with autocast(setting.precision, torch.device(setting.device)):
            loss = plain.loss(
                model, batch, terms, experiment.weights, encode=experiment.plain_encode, given_only=given_only
            )
        loss.item()  # the published code adds it to a running mean
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def check(name: str, data: Data, setting: Setting) -> None:
    """Raise AssertionError unless both steps compute the same loss, in evaluation mode."""
    experiment, device = EXPERIMENTS[name], torch.device(setting.device)
    objective = experiment.objective(build_model(name, experiment.n_latents)).to(device).eval()
    batch, _ = data.batch(torch.arange(experiment.batch_size))
    noise = objective.noise(experiment.batch_size)
    with autocast(setting.precision, device):
        ours = objective(batch, noise=noise)[0].item()
        other = plain.loss(
            objective.model, batch, objective.terms, experiment.weights, encode=experiment.plain_encode, noise=noise
        ).item()
    if not math.isclose(ours, other, rel_tol=1e-4 if setting.precision == "fp32" else 1e-2):
        raise AssertionError(f"the plain loss is {other}, ours is {ours}")


if __name__ == "__main__":
    cli.run(main)
