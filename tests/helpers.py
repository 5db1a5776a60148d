"""What several test files need: the scripts run as processes, and a small model of three modalities with its data."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mvae import MVAE, Bernoulli, Categorical, Data, Objective, Run, Term, Training
from mvae.run import checkpoint
from mvae.run.metrics import Metric
from mvae.run.schedules import Schedule, linear

import torch
from torch import Tensor, nn

import warm

ROOT = Path(__file__).resolve().parents[1]

RunHere = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture run_here: from a script's path and its arguments to what the process said."""

SHORT = ["--n-val", "200", "--batch-size", "50", "--annealing-epochs", "20", "--log-interval", "5"]
"""The flags of a short run on 1,200 made digits: an epoch is 20 steps."""


class Trained(NamedTuple):
    """A run of mnist/train.py: where it wrote, and what the process said."""

    out_dir: Path
    process: subprocess.CompletedProcess[str]


def environment(**more: str) -> dict[str, str]:
    """A script's environment: one thread, no CUDA device, `more`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **more}


def command(script: str, *arguments: object) -> list[str]:
    """`python SCRIPT ARGUMENTS`; the script is named by its path from the repository's root."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script: str, *arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, as a user does."""
    options = {"env": environment(), **options}
    return subprocess.run(
        command(script, *arguments), cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **options
    )


def assert_ended(done: subprocess.CompletedProcess[str]) -> None:
    """The process ended well, and without a word on stderr."""
    assert (done.returncode, done.stderr) == (0, "")


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *said: object) -> None:
    """The process ended with `status` and one line on stderr, which has all of `said` in it."""
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for words in said:
        assert str(words) in done.stderr


FORKED = multiprocessing.get_context("forkserver")
"""Processes of it start in a moment: they are forked from a server that has imported torch.

The server never computes, as no process may be forked after a backward pass.
"""
FORKED.set_forkserver_preload(  # not mvae: its defaults are read from the environment
    [
        "cv2", "filelock", "matplotlib.figure", "scipy.sparse", "sklearn.linear_model", "sklearn.manifold",
        "sklearn.mixture", "sklearn.neighbors", "torch._dynamo", "torch.utils.tensorboard",
    ]
)  # fmt: skip


def start_warm(
    script: str, *arguments: object, logs: tuple[Path, Path], cwd: Path, env: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts what `python SCRIPT ARGUMENTS >LOGS[0] 2>LOGS[1]` starts, as a process of FORKED."""
    words = [str(ROOT / script), *map(str, arguments)]
    process = FORKED.Process(target=warm.run_script, args=(words, logs, cwd, dict(env or environment())))
    process.start()
    return process


def run_warm(
    script: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Does what `run` does, without the seconds in which a process imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_warm(script, *arguments, logs=(out, err), cwd=cwd or Path.cwd(), env=env)
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command(script, *arguments), 300, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(
            command(script, *arguments), process.exitcode, out.read_text(), err.read_text()
        )


def torchruns_variables(world: int) -> list[dict[str, str]]:
    """The environment variables of each process of a group at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]


def run_two(script: str, *arguments: object, cwd: Path) -> list[str]:
    """Runs a script to its end as two processes of torchrun; what each printed."""
    logs = [(cwd / f"out {rank}", cwd / f"err {rank}") for rank in (0, 1)]
    both = [
        start_warm(script, *arguments, logs=log, cwd=cwd, env=environment(**variables))
        for log, variables in zip(logs, torchruns_variables(2), strict=True)
    ]
    for process in both:
        process.join(timeout=300)
        assert process.exitcode == 0, logs[0][1].read_text()
    return [out.read_text() for out, _ in logs]


LOCAL = ("datasets", "model", "setup", "transform", "watermark")
"""Modules that an experiment's scripts import from their own folder."""


@contextlib.contextmanager
def script(path: str) -> Iterator[ModuleType]:
    """Import a script, named by its path from the repository's root, as from its own folder."""
    name, before = path.replace("/", "_").removesuffix(".py"), sys.modules.copy()
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec
    assert spec.loader
    for local in LOCAL:
        sys.modules.pop(local, None)
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.pop(0)
        for local in (name, *LOCAL):
            sys.modules.pop(local, None)
        sys.modules.update({local: before[local] for local in LOCAL if local in before})


def stats(out_dir: Path) -> list[dict[str, Any]]:
    """The records of stats.jsonl."""
    return [json.loads(line) for line in (out_dir / "stats.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Epochs' records, less what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "examples_per_second")}
        for record in records
    ]


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, every tensor of them bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return a == b


def assert_same_run(a: Path, b: Path, experiment: str = "mnist") -> None:
    """Two folders hold the same run: weights, optimizer, and all that is reported but the times."""
    latest = [checkpoint.load(folder / checkpoint.LATEST, experiment) for folder in (a, b)]
    best = [checkpoint.load(folder / checkpoint.BEST, experiment) for folder in (a, b)]
    for name in ("model", "optimizer", "epoch", "done", "best"):
        assert same(latest[0][name], latest[1][name]), f"{name} of {checkpoint.LATEST} differs"
    for name in ("model", "epoch", "validation_loss"):
        assert same(best[0][name], best[1][name]), f"{name} of {checkpoint.BEST} differs"
    assert without_times(stats(a)) == without_times(stats(b))


class SmallEncoder(nn.Module):
    """(batch, *event) of any type -> mu, logvar, each (batch, latents), by one linear layer."""

    def __init__(self, n_inputs: int, n_latents: int = 2):
        super().__init__()
        self.linear = nn.Linear(n_inputs, 2 * n_latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.linear(x.float().reshape(len(x), -1)).chunk(2, dim=1)
        return mu, logvar


def small_model(n_latents: int = 2) -> MVAE:
    """A picture (1, 6, 6), four binary attributes and one of three labels; always the same weights."""
    torch.manual_seed(0)
    inputs = {"image": 36, "attrs": 4, "label": 1}
    return MVAE(
        encoders={name: SmallEncoder(n_inputs, n_latents) for name, n_inputs in inputs.items()},
        likelihoods={
            "image": Bernoulli(nn.Sequential(nn.Linear(n_latents, 36), nn.Unflatten(1, (1, 6, 6)))),
            "attrs": Bernoulli(nn.Linear(n_latents, 4)),
            "label": Categorical(nn.Linear(n_latents, 3)),
        },
        n_latents=n_latents,
    )


def small_data(n: int, seed: int, **fields: Any) -> Data:
    """n examples for `small_model`; `fields` are further ones of Data."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=rng)
    attrs = torch.rand(n, 4, generator=rng).round()
    image = (torch.rand(n, 1, 6, 6, generator=rng) + label.view(n, 1, 1, 1) / 2) / 2
    return Data(tensors={"image": image, "attrs": attrs, "label": label}, **fields)


def run_small(
    out_dir: Path,
    *,
    train: Data | None = None,
    validation: Data | None = None,
    model: MVAE | None = None,
    beta: Schedule = linear(2),  # noqa: B008 (a schedule has no state)
    rate: Schedule = lambda t: 1.0,
    metrics: Mapping[str, Metric] | None = None,
    terms: Sequence[Term] | None = None,
    weights: Mapping[str, float] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    n_subsets: int = 0,
    **config: Any,
) -> Run:
    """Train the small model on 24 examples, 4 steps an epoch, for 2 epochs unless `config` says otherwise."""
    how = Training(**{"epochs": 2, "batch_size": 6, "lr": 1e-2, **config}, out_dir=out_dir)
    objective = Objective(model or small_model(), terms, weights=weights, iw_samples=how.iw_samples)
    train, validation = train or small_data(24, seed=0), validation or small_data(10, seed=1)
    with Run("small", objective, optimizer(objective.parameters(), how.lr, fused=True), how) as run:
        for _ in run.epochs(how.epochs):
            for batch, present in run.batches(train, how.batch_size, how.pairs):
                run.set(lr=how.lr * rate(run.t), beta=beta(run.t))
                loss, parts = run.objective(batch, run.beta, run.random_subsets(n_subsets), present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, metrics)
    return run


def at_call(n: int, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable:
    """A transform of Data that does `change` in the n-th step of a run, which before it checks the first batch."""
    calls = 0

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return change(rows) if calls == n + 1 else rows

    return transform
