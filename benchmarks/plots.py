"""Draw the plots in static/ from results/: python benchmarks/plots.py

    static/plot_curves.png     results/curves-EXPERIMENT-RECIPE-SEED.jsonl, copies of the runs' stats.jsonl
    static/plot_weak.png       results/weak/*.json, which weak_supervision.py wrote

A plot without results isn't drawn.
"""

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mvae import cli
from mvae.errors import UserError
from mvae.files import write_atomically

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from common import ROOT
from rows import EXPERIMENTS, METHODS, PLOTTED, accuracies, of_the_paper, weak_files

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]
"""Okabe and Ito's, which people with any kind of colour blindness can tell apart."""
STYLES = ["-", "--", ":", "-."]
WIDTH, DPI = 8.8, 150  # inches, and pixels per inch: a letter is as large as a README's

SHOWN_OF_WEAK = (
    "accuracy",
    "balanced accuracy of an attribute, said to be there where its probability exceeds its share",
)
"""The measure of each experiment that the plot of few labels shows."""

LOSS, ELBO = "validation/loss", "validation/joint/elbo"


@dataclass(kw_only=True)
class Config:
    root: Path = ROOT  # folder of results/ and static/


def main() -> None:
    config = cli.parse(__doc__, Config)
    matplotlib.use("Agg")
    pyplot.rcParams.update({
        "font.size": 8.5, "axes.titlesize": 8.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    })  # fmt: skip
    for name, draw in {"curves": curves, "weak": weak}.items():
        figure = draw(config.root)
        if figure is None:
            print(f"no results to draw {name} from")
            continue
        buffer, small = io.BytesIO(), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
        Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        write_atomically(config.root / "static" / f"plot_{name}.png", small.getvalue())
        print(f"wrote static/plot_{name}.png, {len(small.getvalue()) // 1024} KiB")


def curves(root: Path) -> Figure | None:
    """A row for each experiment: the joint ELBO of validation examples by epoch and by minute, and the metrics.

    A dotted line is the paper's test log p of all modalities, of which an ELBO is a lower bound.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(root.glob("results/curves-*.jsonl")):
        experiment, _, run = path.stem.removeprefix("curves-").partition("-")
        try:
            found.setdefault(experiment, {})[run] = [json.loads(line) for line in path.read_text().splitlines()]
        except ValueError as error:
            raise UserError(f"can't read {path}: {error}") from None
    experiments = [name for name in EXPERIMENTS if name in found]
    if not experiments:
        return None
    size = (WIDTH, 1.9 * len(experiments) + 0.2)
    figure, panels = pyplot.subplots(len(experiments), 3, figsize=size, squeeze=False, layout="constrained")
    for experiment, row in zip(experiments, panels, strict=True):
        some = found[experiment]
        recipes = list(dict.fromkeys(run.rpartition("-")[0] for run in some))
        paper = of_the_paper(experiment).get(f"log p(image, {EXPERIMENTS[experiment].label})")
        for run, records in some.items():  # the seeds of a recipe have one colour, and the first a label
            recipe = run.rpartition("-")[0]
            colour = COLOURS[recipes.index(recipe) % len(COLOURS)]
            label = recipe if run == next(other for other in some if other.startswith(f"{recipe}-")) else None
            epochs = [float(record["epoch"]) for record in records]
            minutes = [seconds / 60 for seconds in accumulate(record["seconds"] for record in records)]
            for panel, at in zip(row, (epochs, minutes), strict=False):
                _line(panel, records, at, ELBO, color=colour, label=label)
            for style, name in zip(STYLES, metrics_of(records), strict=False):
                _line(row[2], records, epochs, name, color=colour, linestyle=style, label=label)
        for panel in row[:2]:
            panel.set_title(f"{experiment}: joint ELBO, nats", loc="left")
            _leave_out_the_first(panel, list(some.values()), ELBO, *([paper] if paper is not None else []))
            if paper is not None:
                panel.axhline(paper, color="black", linestyle=":", linewidth=1.2, label="the paper's log p")
        metrics = list(dict.fromkeys(name for records in some.values() for name in metrics_of(records)))
        titles = [name.removeprefix("validation/").replace("_", " ") for name in metrics]
        row[2].set_title(f"{experiment}: {', '.join(titles)}", loc="left")
        row[2].set_ylim(top=1.0)
        row[2].set_visible(bool(titles))
        row[2 if titles else 0].legend(*row[0].get_legend_handles_labels(), frameon=False)
        for panel in (row[0], row[2]):
            panel.xaxis.get_major_locator().set_params(integer=True)
    for panel, unit in zip(panels[-1], ("epochs", "training minutes", "epochs"), strict=True):
        panel.set_xlabel(unit)
    return figure


def metrics_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of a run's metrics, as stats.jsonl has them."""
    return [name for name in records[0] if name.startswith("validation/") and name.count("/") == 1 and name != LOSS]


def _line(panel: Any, records: Sequence[Mapping[str, Any]], at: Sequence[float], name: str, **look: Any) -> None:
    points = [(x, record[name]) for x, record in zip(at, records, strict=True) if name in record]
    panel.plot(*zip(*points, strict=True), linewidth=1.4, marker="." if len(points) < 12 else None, **look)


def _leave_out_the_first(panel: Any, some: Sequence[Sequence[Mapping[str, Any]]], name: str, *also: float) -> None:
    """Limit the axis to what comes after a run's first tenth, in which the values change most, and to other values."""
    values = [record[name] for records in some for record in records[(len(records) + 9) // 10 :] if name in record]
    if len(values) > 2:
        values += also
        margin = 0.05 * (max(values) - min(values)) or 1.0
        panel.set_ylim(min(values) - margin, max(values) + margin)


def weak(root: Path) -> Figure | None:
    """A panel for each experiment: label accuracy by the number of labelled examples, a line for each method."""
    found = {one: accuracies(weak_files(root, one)) for one in EXPERIMENTS}
    shown = [(one, name, by) for one, measures in found.items() for name, by in measures.items()]
    shown = [(one, name, by) for one, name, by in shown if name in SHOWN_OF_WEAK and len(by.get("weak", ())) > 1]
    if not shown:
        return None
    columns, rows = min(len(shown), 2), (len(shown) + 1) // 2
    size = (WIDTH, 3.4 * rows + 0.9)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = [method for method in PLOTTED if any(len(by.get(method, ())) > 1 for _, _, by in shown)]
    for panel in axes.flat[len(shown) :]:
        panel.remove()
    for panel, (experiment, measure, by_method) in zip(axes.flat, shown, strict=False):
        for i, method in enumerate(drawn):
            by_n = sorted((n, [100 * x for x in by_seed.values()]) for n, by_seed in by_method.get(method, {}).items())
            if len(by_n) < 2:
                continue
            means = [statistics.fmean(values) for _, values in by_n]
            errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0 for _, values in by_n]
            panel.errorbar(
                [n for n, _ in by_n], means, errors, color=COLOURS[i % len(COLOURS)], marker=".", capsize=2,
                linestyle=STYLES[i // len(COLOURS)], linewidth=2.2 if method == "weak" else 1.2,
                label=METHODS[method].replace("`", ""),
            )  # fmt: skip
        panel.set_xscale("log")
        ticks = sorted({n for by_n in by_method.values() for n in by_n})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.minorticks_off()
        panel.set_title(f"{experiment}: {measure.partition(',')[0]}, %", loc="left")
        panel.set_xlabel("labelled examples")
    labelled = [panel.get_legend_handles_labels() for panel in figure.axes]
    handles = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper center", ncols=2)
    return figure


if __name__ == "__main__":
    cli.run(main)
