"""Draw the plots in static/ from results/: python benchmarks/plots.py

    static/plot_curves.png     results/curves-mnist-RECIPE-SEED.jsonl, copies of the runs' stats.jsonl
    static/plot_weak.png       results/weak/*.json, which weak_supervision.py wrote

A plot without results isn't drawn.
"""

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, product
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
from markdown import by_recipe
from rows import EXPERIMENTS, SHOWN_OF_WEAK, accuracies, of_the_paper, weak_files

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]
"""Okabe and Ito's, which people with any kind of colour blindness can tell apart."""
WIDTH, DPI = 8.8, 150  # inches, and pixels per inch: a letter is as large as a README's

PLOTTED = {
    "weak": "MVAE, preset weak",
    "pca": "label propagation, no network",
    "graph_net": "classifier of propagated labels",
    "shifted": "classifier of the N labels, shifted images",
    "dropout": "classifier of the N labels",
}
"""The methods that the plot of few labels shows, as it names them."""

ELBO, ACCURACY = "validation/joint/elbo", "validation/label_accuracy"


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
    """The joint ELBO of mnist's validation examples by epoch and by minute, and the label accuracy by epoch.

    A dotted line is the paper's test log p(image, label), of which an ELBO is a lower bound.
    """
    files = by_recipe(root / "results", "curves-mnist", ".jsonl")
    found = {recipe: [_records(path) for path in paths.values()] for recipe, paths in files.items()}
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained")
    looks = cycle(product(("-", "--"), COLOURS))
    for (style, colour), (recipe, seeds) in zip(looks, found.items(), strict=False):
        for i, records in enumerate(seeds):
            look = {"color": colour, "linestyle": style, "label": recipe if i == 0 else None}
            epochs = [float(record["epoch"]) for record in records]
            minutes = [seconds / 60 for seconds in accumulate(record["seconds"] for record in records)]
            for panel, at, name in zip(panels, (epochs, minutes, epochs), (ELBO, ELBO, ACCURACY), strict=True):
                _line(panel, records, at, name, **look)
    paper = of_the_paper("mnist")["log p(image, text)"]
    every = [records for seeds in found.values() for records in seeds]
    for panel in panels[:2]:
        _leave_out_the_first(panel, every, ELBO, paper)
        panel.axhline(paper, color="black", linestyle=":", linewidth=1.2, label="log p, the paper")
        panel.set_ylabel("joint ELBO, nats")
    panels[2].set_ylabel("label accuracy")
    panels[2].set_ylim(top=1.0)
    for panel, unit in zip(panels, ("epoch", "training minutes, one CPU thread", "epoch"), strict=True):
        panel.set_xlabel(unit)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    return figure


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"can't read {path}: {error}") from None


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
                [n for n, _ in by_n], means, errors, color=COLOURS[i], marker=".", capsize=2,
                linewidth=2.2 if method == "weak" else 1.2, label=PLOTTED[method],
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
