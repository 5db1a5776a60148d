"""Train recipes of an experiment with several seeds and estimate their test log-likelihoods, run by run.

    python benchmarks/recipes.py mnist ablation --seeds 0 1 2
    python benchmarks/recipes.py celeba fast --seeds 0 --flags=--allow-missing

A run that was cut short goes on where it stood, and one whose results are there is not run again. Each leaves
results/GRID/EXPERIMENT-RECIPE-SEED.json, with each example's log p, so that any two runs are compared example by
example: `python benchmarks/tables.py` makes the tables of them. The runs of `fast` and `longer` are those of the
experiments' own tables: they leave results/EXPERIMENT-RECIPE-SEED.json, and beside it their curves and coherence.
`reconstruct` is compared by coherence, too.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mvae.checkpoint import BEST
from mvae.errors import UserError
from mvae.files import write_atomically
from mvae.scripts import running, types

ROOT = Path(__file__).resolve().parents[1]


class Grid(NamedTuple):
    """Recipes that are compared with each other. The first is the base.

    train: flags that all have. recipes: further flags of each, by name. n_samples, limit: the importance samples, and
    how many test examples (None: all). compared: whether in pairs, example by example; else they stand in the
    experiments' own tables. coherence: whether that is measured.
    """

    train: Sequence[str]
    recipes: dict[str, Sequence[str]]
    n_samples: int
    limit: int | None = None
    compared: bool = True
    coherence: bool = False


EXPERIMENTS: dict[str, tuple[str, list[str]]] = {
    "mnist": ("mnist", []),
    "binarymnist": ("mnist", ["--binarize"]),
    **{name: (name, []) for name in ("fashionmnist", "multimnist", "celeba", "celeba19", "vision")},
}
"""Each experiment's folder, and flags that its training has beside a recipe's."""

BASE = ["--preset", "fast", "--lambda-text", "50", "--beta-hold", "0", "--weight-decay", "0", "--iw-samples", "1"]
COMBINED = ["--beta-hold", "1", "--weight-decay", "0.05", "--lambda-text", "25", "--iw-samples", "2"]
GRIDS = {
    "ablation": Grid(
        [*BASE, "--epochs", "10", "--annealing-epochs", "4"],
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
            "combined": COMBINED,
        },
        200,
        limit=500,
    ),
    "precision": Grid(
        [*BASE, "--epochs", "5", "--annealing-epochs", "2"],
        {"fp32": [], "bf16": ["--precision", "bf16"]},
        200,
        limit=1000,
    ),
    "reconstruct": Grid(
        [*BASE, "--epochs", "10", "--annealing-epochs", "4"],
        {"text": [], "given": ["--reconstruct", "given"], "all": ["--reconstruct", "all"]},
        200,
        limit=500,
        coherence=True,
    ),
    "fast": Grid(["--preset", "fast"], {"fast": []}, 1000, compared=False, coherence=True),
    "longer": Grid(
        ["--preset", "fast", "--beta-hold", "2", "--weight-decay", "0.1", "--iw-samples", "5"],
        {"fast-50": ["--epochs", "50", "--annealing-epochs", "18"]},
        1000,
        compared=False,
        coherence=True,
    ),
}
"""The grids by name. A grid's first recipe is the base that its table compares the others with."""

COHERENT = ("mnist", "fashionmnist", "multimnist", "celeba", "celeba19")
"""The folders of experiments whose pictures a classifier reads: benchmarks/coherence.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--recipes", nargs="+", help="these recipes of the grid only")
    parser.add_argument("--seeds", nargs="+", type=types.seed_number, default=[0, 1, 2])
    parser.add_argument("--jobs", type=types.positive_int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of the runs' own folders")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of training and estimates")
    parser.add_argument("--n-samples", type=types.two_or_more, help="importance samples, in place of the grid's")
    parser.add_argument(
        "--flags",
        type=shlex.split,
        default=[],
        metavar="WORDS",
        help="for all scripts, such as --flags=--allow-missing",
    )
    args = parser.parse_args()
    grid = GRIDS[args.grid]
    unknown = sorted(set(args.recipes or []) - set(grid.recipes))
    if unknown:
        parser.error(f"{args.grid} has no recipe {', '.join(unknown)}; there are {', '.join(grid.recipes)}")
    todo = [(name, seed) for seed in args.seeds for name in args.recipes or grid.recipes]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, args, name, seed) for name, seed in todo]
        for job in jobs:
            job.result()


def run(args: argparse.Namespace, recipe: str, seed: int) -> None:
    """Trains and evaluates one recipe with one seed, unless that was done."""
    grid, (experiment, own) = GRIDS[args.grid], EXPERIMENTS[args.experiment]
    name = f"{args.experiment}-{recipe}-{seed}"
    folder = Path("results") / args.grid if grid.compared else Path("results")
    result = folder / f"{name}.json"
    if result.exists():
        print(f"{result} is there: {name} is not run again", flush=True)
        return
    out_dir = args.runs_dir / args.grid / name
    precision = ["--precision", args.precision] if args.precision != "fp32" else []
    train = [*grid.train, *grid.recipes[recipe], *own, *precision, "--seed", str(seed), "--out-dir", str(out_dir)]
    call(f"{experiment}/train.py", *train, "--resume", *args.flags, "--log-interval", "1000")
    model = str(out_dir / BEST)
    if not grid.compared:
        write_atomically(folder / f"curves-{name}.jsonl", (out_dir / "stats.jsonl").read_bytes())
    if grid.coherence and experiment in COHERENT:
        kept = ["--classifier", str(args.runs_dir / f"classifier-{experiment}.pth.tar")]
        files = ["--json", str(folder / f"coherence-{name}.json")]
        call("benchmarks/coherence.py", experiment, "--model", model, *kept, *files, *args.flags)
    files = ["--json", str(result)]
    files += ["--per-example", str(result.with_suffix(".csv"))] if grid.compared else []
    how = ["--n-samples", str(args.n_samples or grid.n_samples)]
    how += ["--limit", str(grid.limit)] if grid.limit else []
    call(f"{experiment}/loglike.py", model, *how, *precision, *files, *args.flags)
    print(f"wrote {result}", flush=True)


def call(script: str, *words: str) -> None:
    """Runs a script on one thread. Raises UserError if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], env=environment, check=False)
    if done.returncode:
        raise UserError(f"{script} {' '.join(words)} ended with status {done.returncode}")


if __name__ == "__main__":
    running.run(main)
