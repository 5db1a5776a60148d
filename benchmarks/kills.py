"""Kill training runs at random moments, resume them, and compare them bit for bit with runs that were never stopped.

    python benchmarks/kills.py --minutes 60

mnist/train.py trains on synthetic digits, in one process or two of torchrun's, in one stage or two (--preset weak).
Each run is killed and resumed until it ends. Half the kills are SIGKILL, the others signals that ask a run to stop;
under torchrun they hit torchrun, one of its processes, or all three. The counts are written after each run, and those
of an existing file are continued. Needs Linux's /proc.
"""

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mvae import cli
from mvae.errors import UserError
from mvae.run import checkpoint
from mvae.run.signals import STOPPING
from synthetic import __main__ as synthetic

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from common import ROOT, about, write

SMALL = ["--data-dir", "../data", "--limit", "100", "--n-val", "100", "--n-latents", "4", "--epochs", "2"]
SMALL += ["--log-interval", "1", "--out-dir", "run", "--resume"]
ONE = [*SMALL, "--binarize", "--iw-samples", "2", "--annealing-epochs", "2", "--batch-size", "10"]
TWO = [*SMALL, "--preset", "weak", "--n-paired", "40", "--images-first", "2", "--batch-size", "20"]
KINDS = {"one stage": (1, ONE), "two stages": (1, TWO), "torchrun": (2, ONE), "torchrun, two stages": (2, TWO)}
"""The number of processes and the flags. Each run has 20 steps."""

FORKED = multiprocessing.get_context("forkserver")  # its server has imported what takes seconds
PRELOAD = ["mvae.run.run", "mvae.run.config", "mvae.data.mnist", "torch._dynamo", "torch.distributed.launcher.api"]
FORKED.set_forkserver_preload([*PRELOAD, "torch.utils.tensorboard", "matplotlib.figure", "sklearn.linear_model"])


@dataclass(kw_only=True)
class Config:
    minutes: float = 60  # time after which no new run begins
    seed: int = 0  # random seed
    json: Path = ROOT / "results" / "kills.json"  # file of the counts


def start(n_processes: int, folder: Path, flags: list[str]) -> None:
    """Do what `python train.py` does, or `torchrun --nproc_per_node 2 train.py`, in a new process group."""
    os.setsid()
    if n_processes == 1:
        return train(folder, flags)
    os.dup2(os.open(folder / "torchrun", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    config = LaunchConfig(1, 1, n_processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=folder.name)
    config.max_restarts, config.start_method, config.monitor_interval = 0, "fork", 0.02
    elastic_launch(config, train)(folder, flags)


def train(folder: Path, flags: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(folder / f"err {os.environ.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for name in STOPPING:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv, sys.path[:0] = [str(ROOT / "mnist/train.py"), *flags], [str(ROOT / "mnist")]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    signal.alarm(10)  # otherwise a forked process that has ended would wait for its torchrun, which may be dead


def members(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] * (int(its_group) == group and state != "Z")
    return found


def life(kind: str, folder: Path, rng: np.random.Generator | None = None, span: float = 300) -> tuple[bool, Counter]:
    """Start or resume a run; with `rng`, kill it within `span` seconds. Return whether it is complete, and counts."""
    (n_processes, flags), found, status = KINDS[kind], Counter[str](), [0]
    every = ["--save-every", str(rng.choice([1e-9, 10]))] if rng else []  # after each step, or each epoch
    for path in folder.glob("err *"):
        path.unlink()
    process = FORKED.Process(target=start, args=(n_processes, folder, flags + every))
    process.start()
    process.join(timeout=rng.uniform(0, span) if rng else span)
    assert process.pid
    if rng and process.exitcode is None:
        number = signal.SIGKILL if rng.random() < 0.5 else getattr(signal, rng.choice(STOPPING))
        pids = members(process.pid) or [process.pid]
        for pid in pids if rng.random() < 0.3 else [int(rng.choice(pids))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        found["SIGKILL" if number == signal.SIGKILL else "stop signals"] += 1
        status += [-number, 128 + number]
        process.join(timeout=40)
        if n_processes > 1:  # with forked processes, torchrun waits forever if one is killed after its script has ended
            process.kill()
    ends = time.monotonic() + 60
    while (left := members(process.pid)) and time.monotonic() < ends:
        time.sleep(0.05)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    said = "".join(path.read_text(errors="replace") for path in folder.glob("err *"))
    known = r".*(the state is saved|another process of this run is gone).*|\[rank\d\]:\[W.*"  # the last is torch's
    unknown = [line for line in said.splitlines() if not re.fullmatch(known, line)]
    unknown += [f"exit status {process.exitcode}"] * (n_processes == 1 and process.exitcode not in status)
    if unknown:
        print(kind, *unknown, sep="\n", file=sys.stderr, flush=True)
    traceback = "Traceback" in said or "Fatal Python error" in said
    found += Counter({"saved stops": "the state is saved" in said, "hung": bool(left), "tracebacks": traceback})
    return process.exitcode == 0, found + Counter({"refusals": bool(unknown) and not traceback})


def progress(folder: Path) -> list[tuple[int, int]]:
    """Return the epoch and step of each stage's saved state; an empty list if one can't be read."""
    files = [folder / stage / checkpoint.LATEST for stage in ("run/images", "run")]
    with contextlib.suppress(UserError):
        states = [checkpoint.load(file, "mnist") for file in files if file.exists()]
        return [(state["epoch"], state["done"]) for state in states]
    return []


def content(run: Path) -> list[str]:
    """Return digests of weights, optimizer, history and best model, without times."""
    latest, best = (checkpoint.load(run / name, "mnist") for name in (checkpoint.LATEST, checkpoint.BEST))
    stats = re.sub(r'"(seconds|examples_per_second)": [^,]*', "", (run / "stats.jsonl").read_text())
    return [*map(checkpoint.digest, (latest["model"], latest["optimizer"], latest["best"], best["model"], stats))]


def case(kind: str, folder: Path, unbroken: Path, span: float, rng: np.random.Generator) -> Counter[str]:
    """Kill and resume a run until it is complete; return the counts."""
    total, complete, before = Counter({"runs": 1}), False, list[tuple[int, int]]()
    for left in reversed(range(30)):
        complete, found = life(kind, folder, rng, span) if left else life(kind, folder)
        now = progress(folder)
        total += found + Counter({"lost": now < before})
        before = now
        if complete:
            break
    runs = [path.parent.relative_to(unbroken) for path in unbroken.glob("run/**/stats.jsonl")]
    same = complete and all(content(unbroken / run) == content(folder / run) for run in runs)
    return total + Counter({"differences": not same})


def main() -> None:
    config = cli.parse(__doc__, Config)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    kinds: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    if config.json.exists():
        kinds |= json.loads(config.json.read_text())["kinds"]
    ends, spans = time.monotonic() + 60 * config.minutes, dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        synthetic.main(["digits", str(root / "data"), "--train", "200", "--test", "100"])
        FORKED.Process(target=int).start()  # starts the server
        while time.monotonic() < ends:
            kind = min(kinds, key=lambda kind: kinds[kind].get("runs", 0))
            if kind not in spans:
                (root / kind).mkdir()
                started = time.monotonic()
                if not life(kind, root / kind)[0]:
                    raise UserError(f"{kind}: the run that is never stopped failed")
                spans[kind] = time.monotonic() - started
            number = kinds[kind].get("runs", 0)
            (folder := root / f"{kind} {number}").mkdir()
            rng = np.random.default_rng([config.seed, list(KINDS).index(kind), number])
            total = Counter(kinds[kind]) + case(kind, folder, root / kind, spans[kind], rng)
            kinds[kind] = {name: int(n) for name, n in total.items()}
            write(config.json, {**about(), "seed": config.seed, "kinds": kinds})


if __name__ == "__main__":
    cli.run(main)
