"""The rows of every table: functions from the root of results/ to Markdown."""

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mvae.run.evaluate import decided_by_few

from common import spread
from markdown import NOTHING, agreed, by_recipe, commits, either, fold, machine, over_seeds, page, read, read_csv, table
from recipes import GRIDS

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text())

# Experiments: tables of all, and two for each, from what loglike.py wrote.


class Experiment(NamedTuple):
    """What the tables show of an experiment.

    what: the modalities, for a newcomer.
    label: the modality other than the image, as the tables name it; all others together if there are several.
    accuracies: the measures of how well the label is predicted from the image.
    """

    what: str
    label: str
    accuracies: tuple[str, ...] = ()

    @property
    def quantities(self) -> tuple[str, str, str]:
        """What the short tables show."""
        return "log p(image)", f"log p(image, {self.label})", f"log p({self.label} | image)"


CLASS = ("accuracy of the label predicted from the image",)
STRING = ("accuracy of the text predicted from the image, whole strings",)
ATTRIBUTE = ("accuracy of an attribute predicted from the image", "balanced accuracy of an attribute")
EXPERIMENTS = {
    "mnist": Experiment("a digit, its label", "text", CLASS),
    "binarymnist": Experiment("the same with binary pixels", "text", CLASS),
    "fashionmnist": Experiment("a piece of clothing, its class", "text", CLASS),
    "multimnist": Experiment("up to four digits, their string", "text", STRING),
    "celeba": Experiment("a face, 18 attributes as one vector", "attrs", ATTRIBUTE),
    "celeba19": Experiment("a face, 18 separate attributes", "attrs", ATTRIBUTE),
    "vision": Experiment("a face: in colour, grey, edges, mask, half, watermarked", "the five others"),
}
LISTED = {"Bald, .*Wearing_Hat": "attrs", "gray, .*watermark": "the five others"}  # loglike.py's lists of modalities
IMAGE = "q(z | image)"


Run = dict[str, Any]
"""What loglike.py wrote of one model."""


def settings(run: Run) -> dict[str, Any]:
    """Return the flags of its training."""
    return run["training"]["settings"]


class Average(NamedTuple):
    """A mean over seeds; the standard error over the test examples, which all seeds share; the seeds' deviation.

    variance: of an estimate's log weights.
    star: "*" for an estimate that a few importance samples decide.
    """

    mean: float
    error: float
    seeds: float | None
    variance: float = 0
    star: str = ""

    @classmethod
    def of(cls, found: Sequence[Mapping[str, float]]) -> "Average":
        means = [one["mean"] for one in found]
        deviation = statistics.stdev(means) if len(means) > 1 else None
        return cls(statistics.fmean(means), statistics.fmean(one["standard_error"] for one in found), deviation)

    def nats(self) -> str:
        digits = ".2f" if self.error < 1 else ".1f"
        seeds = "" if self.seeds is None else f" (seeds {self.seeds:{digits}})"
        return f"{self.mean:{digits}} ± {self.error:{digits}}{seeds}{self.star}"

    def percent(self) -> str:
        seeds = "" if self.seeds is None else f" (seeds {100 * self.seeds:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}{seeds} %"


def runs(root: Path, experiment: str) -> dict[str, list[Run]]:
    """Return the runs of an experiment by recipe, each in the order of its seeds."""
    found = {
        recipe: [read(path) for path in paths.values()]
        for recipe, paths in by_recipe(root / "results", experiment).items()
    }
    for recipe, some in found.items():
        for name in ("n_examples", "n_samples"):
            agreed(some, name, f"the seeds of {experiment}-{recipe}")
    return found


def estimates(some: Sequence[Run]) -> dict[tuple[str, str], Average]:
    """Return the averages over runs of one recipe, by quantity and proposal as the tables name them."""
    rows = defaultdict[tuple[str, str], list[Mapping[str, float]]](list)
    for run in some:
        for row in run["log_likelihood"]:
            quantity, proposal = row["quantity"], row["proposal"]
            for listed, name in LISTED.items():
                quantity, proposal = re.sub(listed, name, quantity), re.sub(listed, name, proposal)
            rows[quantity, proposal].append(row)
    found = {}
    for key, lines in rows.items():
        variance = statistics.fmean(line["log_weight_variance"] for line in lines)
        star = "*" * decided_by_few({"proposal": key[1], "log_weight_variance": variance}, some[0]["n_samples"])
        found[key] = Average.of(lines)._replace(variance=variance, star=star)
    return found


def measures(some: Sequence[Run]) -> dict[str, Average]:
    """Return the averages of the measures that all runs of one recipe have."""
    names = [name for name in some[0]["measures"] if all(name in run["measures"] for run in some)] if some else []
    return {name: Average.of([run["measures"][name] for run in some]) for name in names}


def notes(averages: Iterable[Average]) -> str:
    """Return the sentences of a caption that explain brackets and stars, if there are any."""
    shown = list(averages)
    about = " In brackets: standard deviation over seeds." if any(one.seeds is not None for one in shown) else ""
    if any(one.star for one in shown):
        about += (
            " \\*: a few samples dominate the estimate, which is then too low on average (the variance of the log "
            "weights is above 2 ln(samples))."
        )
    return about


def of_the_paper(experiment: str) -> dict[str, float]:
    """Return the paper's numbers by quantity, with q(z | image) as proposal."""
    found = dict(PAPER["log_likelihood"].get(experiment, {}))
    if found:
        image, both, label = EXPERIMENTS[experiment].quantities
        found[label] = found[both] - found[image]
    return found


def epochs_of(some: Iterable[Run]) -> str:
    """Return the epoch of the best model / the number of epochs of the run."""
    both = [(run["training"]["epoch"], settings(run)["epochs"]) for run in some]
    return ", ".join(dict.fromkeys(f"{best} / {every}" for best, every in both))


def minutes_of(some: Iterable[Run]) -> str:
    """Return the mean time of training to the best epoch."""
    minutes = statistics.fmean(run["training"]["training_seconds"] for run in some) / 60
    return f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"


def fast(root: Path, experiment: str) -> list[Run]:
    """Return the runs of the recipe that the first page and the experiments' pages show."""
    return runs(root, experiment).get("fast", [])


def experiments(root: Path) -> str:
    """A row for each experiment: its data, and how long the recommended recipe takes."""
    rows, shown = [], []
    for experiment, about in EXPERIMENTS.items():
        shown += (some := fast(root, experiment))
        link = f"[{experiment}]({experiment.removeprefix('binary')}/README.md)"
        rows.append([link, about.what, minutes_of(some) if some else "–"])
    devices = either(
        "a GPU" if settings(run)["cuda"] else f"{(n := settings(run)['threads'])} CPU thread{'s' * (n > 1)}"
        for run in shown
    )
    caption = f"Training minutes on {devices}; the models of faces trained on a tenth of CelebA."
    return page(["experiment", "data", "minutes of `fast`"], rows if shown else [], caption)


def compared(root: Path) -> str:
    """A row for each experiment that the paper has: log-likelihoods of the recommended recipe and the paper's."""
    rows, shown = [], []
    for experiment, about in EXPERIMENTS.items():
        paper, some = of_the_paper(experiment), fast(root, experiment)
        if not paper:
            continue
        found, measured, row = estimates(some), measures(some), [experiment]
        for name in about.quantities[:2]:
            digits, ours = ".1f" if abs(paper[name]) > 1000 else ".2f", "–"
            if one := found.get((name, IMAGE)):
                shown.append(one._replace(seeds=None))
                ours = f"{one.mean:{digits}}{one.star}"
            row.append(f"{ours} / {paper[name]:{digits}}")
        accuracy = measured.get(about.accuracies[0])
        rows.append([*row, f"{100 * accuracy.mean:.1f} %" if accuracy else "–"])
    columns = ["experiment", "log p(image), ours / paper", "log p(image, label), ours / paper", "label accuracy"]
    caption = "Nats per test example, by importance sampling from q(z | image): preset `fast`, and the paper's Table 2."
    return page(columns, rows, caption + notes(shown))


def short(experiment: str, root: Path) -> str:
    """The table of an experiment's own page: the recommended recipe and the paper."""
    some, paper, about = fast(root, experiment), of_the_paper(experiment), EXPERIMENTS[experiment]
    if not some:
        return NOTHING
    found, measured = estimates(some), measures(some)
    shown = {name: found[name, IMAGE]._replace(seeds=None) for name in about.quantities if (name, IMAGE) in found}
    rows = [[name, one.nats(), f"{paper[name]:.2f}" if name in paper else ""] for name, one in shown.items()]
    rows += [[name, measured[name]._replace(seeds=None).percent(), ""] for name in about.accuracies if name in measured]
    rows.append(["epochs", str(settings(some[0])["epochs"]), str(PAPER["epochs"][experiment])])
    rows.append(["training minutes", minutes_of(some), ""])
    seeds = f", over {len(some)} seeds" if len(some) > 1 else ""
    caption = (
        f"Log p in nats: mean ± standard error over {some[0]['n_examples']:,} test examples{seeds}, by "
        f"{some[0]['n_samples']:,} importance samples from q(z | image).{notes(shown.values())}"
    )
    width = 3 if paper else 2
    return page(["", "`fast`", "the paper"][:width], [row[:width] for row in rows], caption)


def of_experiment(experiment: str, root: Path) -> str:
    """The table of one experiment: everything that was estimated and measured, a column for each recipe."""
    recipes, paper = runs(root, experiment), of_the_paper(experiment)
    if not recipes:
        return NOTHING
    found = [estimates(some) for some in recipes.values()]
    measured = [measures(some) for some in recipes.values()]
    rows: list[list[str]] = []
    by_attribute: dict[str, dict[str, list[str]]] = {}
    for key in dict.fromkeys(key for one in found for key in one):
        cells = [one[key].nats() if key in one else "–" for one in found]
        papers = f"*{paper[key[0]]:.2f}*" if key[0] in paper and key[1] == IMAGE else ""
        rows.append([*key, *cells, papers])
    for name in dict.fromkeys(name for one in measured for name in one):
        cells = [one[name].percent() if name in one else "–" for one in measured]
        if of_one := re.fullmatch(r"([a-z ]+) of ([A-Z]\w*)", name):
            by_attribute.setdefault(of_one[2], {})[of_one[1]] = cells
        else:
            rows.append([name, "", *cells, ""])
    rows.append(["epoch (best / run)", "", *map(epochs_of, recipes.values()), f"*{PAPER['epochs'][experiment]}*"])
    rows.append(["training minutes", "", *map(minutes_of, recipes.values()), ""])
    flags = [settings(some[0]) for some in recipes.values()]
    rows.append(["precision", "", *(some["precision"] for some in flags), ""])
    as_the_papers = [some["reconstruct"] in ("given", ["given"]) and some["iw_samples"] == 1 for some in flags]
    rows.append(["the paper's terms", "", *("yes" if same else "no" for same in as_the_papers), "*yes*"])
    rows.append(["seeds", "", *(str(len(some)) for some in recipes.values()), ""])
    columns = ["", "proposal distribution", *(f"`{recipe}`" for recipe in recipes), "the paper"]
    if not paper:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    caption = "Log p in nats per test example; mean ± standard error over the examples."
    parts = [page(columns, rows, caption + notes(average for one in found for average in one.values()))]
    if by_attribute:
        kinds = dict.fromkeys(kind for by_kind in by_attribute.values() for kind in by_kind)
        columns = ["attribute", *(f"{kind}, `{recipe}`" for kind in kinds for recipe in recipes)]
        none = ["–"] * len(recipes)
        rows = [[name, *(x for kind in kinds for x in cells.get(kind, none))] for name, cells in by_attribute.items()]
        parts.append(fold("Each attribute", table(columns, rows)))
    return "\n\n".join([*parts, *(_origin(recipe, some) for recipe, some in recipes.items())])


def _origin(recipe: str, some: Sequence[Run]) -> str:
    """Return how many examples and samples there were, the commits and the commands, folded."""
    first = some[0]
    about = [f"{first['n_examples']:,} test examples with {first['n_samples']:,} importance samples each"]
    about.append(f"seed{'s' * (len(some) > 1)} {', '.join(str(settings(run)['seed']) for run in some)}")
    about.append(commits([source for run in some for source in (settings(run), run)]))
    lines = [source.get("command") for run in some for source in (settings(run), run)]
    listed = "\n".join(dict.fromkeys(filter(None, lines)))
    text = f"*{'; '.join(about)}. Run each command at its commit.*\n\n```\n{listed}\n```"
    return fold(f"How <code>{recipe}</code> was made", text)


def quality(root: Path) -> str:
    """A row for each kind of draw that quality.py measured, for each experiment and recipe."""
    rows, every = [], []
    for experiment in EXPERIMENTS:
        for recipe, paths in by_recipe(root / "results", f"quality-{experiment}").items():
            every += (some := [read(path) for path in paths.values()])
            epochs = either(one["training"]["epoch"] for one in some)
            first = f"{experiment}-{recipe}<br>best epoch {epochs}, {len(some)} seed{'s' * (len(some) > 1)}"
            for name in some[0]["drawn"]:
                rows.append([first, name, *_drawn(some, name)])
                first = ""
    caption = (
        "Agreement: how often a classifier reads from a picture its label, mean ± standard error over the draws, or "
        "over strings and attributes given. Distance to real images and variance within a label: of the classifier's "
        "features, mean ± standard error over seeds. Real images are compared with as many training images. In "
        "brackets: standard deviation over seeds."
    )
    if n_samples := {one["n_samples"] for one in every if one.get("log_p")}:
        caption += f" log p: by {either(n_samples)} importance samples from q(z | image) under the prior of the row."
    headings = ["", "drawn from", "agreement", "Fréchet distance", "variance within a label", "log p(image), nats"]
    made_by = [source for one in every for source in (one["training"], one) if "command" in source]
    return page(headings, rows, caption, made_by)


def _drawn(some: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the cells of one kind of draw, over the seeds of a recipe."""
    found = [one["drawn"][name] for one in some]
    agreement = Average.of(found).percent()
    if balanced := [one["balanced"] for one in found if "balanced" in one]:
        agreement += f"<br>balanced {Average.of(balanced).percent()}"
    distance, variance = (over_seeds([one[key] for one in found], ".1f") for key in ("frechet", "variance"))
    log_p = [one["log_p"] for one in some if name in one.get("log_p", {})]
    nats = Average.of([one[name] for one in log_p]).nats() if log_p else ""
    if log_p and name == "fitted prior":
        nats += f"<br>gain {Average.of([one['gain'] for one in log_p]).nats()}"
    return [agreement, distance, variance, nats]


# Recipes compared with a base, by seed and example.

QUANTITIES = ("log p(image), q(z | image)", "log p(image, text), q(z | image)")  # columns of loglike.py --per-example
AGREEMENT = "agreement with a given label, %"  # where quality.py measured it
BySeed = dict[int, list[float]]  # values of the examples


def paired(grid: str, root: Path) -> str:
    """The table of a grid on MNIST."""
    folder = root / "results" / grid
    values = defaultdict[str, defaultdict[str, BySeed]](lambda: defaultdict(dict))  # by recipe and column
    files: dict[str, list[dict[str, Any]]] = {}
    for recipe, paths in by_recipe(folder, "mnist", ".csv").items():
        files[recipe] = [read(path.with_suffix(".json")) for path in paths.values()]
        for seed, path in paths.items():
            for name, column in read_csv(path, QUANTITIES).items():
                values[recipe][name][seed] = column
            if (measured := folder / f"quality-{path.stem}.json").exists():
                values[recipe][AGREEMENT][seed] = [100 * read(measured)["drawn"]["q(z | label)"]["mean"]]
    base = next(iter(GRIDS[grid].recipes))
    if base not in files:
        return NOTHING
    every = [file for some in files.values() for file in some]
    same = ("n_examples", "n_samples", "split")
    n_examples, n_samples, split = (agreed(every, name, f"the runs of {grid}") for name in same)
    rows = []
    for recipe, ours in sorted(values.items(), key=lambda pair: -_mean(pair[1][QUANTITIES[0]])):
        cells = [f"`{recipe}`", str(len(files[recipe])), minutes_of(map(Run, files[recipe]))]
        for name, theirs in values[base].items():
            cells.append(f"{_mean(ours[name]):.2f}" if ours[name] else "–")
            cells.append("" if recipe == base else _difference(ours[name], theirs))
        rows.append(cells)
    headings = [heading for name in values[base] for heading in (name.removesuffix(f", {IMAGE}"), f"Δ vs `{base}`")]
    caption = (
        f"{n_examples:,} {split} examples with {n_samples:,} importance samples each from q(z | image), the same in "
        "every run. Δ is paired by seed and example: mean ± standard error over the examples, in brackets that "
        "over the seeds. With so few examples, compare only these runs with each other."
    )
    return page(["recipe", "seeds", "training minutes", *headings], rows, caption)


def _mean(by_seed: BySeed) -> float:
    return statistics.fmean(statistics.fmean(values) for values in by_seed.values())


def _difference(ours: BySeed, base: BySeed) -> str:
    """Return the mean difference over the seeds that both have."""
    by_seed = [[a - b for a, b in zip(ours[seed], base[seed], strict=True)] for seed in ours if seed in base]
    if not by_seed:
        return "–"
    mean = over_seeds([statistics.fmean(values) for values in zip(*by_seed, strict=True)], "+.2f")
    means = [statistics.fmean(values) for values in by_seed]
    return mean + (f" ({statistics.stdev(means) / len(means) ** 0.5:.2f})" if len(means) > 1 else "")


# Weak supervision: a row for each method, a column for each number of labels.

METHODS = {  # in the tables' order
    "weak": "`--preset weak`",
    "both": "`--preset weak --unpaired both`: half of the others without their image",
    "paper": "the paper's terms, one stage",
    "pca": "label propagation on 50 principal components, transductive",
    "pixels": "label propagation on pixels, transductive",
    "spread": "label propagation on the VAE's means, transductive",
    "graph_net": "network on propagated labels, three rounds, with dropout and shifts",
    "m1": "M1: VAE, logistic regression on its means",
    "autoencoder": "the same with β = 0: an autoencoder",
    "shifted": "supervised on all N labels, with dropout and shifts",
    "favoured": "supervised, with dropout, stopped early on all validation labels",
    "dropout": "supervised, with dropout",
    "logistic": "logistic regression on pixels",
}
AGAINST = ("pca", "graph_net", "shifted", "dropout")  # what `weak` is compared with, seed by seed
WITHOUT = {
    "no_rounds": "one round of nine epochs",
    "no_shift": "no shifts",
    "no_labels": "no self-labels, a third of each batch from the pairs",
}
"""`--preset weak` with one change each, at 100 labels of mnist."""

SHOWN_OF_WEAK = (
    "accuracy",
    "balanced accuracy of an attribute, said to be there where its probability exceeds its share",
)
"""The measure of each experiment that its table and plot show."""


def weak_files(root: Path, experiment: str) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(root.glob(f"results/weak/{experiment}-*.json"))]


def accuracies(files: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, dict[int, float]]]]:
    """Return accuracies by measure, method, number of labels and seed."""
    found: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for file in files:
        for name, measure in file["measures"].items():
            by_n = found.setdefault(name, {}).setdefault(file["method"], {})
            by_n.setdefault(file["n"], {})[file["seed"]] = measure["mean"]
    return found


def weak(experiment: str, root: Path) -> str:
    """The table of one experiment: a row for each method, and the paired differences of some."""
    files = [file for file in weak_files(root, experiment) if file["method"] in METHODS]
    found = {name: by_method for name, by_method in accuracies(files).items() if name in SHOWN_OF_WEAK}
    if not found:
        return NOTHING
    ((measure, by_method),) = found.items()
    numbers = sorted({n for by_n in by_method.values() for n in by_n})
    rows = []
    for method in (method for method in METHODS if method in by_method):
        cells = [[100 * x for x in by_method[method].get(n, {}).values()] for n in numbers]
        rows.append([METHODS[method], *(over_seeds(cell, ".1f") for cell in cells)])
    for method in (method for method in AGAINST if method in by_method):
        pairs = [(by_method.get("weak", {}).get(n, {}), by_method[method].get(n, {})) for n in numbers]
        rows.append([f"*Δ: preset weak − {METHODS[method]}*", *(difference(*pair) for pair in pairs)])
    return table([f"{measure}, %", *(f"{n:,} labels" for n in numbers)], rows) + "\n\n" + about_weak(files)


def weak_ablation(root: Path) -> str:
    """The table of what each part of `--preset weak` is worth."""
    files = [file for file in weak_files(root, "mnist") if file["n"] == 100 and file["method"] in {"weak", *WITHOUT}]
    by_method = {method: by_n[100] for method, by_n in accuracies(files).get("accuracy", {}).items()}
    base, rows = by_method.get("weak", {}), []
    for method in (method for method in WITHOUT if method in by_method):
        found = by_method[method]
        rows.append([WITHOUT[method], over_seeds([100 * x for x in found.values()], ".1f"), difference(found, base)])
    if not rows:
        return NOTHING
    return (
        table(["`--preset weak`, 100 labels", "accuracy, %", "Δ against the whole"], rows) + "\n\n" + about_weak(files)
    )


def difference(some: Mapping[int, float], others: Mapping[int, float]) -> str:
    """Return the mean difference of two accuracies by seed, in percentage points."""
    return over_seeds([100 * (some[seed] - others[seed]) for seed in some.keys() & others.keys()], "+.1f")


def about_weak(files: Sequence[Mapping[str, Any]]) -> str:
    seeds: dict[Any, set[int]] = {}
    for file in files:
        seeds.setdefault((file["method"], file["n"]), set()).add(file["seed"])
    count = either({len(some) for some in seeds.values()})
    total = either(file["total"] for file in files if "total" in file)
    return (
        f"*{f'{total} training and validation examples; ' if total else ''}{files[0]['n_examples']:,} test examples. "
        f"Means ± standard errors over {count} seed{'s' * (count != '1')} of the labels and the weights; Δ, in "
        f"percentage points, is paired by seed. {commits(files).capitalize()}.*"
    )


def speed(root: Path) -> str:
    """A row for each timing of a step."""
    files = [read(path) for path in sorted(root.glob("results/step-*.json"))]
    rows = [
        [
            step["experiment"],
            str(step["batch_size"]),
            f"CPU, {step['threads']} thread{'s' * (step['threads'] > 1)}" if step["device"] == "cpu" else file["gpu"],
            step["precision"],
            "yes" if step["compiled"] else "no",
            *(spread(step[name], ".1f") for name in ("plain_ms", "ours_ms")),
            *(spread(step[name]) for name in ("plain / ours", "given only / ours")),
            f"{100 * step['data_share']:.1f} %",
        ]
        for file in files
        for step in file["steps"]
    ]
    columns = ["", "examples", "device", "precision", "compiled", "plain, ms", "ours, ms", "plain / ours"]
    caption = "Milliseconds per step: median (lower to upper quartile) of blocks that take turns in one process. "
    return page([*columns, "given only / ours", "share of data loading"], rows, caption + machine(files), files)


Parts = tuple[list[str], list[list[str]], str]  # a table's headings, rows and caption


def of_one_file(parts: Callable[[dict[str, Any]], Parts], root: Path) -> str:
    """The table that a function makes of the results file of its name, if there is one."""
    path = root / "results" / f"{parts.__name__}.json"
    return page(*parts(content := read(path)), [content]) if path.exists() else NOTHING


def processes(content: dict[str, Any]) -> Parts:
    """A row for each number of examples and of processes."""
    rows = [
        [str(row["examples"]), str(row["processes"]), *(spread(row[name]) for name in ("rate", "cpu"))]
        for row in content["rows"]
    ]
    caption = (
        "Relative to one process with as many examples: median (lower to upper quartile) of turns in mnist's shapes, "
        f"fp32, one thread each. {machine([content])}"
    )
    return ["examples per process", "processes", "examples per second", "CPU time per example"], rows, caption


def peer(content: dict[str, Any]) -> Parts:
    """A row for each thing that both can do."""
    rows = [
        [name, *(spread(ratios[other]) if other in ratios else "–" for other in ("MultiVae", "products"))]
        for name, ratios in content["ratios"].items()
    ]
    caption = (
        f"The time of MultiVae {content['multivae']}, always in float32, divided by ours; and that of the decoders' "
        "matrix products alone, a lower limit: median (lower to upper quartile) of turns on one thread. "
        f"{machine([content])}"
    )
    return ["mnist", "MultiVae / ours", "matrix products alone / ours"], rows, caption


def launches(content: dict[str, Any]) -> Parts:
    """A row for each experiment: the operations of a step's parts, and all of them, eager and captured."""
    parts = ("batch", "objective", "rest", "optimizer")
    rows = []
    for row in content["rows"]:
        eager = sum(row[part] for part in parts)
        numbers = [*(row[part] for part in parts), eager, eager - row["objective"] + 2]
        rows.append([row["experiment"], *map(str, numbers)])
    caption = (
        "Tensor operations of a step on a GPU, each a kernel launch or more. Objective: with its gradient; captured, "
        f"two CUDA graphs. torch {content['torch']}."
    )
    return ["", "batch", "objective", "bookkeeping", "AdamW", "eager step", "captured step"], rows, caption


def kills(content: dict[str, Any]) -> Parts:
    """A row for each way to run mnist/train.py, and their sum."""
    names = ["runs", "SIGKILL", "stop signals", "saved stops"]
    failures = ["tracebacks", "refusals", "hung", "lost", "differences"]
    kinds = {**content["kinds"], "all": sum(map(Counter, content["kinds"].values()), Counter())}
    rows = [[kind, *(str(found.get(name, 0)) for name in names + failures)] for kind, found in kinds.items()]
    return ["", *names, *failures], rows, "Counts of runs and kills; the last five columns count failures."


def ceiling(content: dict[str, Any]) -> Parts:
    """A row for each experiment: the highest log p(image) of each split."""
    splits = ("train", "validation", "test")
    rows = [
        [name, *(f"{found[split]['mean']:.1f} ± {found[split]['standard_error']:.1f}" for split in splits)]
        for name, found in content["sets"].items()
    ]
    caption = "Nats per example, mean ± standard error: the score of a decoder that returns the picture itself."
    return ["highest log p(image)", *splits], rows, caption


def gpu(content: dict[str, Any]) -> Parts:
    """A row for each experiment and precision: an eager and a captured step, and the device's floors."""
    kinds = ("eager", "captured", "products_floor", "weights_floor")
    rows = [
        [row["experiment"], row["precision"], *(f"{row[f'{kind}_ms']:.2f}" for kind in kinds)]
        + [f"{100 * row[f'{kind}_busy']:.0f} %" for kind in kinds[:2]]
        for row in content["steps"].values()
        if "captured_ms" in row  # not from --quick
    ]
    caption = (
        "Milliseconds of a step, eager and captured as a CUDA graph, and of its matrix products and its weights' "
        "traffic at the device's best rates; and the fraction of a step in which a kernel runs. fp32 is TF32. "
        f"{content['gpu']}, torch {content['torch']}."
    )
    columns = ["", "precision", *(f"{kind.partition('_')[0]}, ms" for kind in kinds), "busy, eager", "busy, captured"]
    return columns, rows, caption


TABLES: dict[str, Callable[[Path], str]] = {
    "experiments": experiments,
    "compared": compared,
    **{f"short_{name}": partial(short, name) for name in EXPERIMENTS},
    **{name: partial(of_experiment, name) for name in EXPERIMENTS},
    **{grid: partial(paired, grid) for grid in ("ablation", "precision", "reconstruct")},
    "quality": quality,
    **{f"weak_{name}": partial(weak, name) for name in ("mnist", "fashionmnist", "multimnist", "celeba")},
    "weak_ablation": weak_ablation,
    "speed": speed,
    **{parts.__name__: partial(of_one_file, parts) for parts in (processes, peer, launches, kills, ceiling, gpu)},
}
