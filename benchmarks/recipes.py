"""Train recipes of an experiment with several seeds and estimate their log-likelihoods, run by run.

    python benchmarks/recipes.py mnist ablation --seeds 0 1 2
    python benchmarks/recipes.py celeba fast --seeds 0 --flags=--allow-missing

A run that was interrupted is continued, and one whose results exist is skipped. Each writes
results/GRID/EXPERIMENT-RECIPE-SEED.json, and each example's log p, so that two runs can be compared example by example:
on validation examples, since recipes are chosen by it. The runs of `fast` and `longer` are those of the experiments'
own tables, on test examples: they write results/EXPERIMENT-RECIPE-SEED.json, with their curves and the quality of their
draws. `python benchmarks/tables.py` makes the tables.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mvae import cli
from mvae.errors import UsageError, UserError
from mvae.files import write_atomically
from mvae.run.checkpoint import BEST

from common import ROOT


class Grid(NamedTuple):
    """Recipes that are compared with each other; the first is the base.

    train: flags of all. recipes: further flags of each, by name. n_samples: importance samples. limit: examples
    (None: all). compared: example by example on validation, in a table of their own. quality: whether that of draws is
    measured.
    """

    train: Sequence[str]
    recipes: dict[str, Sequence[str]]
    n_samples: int
    limit: int | None = None
    compared: bool = True
    quality: bool = False


BASE = ["--preset", "fast", "--lambda-text", "50", "--beta-hold", "0", "--weight-decay", "0", "--iw-samples", "1"]
TEN_EPOCHS = [*BASE, "--epochs", "10", "--annealing-epochs", "4"]
GRIDS = {
    "ablation": Grid(
        TEN_EPOCHS,
        {
            "base": [],
            "constant-1e-3": ["--lr", "1e-3", "--lr-schedule", "constant", "--warmup-epochs", "0"],
            "cosine": ["--lr-schedule", "cosine"],
            "weight-decay": ["--weight-decay", "0.05"],
            "beta-hold": ["--beta-hold", "1"],
            "lambda-25": ["--lambda-text", "25"],
            "lambda-10": ["--lambda-text", "10"],
            "iw-2": ["--iw-samples", "2"],
            "iw-5": ["--iw-samples", "5"],
            "combined": ["--beta-hold", "1", "--weight-decay", "0.05", "--lambda-text", "25", "--iw-samples", "2"],
        },
        n_samples=200,
        limit=500,
    ),
    "precision": Grid(
        [*BASE, "--epochs", "5", "--annealing-epochs", "2"],
        {"fp32": [], "bf16": ["--precision", "bf16"]},
        n_samples=200,
        limit=1000,
    ),
    "reconstruct": Grid(
        TEN_EPOCHS,
        {"text": [], "given": ["--reconstruct", "given"], "all": ["--reconstruct", "all"]},
        n_samples=200,
        limit=500,
        quality=True,
    ),
    "fast": Grid(["--preset", "fast"], {"fast": []}, n_samples=1000, compared=False, quality=True),
    "longer": Grid(
        ["--preset", "fast", "--beta-hold", "2", "--weight-decay", "0.1", "--iw-samples", "5"],
        {"fast-50": ["--epochs", "50", "--annealing-epochs", "18"]},
        n_samples=1000,
        compared=False,
        quality=True,
    ),
}


@dataclass(kw_only=True)
class Config:
    experiment: Literal["mnist", "binarymnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]  # whose
    grid: Literal["ablation", "precision", "reconstruct", "fast", "longer"]  # recipes to run

    recipes: tuple[str, ...] = ()  # recipes of the grid (default: all)
    seeds: tuple[int, ...] = (0, 1, 2)  # random seeds
    jobs: int = os.cpu_count() or 1  # runs at the same time
    runs_dir: Path = Path("runs")  # folder of the runs' own folders
    precision: Literal["fp32", "bf16"] = "fp32"  # of training and estimates
    n_samples: int | None = None  # importance samples (default: the grid's)
    flags: str = ""  # flags for all scripts, such as --flags=--allow-missing

    def __post_init__(self) -> None:
        if unknown := set(self.recipes) - GRIDS[self.grid].recipes.keys():
            raise UsageError(f"recipes must be among {', '.join(GRIDS[self.grid].recipes)}, got {', '.join(unknown)}")


def main() -> None:
    config = cli.parse(__doc__, Config)
    names = config.recipes or tuple(GRIDS[config.grid].recipes)
    with ThreadPoolExecutor(config.jobs) as pool:
        jobs = [pool.submit(run, config, name, seed) for seed in config.seeds for name in names]
        for job in jobs:
            job.result()


def run(config: Config, recipe: str, seed: int) -> None:
    """Train and evaluate one recipe with one seed, unless its results exist."""
    grid, experiment = GRIDS[config.grid], config.experiment.removeprefix("binary")
    own = ["--binarize"] if config.experiment == "binarymnist" else []
    name = f"{config.experiment}-{recipe}-{seed}"
    folder, split = (Path("results", config.grid), "validation") if grid.compared else (Path("results"), "test")
    result = folder / f"{name}.json"
    if result.exists():
        print(f"{result} exists: {name} is skipped", flush=True)
        return
    out_dir = config.runs_dir / config.grid / name
    model, flags = str(out_dir / BEST), shlex.split(config.flags)
    precision = ["--precision", config.precision] if config.precision != "fp32" else []
    train = [*grid.train, *grid.recipes[recipe], *own, *precision, "--seed", str(seed), "--out-dir", str(out_dir)]
    call(f"{experiment}/train.py", *train, "--resume", *flags, "--log-interval", "1000")
    if not grid.compared:
        write_atomically(folder / f"curves-{name}.jsonl", (out_dir / "stats.jsonl").read_bytes())
    if grid.quality and experiment != "vision":
        classifier = str(config.runs_dir / f"classifier-{experiment}.pth.tar")
        files = ["--classifier", classifier, "--json", str(folder / f"quality-{name}.json")]
        call("benchmarks/quality.py", experiment, model, "--split", split, *files, *flags)
    how = ["--split", split, "--n-samples", str(config.n_samples or grid.n_samples)]
    how += ["--limit", str(grid.limit)] if grid.limit else []
    how += ["--per-example", str(result.with_suffix(".csv"))] if grid.compared else []
    call(f"{experiment}/loglike.py", model, *how, *precision, "--json", str(result), *flags)
    print(f"wrote {result}", flush=True)


def call(script: str, *words: str) -> None:
    """Run a script on one thread. Raises UserError if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], env=environment, check=False)
    if done.returncode:
        raise UserError(f"{script} {' '.join(words)} ended with status {done.returncode}")


if __name__ == "__main__":
    cli.run(main)
