"""The tables of benchmarks/weak_supervision.py: a row for each method, a column for each number of pairs."""

from collections.abc import Callable
from pathlib import Path

from markdown import NOTHING, over_seeds, read, table

METHODS = {
    "weak": "`--preset weak`",
    "no_hold": "`--preset weak`, β rising from the start",
    "half": "`--preset weak`, self-labels for the surest half",
    "no_labels": "`--preset weak`, without self-labels",
    "paper": "the paper's terms, one stage",
    "spread": "labels spread over the VAE's means, transductive",
    "m1": "M1: VAE, logistic regression on its means",
    "dropout": "supervised, with dropout",
    "favoured": "supervised, with dropout, stopped by all validation labels",
    "supervised": "supervised",
    "logistic": "logistic regression on pixels",
}
"""The methods as the tables name them, in the tables' order."""

AGAINST = ("favoured", "dropout", "m1")
"""Whom `weak` is compared with, seed by seed."""

Found = dict[str, dict[str, dict[int, dict[int, float]]]]
"""Shares of right labels by measure, method, number of pairs and seed."""


def found(root: Path, experiment: str) -> Found:
    """What the runs of an experiment measured."""
    result: Found = {}
    for path in sorted(root.glob(f"results/weak/{experiment}-*.json")):
        content = read(path)
        for name, measure in content["measures"].items():
            by_method = result.setdefault(name, {})
            by_method.setdefault(content["method"], {}).setdefault(content["n"], {})[content["seed"]] = measure["mean"]
    return result


def weak(experiment: str) -> Callable[[Path, Path], str]:
    """The table of one experiment; one for each measure, if there are several."""

    def whole(root: Path, document: Path) -> str:
        files = [read(path) for path in sorted(root.glob(f"results/weak/{experiment}-*.json"))]
        if not files:
            return NOTHING
        parts = []
        for measure, by_method in found(root, experiment).items():
            numbers = sorted({n for by_n in by_method.values() for n in by_n})
            rows = []
            for method, name in METHODS.items():
                if method in by_method:
                    cells = [_percent(list(by_method[method].get(n, {}).values())) for n in numbers]
                    rows.append([name, *cells])
            for method in AGAINST:
                if method in by_method and "weak" in by_method:
                    cells = []
                    for n in numbers:
                        ours, theirs = (by_method[one].get(n, {}) for one in ("weak", method))
                        cells.append(_percent([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], "+"))
                    rows.append([f"*the first less {METHODS[method]}*", *cells])
            title = [f"{measure}, %", *(f"{n:,} pairs" for n in numbers)]
            parts.append(table(title, rows))
        seeds = sorted({len(by_seed) for one in found(root, experiment).values() for by_n in one.values()
                        for by_seed in by_n.values()})  # fmt: skip
        commits = ", ".join(sorted({str(file["commit"])[:7] for file in files}))
        totals = {f"Pairs of {file['total']:,} examples; " for file in files if "total" in file}
        parts.append(
            f"*{''.join(totals)}{files[0]['n_examples']:,} test examples. Means over {_seeds(seeds)} of the pairs and "
            "the weights, ± the standard error over several; differences are paired. A share of the pairs validates, "
            f"except in rows that are stopped by all validation labels. Commit {commits}.*"
        )
        return "\n\n".join(parts)

    return whole


def _seeds(counts: list[int]) -> str:
    return f"{' or '.join(map(str, counts))} seed{'s' * (counts != [1])}"


def _percent(values: list[float], sign: str = "") -> str:
    return over_seeds([100 * value for value in values], f"{sign}.1f") if values else "–"
