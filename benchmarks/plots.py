"""Draw the plots in static/ from results/: python benchmarks/plots.py

    static/plot_curves.png     results/curves-EXPERIMENT-RECIPE-SEED.jsonl, copies of the runs' stats.jsonl
    static/plot_accuracy.png   results/EXPERIMENT-RECIPE-SEED.json, what loglike.py --json wrote
    static/plot_weak.png       results/weak/*.json, what benchmarks/weak_supervision.py wrote
    static/plot_speed.png      results/step-*.json, what benchmarks/step.py --json wrote

A plot without results isn't drawn.
"""

import argparse
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiment_tables import EXPERIMENTS, Average, measures, of_the_paper, runs
from PIL import Image
from speed_tables import step_files
from weak_tables import METHODS, found

from mvae.errors import UserError
from mvae.files import write_atomically
from mvae.scripts import running

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("plots.py: matplotlib is needed: pip install -e '.[plots]'") from None

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]
"""Okabe and Ito's, which people with any kind of colour blindness can tell apart."""
STYLES = ["-", "--", ":", "-."]
WIDTH, DPI = 8.8, 150  # inches, pixels an inch: at a README's width a letter is as large as the text's
SMALL_TEXT = 8.5

SHOWN_OF_WEAK = (
    "accuracy",
    "balanced accuracy of an attribute, said to be there where its probability exceeds its share",
)
"""The measure of each experiment that the plot of few pairs shows."""

LOSS, ELBO = "validation/loss", "validation/joint/elbo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of results/ and static/")
    args = parser.parse_args()
    pyplot.rcParams.update({
        "font.size": SMALL_TEXT, "axes.titlesize": SMALL_TEXT, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    })  # fmt: skip
    plots: dict[str, Callable[[Path], Figure | None]] = {
        "curves": curves,
        "accuracy": accuracy,
        "speed": speed,
        "weak": weak,
    }
    for name, draw in plots.items():
        figure = draw(args.root)
        if figure is None:
            print(f"no results to draw {name} from")
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
        small = io.BytesIO()
        Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        path = args.root / "static" / f"plot_{name}.png"
        write_atomically(path, small.getvalue())
        print(f"wrote {path.relative_to(args.root)}, {len(small.getvalue()) // 1024} KiB")


def curves(root: Path) -> Figure | None:
    """A row for each experiment: the joint ELBO of validation examples against epochs and minutes; and the metrics.

    A dotted line is the paper's log p of all modalities of a test example, to which an ELBO is a lower bound.
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
    figure, panels = pyplot.subplots(
        len(experiments), 3, figsize=(WIDTH, 1.9 * len(experiments) + 0.2), squeeze=False, layout="constrained"
    )
    for experiment, row in zip(experiments, panels, strict=True):
        some = found[experiment]
        recipes = list(dict.fromkeys(run.rpartition("-")[0] for run in some))
        paper = of_the_paper(experiment).get(f"log p(image, {EXPERIMENTS[experiment].second})")
        for run, records in some.items():  # the seeds of a recipe have one colour, and the first a label
            recipe = run.rpartition("-")[0]
            colour = COLOURS[recipes.index(recipe) % len(COLOURS)]
            label = recipe if run == next(other for other in some if other.startswith(f"{recipe}-")) else None
            epochs = [float(record["epoch"]) for record in records]
            minutes = [seconds / 60 for seconds in accumulate(record["seconds"] for record in records)]
            for panel, at in zip(row, (epochs, minutes), strict=False):
                _line(panel, records, at, ELBO, colour, "-", label)
            for style, name in zip(STYLES, metrics_of(records), strict=False):
                _line(row[2], records, epochs, name, colour, style, label)
        for panel in row[:2]:
            panel.set_title(f"{experiment}: joint ELBO, nats", loc="left")
            _leave_out_the_first(panel, list(some.values()), ELBO, *([paper] if paper is not None else []))
            if paper is not None:
                panel.axhline(paper, color="black", linestyle=":", linewidth=1.2, label="the paper's log p")
        metrics = list(dict.fromkeys(name for records in some.values() for name in metrics_of(records)))
        titles = [name.removeprefix("validation/").replace("_", " ") for name in metrics]
        if titles:
            row[2].set_title(f"{experiment}: {', '.join(titles)}", loc="left")
            row[2].set_ylim(top=1.0)
        else:
            row[2].set_visible(False)
        # Beside the metrics there is room; ELBOs of a long run pass everywhere.
        row[2 if titles else 0].legend(*row[0].get_legend_handles_labels(), frameon=False)
        for panel in (row[0], row[2]):
            panel.xaxis.get_major_locator().set_params(integer=True)
    for panel, unit in zip(panels[-1], ("epochs", "minutes of training", "epochs"), strict=True):
        panel.set_xlabel(unit)
    return figure


def metrics_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of a run's metrics, as stats.jsonl has them."""
    return [name for name in records[0] if name.startswith("validation/") and name.count("/") == 1 and name != LOSS]


def _line(
    panel: Any,
    records: Sequence[Mapping[str, Any]],
    at: Sequence[float],
    name: str,
    colour: str,
    style: str,
    label: str | None,
) -> None:
    points = [(x, record[name]) for x, record in zip(at, records, strict=True) if name in record]
    marker = "." if len(points) < 12 else None
    panel.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.4, marker=marker, label=label)


def _leave_out_the_first(panel: Any, some: Sequence[Sequence[Mapping[str, Any]]], name: str, *also: float) -> None:
    """Has the axis show what comes after a run's first tenth, in which the values change most; and other values."""
    values = [record[name] for records in some for record in records[(len(records) + 9) // 10 :] if name in record]
    if len(values) > 2:
        values += also
        margin = 0.05 * (max(values) - min(values)) or 1.0
        panel.set_ylim(min(values) - margin, max(values) + margin)


def accuracy(root: Path) -> Figure | None:
    """A bar for each experiment and recipe: how often the label (text, attribute) is read off a test image."""
    bars: list[tuple[str, str, str, Average]] = []
    for experiment, shown in EXPERIMENTS.items():
        for recipe, some in runs(root, experiment).items():
            measured = measures(some)
            for name in shown.read:
                if name in measured:
                    what = "balanced" if name.startswith("balanced") else _what(name)
                    bars.append((experiment, recipe, what, measured[name]))
    if not bars:
        return None
    recipes = list(dict.fromkeys(recipe for _, recipe, _, _ in bars))
    figure, panel = pyplot.subplots(figsize=(WIDTH, 0.36 * len(bars) + 0.8), layout="constrained")
    for y, (_, recipe, _, value) in enumerate(bars):
        colour = COLOURS[recipes.index(recipe) % len(COLOURS)]
        panel.barh(y, 100 * value.mean, 0.7, xerr=100 * value.error, color=colour, error_kw={"linewidth": 1})
        panel.text(100 * (value.mean + value.error) + 0.7, y, f"{100 * value.mean:.1f} %", va="center")
    labels = [f"{experiment} {recipe}: {what}" for experiment, recipe, what, _ in bars]
    panel.set_yticks(range(len(bars)), labels)
    panel.invert_yaxis()
    panel.set_xlim(0, 108)
    panel.set_xticks(range(0, 101, 20))
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("read off the image right, % of test examples (± standard error)")
    return figure


def _what(measure: str) -> str:
    return next(word for word in ("label", "text", "attribute") if word in measure)


def speed(root: Path) -> Figure | None:
    """Bars for each experiment: how many times as long as ours the plain steps take, one precision, not compiled."""
    steps = [
        step
        for file in step_files(root)
        for step in file["steps"]
        if not step["compiled"] and step["precision"] == "fp32" and step["threads"] == min(file["threads"])
    ]
    steps.sort(key=lambda step: (list(EXPERIMENTS).index(step["experiment"]), step["device"]))
    if not steps:
        return None
    figure, panel = pyplot.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    for i, (name, label) in enumerate(
        [
            ("plain / ours", "plain: each term encodes everything"),
            ("given only / ours", "plain: each term encodes what it is given"),
        ]
    ):
        places = [x + 0.4 * i - 0.2 for x in range(len(steps))]
        low, middle, high = zip(*(step[name] for step in steps), strict=True)
        spread = [
            [b - a for a, b in zip(low, middle, strict=True)],
            [b - a for a, b in zip(middle, high, strict=True)],
        ]
        panel.bar(places, middle, 0.38, yerr=spread, color=COLOURS[i], label=label, error_kw={"linewidth": 1})
        for x, y, top in zip(places, middle, high, strict=True):
            panel.text(x, top, f"{y:.1f}", ha="center", va="bottom")
    panel.axhline(1, color="black", linewidth=0.8)
    several = len({step["device"] for step in steps}) > 1
    labels = [step["experiment"] + (f"\n{step['device']}" if several else "") for step in steps]
    panel.set_xticks(range(len(steps)), labels)
    panel.grid(axis="x", visible=False)
    panel.set_ylabel("time of a plain step / ours")
    panel.set_xlim(-1, max(len(steps), 2))  # a single bar isn't drawn as a wall
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def weak(root: Path) -> Figure | None:
    """A panel for each experiment: right labels against the number of pairs, a line for each method."""
    panels = [(one, name, by) for one in EXPERIMENTS for name, by in found(root, one).items() if name in SHOWN_OF_WEAK]
    panels = [(one, name, by) for one, name, by in panels if len(by.get("weak", ())) > 1]
    if not panels:
        return None
    columns = min(len(panels), 2)
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(WIDTH, 3.4 * -(-len(panels) // columns) + 0.9), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    looks: dict[str, tuple[str, str]] = {}  # the same in all panels
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    for panel, (experiment, measure, by_method) in zip(axes.flat, panels, strict=False):
        for method in METHODS:
            if len(by_method.get(method, ())) < 2:
                continue
            if method not in looks:
                looks[method] = (COLOURS * 2)[len(looks)], STYLES[len(looks) // len(COLOURS)]
            color, linestyle = looks[method]
            shares = {n: [100 * value for value in by_seed.values()] for n, by_seed in by_method[method].items()}
            numbers = sorted(shares)
            means = [statistics.fmean(shares[n]) for n in numbers]
            errors = [statistics.stdev(shares[n]) / len(shares[n]) ** 0.5 if len(shares[n]) > 1 else 0 for n in numbers]
            panel.errorbar(
                numbers, means, errors, color=color, linestyle=linestyle, marker=".",
                linewidth=2.2 if method == "weak" else 1.2, capsize=2, label=METHODS[method].replace("`", ""),
            )  # fmt: skip
        panel.set_xscale("log")
        ticks = sorted({n for by_n in by_method.values() for n in by_n})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.minorticks_off()
        panel.set_title(f"{experiment}: {measure.partition(',')[0]}, %", loc="left")
        panel.set_xlabel("examples with a label")
    handles = {
        label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper center", ncols=2)
    return figure


if __name__ == "__main__":
    running.run(main)
