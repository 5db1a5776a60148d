"""The tables of paired differences: recipes against a base by example, batch norm's statistics by seed."""

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from markdown import NOTHING, agreed, over_seeds, read, table
from recipes import GRIDS

from mvae.errors import UserError

QUANTITIES = ("log p(image), q(z | image)", "log p(image, text), q(z | image)")
"""What is compared: columns of what loglike.py --per-example wrote."""

COHERENCE = "coherence, label to image"
"""What is compared, too, where coherence.py measured it: in per cent."""

PerExample = Mapping[str, list[float]]
"""Values of the test examples by column."""


def per_example(path: Path) -> PerExample:
    """A CSV file of loglike.py. Raises UserError, naming it, if it is none."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in QUANTITIES}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't read {path}: {error!r}") from None


def paired(grid: str) -> Callable[[Path, Path], str]:
    """The table of a grid on MNIST."""

    def whole(root: Path, document: Path) -> str:
        folder = root / "results" / grid
        runs: dict[str, dict[int, PerExample]] = {}
        coherence: dict[str, dict[int, PerExample]] = {}
        files: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("mnist-*.csv")):
            recipe, _, seed = path.stem.removeprefix("mnist-").rpartition("-")
            runs.setdefault(recipe, {})[int(seed)] = per_example(path)
            files.setdefault(recipe, []).append(read(path.with_suffix(".json")))
            if (measured := folder / f"coherence-{path.stem}.json").exists():
                value = 100 * read(measured)["measures"][COHERENCE]["mean"]
                coherence.setdefault(recipe, {})[int(seed)] = {COHERENCE: [value]}
        base = next(iter(GRIDS[grid].recipes))
        if base not in runs:
            return NOTHING
        n_examples, n_samples = (
            agreed(chain.from_iterable(files.values()), name, f"the runs of {grid}")
            for name in ("n_examples", "n_samples")
        )
        compared = [(name, name.partition(", q")[0], runs) for name in QUANTITIES]
        compared += [(COHERENCE, f"{COHERENCE}, %", coherence)] if base in coherence else []
        rows = []
        for recipe, by_seed in sorted(runs.items(), key=lambda run: -_mean(run[1], QUANTITIES[0])):
            cells = [f"`{recipe}`", str(len(by_seed)), _minutes(files[recipe])]
            for name, _, values in compared:
                known = values.get(recipe, {})
                cells.append(f"{_mean(known, name):.2f}" if known else "–")
                cells.append("" if recipe == base else _difference(known, values[base], name))
            rows.append(cells)
        columns = ["recipe", "seeds", "minutes"]
        for _, heading, _ in compared:
            columns += [heading, f"less `{base}`"]
        about = (
            f"*{n_examples:,} test examples with {n_samples:,} importance samples each, the "
            "same in every run, under q(z | image). Differences are paired by seed and example: mean ± standard error "
            "over the examples, and in brackets that over the seeds. Fewer examples than all compare runs "
            "with each other, and no run with the paper.*"
        )
        return f"{table(columns, rows)}\n\n{about}"

    return whole


def _mean(by_seed: Mapping[int, PerExample], name: str) -> float:
    return statistics.fmean(statistics.fmean(found[name]) for found in by_seed.values())


def _difference(ours: Mapping[int, PerExample], base: Mapping[int, PerExample], name: str) -> str:
    """The mean difference over the seeds that both have."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return "–"
    by_seed = [[a - b for a, b in zip(ours[seed][name], base[seed][name], strict=True)] for seed in seeds]
    of_example = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    error = f" ± {statistics.stdev(of_example) / len(of_example) ** 0.5:.2f}" if len(of_example) > 1 else ""
    means = [statistics.fmean(values) for values in by_seed]
    spread = f" ({statistics.stdev(means) / len(means) ** 0.5:.2f})" if len(means) > 1 else ""
    return f"{statistics.fmean(of_example):+.2f}{error}{spread}"


def _minutes(files: Iterable[Mapping[str, Any]]) -> str:
    """The mean time of training up to the best epoch."""
    return f"{statistics.fmean(file['training']['training_seconds'] for file in files) / 60:.1f}"


def batch_norm(root: Path, document: Path) -> str:
    """A row for each experiment and objective: batch norm's joint statistics against those of each term."""
    files = [read(path) for path in sorted(root.glob("results/batch_norm/*.json"))]
    groups: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
    for file in files:
        by_seed = groups.setdefault((file["experiment"], file["reconstruct"]), {})
        by_seed.setdefault(file["seed"], {})[file["statistics"]] = file["validation_loss"]
    rows, n_seeds = [], set()
    for (experiment, reconstruct), by_seed in groups.items():
        pairs = [found for found in by_seed.values() if {"joint", "term"} <= found.keys()]
        if not pairs:
            continue
        n_seeds.add(len(pairs))
        losses = {kind: [pair[kind]["evaluation"] for pair in pairs] for kind in ("joint", "term")}
        gaps = {kind: [pair[kind]["evaluation"] - pair[kind]["training"] for pair in pairs] for kind in losses}
        differences = [joint - term for joint, term in zip(*losses.values(), strict=True)]
        values = [losses["joint"], losses["term"], differences, gaps["joint"], gaps["term"]]
        rows.append([experiment, f"`{reconstruct}`", *map(over_seeds, values)])
    if not rows:
        return NOTHING
    columns = [
        "",
        "`--reconstruct`",
        "loss, joint",
        "loss, per term",
        "joint - per term",
        "gap, joint",
        "gap, per term",
    ]
    sizes = {
        f"{file['experiment']} {file['n_train']:,} and {file['n_validation']:,} for {file['epochs']} epochs"
        for file in files
    }
    several = max(n_seeds) > 1
    seeds = f"{' or '.join(map(str, sorted(n_seeds)))} seed{'s, ± standard error over them' if several else ''}"
    commits = ", ".join(sorted({str(file["commit"])[:7] for file in files}))
    about = (
        "*Validation loss (the negative objective at β = 1, λ included) in nats per example, as evaluation computes "
        f"it: mean over {seeds}; the difference is paired. Rows have different losses. Gap: this loss less that with "
        f"the statistics of each batch. Training and validation examples: {'; '.join(sorted(sizes))}. Commit "
        f"{commits}.*"
    )
    return f"{table(columns, rows)}\n\n{about}"
