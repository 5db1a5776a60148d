"""The rows of every table: functions from the folder of results/, and the page, to Markdown."""

import csv
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvae.errors import UserError
from mvae.run.evaluate import variance_limit

from common import spread
from markdown import NOTHING, agreed, commits, either, folded, machines, over_seeds, page, read, table
from recipes import GRIDS

Make = Callable[[Path, Path], str]

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text())

# Experiments: tables of all, and two for each, from what loglike.py wrote, and coherence.py of earlier commits.


class Experiment(NamedTuple):
    """What the tables show of an experiment.

    what: the modalities, for a newcomer.
    label: the modality other than the image, as the tables name it; all others together if there are several.
    listed: how loglike.py names them all, and all without the image, if that is another name.
    accuracies: the measures of how well the label is predicted from the image.
    """

    what: str
    label: str
    listed: tuple[str, ...] = ()
    accuracies: tuple[str, ...] = ()


CLASS = ("accuracy of the label predicted from the image",)
STRING = ("accuracy of the text predicted from the image, whole strings",)
ATTRIBUTE = ("accuracy of an attribute predicted from the image", "balanced accuracy of an attribute")
ALL_19 = ("Bald, Bangs, ..., Wearing_Hat", "Bald, ..., Wearing_Hat")
EXPERIMENTS = {
    "mnist": Experiment("a digit, its label", "text", accuracies=CLASS),
    "binarymnist": Experiment("the same with binary pixels", "text", accuracies=CLASS),
    "fashionmnist": Experiment("a piece of clothing, its class", "text", accuracies=CLASS),
    "multimnist": Experiment("up to four digits, their string", "text", accuracies=STRING),
    "celeba": Experiment("a face, 18 attributes as one vector", "attrs", accuracies=ATTRIBUTE),
    "celeba19": Experiment("a face, 18 separate attributes", "attrs", ALL_19, ATTRIBUTE),
    "vision": Experiment(
        "a face: in colour, grey, edges, mask, half, watermarked", "the five others", ("gray, ..., watermark",)
    ),
}
IMAGE = "q(z | image)"


class Run(NamedTuple):
    """One model: what loglike.py wrote, and its coherence if an earlier commit measured it."""

    content: dict[str, Any]
    coherence: dict[str, Any] | None

    @property
    def measures(self) -> dict[str, Any]:
        return self.content["measures"] | (self.coherence["measures"] if self.coherence else {})

    @property
    def settings(self) -> dict[str, Any]:
        return self.content["training"]["settings"]

    @property
    def epochs(self) -> str:
        return f"{self.content['training']['epoch']} / {self.settings['epochs']}"


class Average(NamedTuple):
    """A mean over seeds; the standard error over the test examples, which all seeds share; the seeds' deviation.

    star: "*" for an estimate that a few importance samples decide.
    """

    mean: float
    error: float
    spread: float | None
    star: str = ""

    @classmethod
    def of(cls, found: Sequence[Mapping[str, float]]) -> "Average":
        means = [one["mean"] for one in found]
        deviation = statistics.stdev(means) if len(means) > 1 else None
        return cls(statistics.fmean(means), statistics.fmean(one["standard_error"] for one in found), deviation)

    def nats(self) -> str:
        digits = ".2f" if self.error < 1 else ".1f"
        seeds = "" if self.spread is None else f" (seeds {self.spread:{digits}})"
        return f"{self.mean:{digits}} ± {self.error:{digits}}{seeds}{self.star}"

    def percent(self) -> str:
        seeds = "" if self.spread is None else f" (seeds {100 * self.spread:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}{seeds} %"


def runs(root: Path, experiment: str) -> dict[str, list[Run]]:
    """Return the runs of an experiment by recipe, each in the order of its seeds."""
    found: dict[str, list[Run]] = {}
    named = [(re.fullmatch(rf"{experiment}-(.+)-(\d+)", path.stem), path) for path in root.glob("results/*.json")]
    for recipe, _, path in sorted((name[1], int(name[2]), path) for name, path in named if name):
        coherence = path.with_name(f"coherence-{path.name}")
        content, also = read(path), read(coherence) if coherence.exists() else None
        if also and also["training"]["validation_loss"] != content["training"]["validation_loss"]:
            raise UserError(f"{coherence.name} and {path.name} are of different models: make both of the same")
        found.setdefault(recipe, []).append(Run(content, also))
    for recipe, some in found.items():
        for name in ("n_examples", "n_samples"):
            agreed([run.content for run in some], name, f"the seeds of {experiment}-{recipe}")
    return found


def estimates(experiment: str, some: Sequence[Run]) -> dict[tuple[str, str], Average]:
    """Return the averages over runs of one recipe, by quantity and proposal as the tables name them."""

    def named(text: str) -> str:
        for listed in EXPERIMENTS[experiment].listed:
            text = text.replace(listed, EXPERIMENTS[experiment].label)
        return text

    rows: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for run in some:
        for row in run.content["log_likelihood"]:
            rows.setdefault((named(row["quantity"]), named(row["proposal"])), []).append(row)
    found = {key: Average.of(lines) for key, lines in rows.items()}
    for key, lines in rows.items():
        variance = statistics.fmean(line["log_weight_variance"] for line in lines)
        if variance > variance_limit(some[0].content["n_samples"]):
            found[key] = found[key]._replace(star="*")
    return found


def starred(averages: Iterable[Average]) -> str:
    """Return the sentence of a caption that explains stars, if there are any."""
    text = (
        " \\*: a few samples decide the estimate (of a conditional: its joint's), which is too low on average: the "
        "variance of the log weights exceeds 2 ln(samples)."
    )
    return text if any(one.star for one in averages) else ""


def measures(some: Sequence[Run]) -> dict[str, Average]:
    """Return the averages of the measures that all runs of one recipe have."""
    names = [name for name in some[0].measures if all(name in run.measures for run in some)]
    return {name: Average.of([run.measures[name] for run in some]) for name in names}


def of_the_paper(experiment: str) -> dict[str, float]:
    """Return the paper's numbers by quantity, with q(z | image) as proposal."""
    found = dict(PAPER["log_likelihood"].get(experiment, {}))
    if found:
        label = EXPERIMENTS[experiment].label
        found[f"log p({label} | image)"] = found[f"log p(image, {label})"] - found["log p(image)"]
    return found


def minutes_of(contents: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean time of training to the best epoch."""
    return statistics.fmean(content["training"]["training_seconds"] for content in contents) / 60


def _epochs_and_minutes(some: Sequence[Run]) -> tuple[str, str]:
    minutes = minutes_of(run.content for run in some)
    return ", ".join(dict.fromkeys(run.epochs for run in some)), f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"


def _brackets(recipes: Iterable[Sequence[Run]]) -> str:
    return " In brackets: standard deviation over seeds." if any(len(some) > 1 for some in recipes) else ""


FAST = "fast"
"""The recipe that the first page and the experiments' pages show."""

OF_THE_IMAGE = ("log p(image)", "log p(image, {label})", "log p({label} | image)")
"""The quantities that those tables show, by importance samples from q(z | image)."""


def _fast(root: Path, experiment: str) -> list[Run]:
    return runs(root, experiment).get(FAST, [])


def experiments(root: Path, document: Path) -> str:
    """A row for each experiment: its data, and how long the recommended recipe takes."""
    rows, shown = [], []
    for experiment, about in EXPERIMENTS.items():
        shown += (some := _fast(root, experiment))
        readme = os.path.relpath(root / experiment.removeprefix("binary") / "README.md", document.parent)
        rows.append([f"[{experiment}]({readme})", about.what, _epochs_and_minutes(some)[1] if some else "–"])
    threads = [0 if run.settings["cuda"] else run.settings["threads"] for run in shown]
    devices = either(f"{n} CPU thread{'s' * (n > 1)}" if n else "a GPU" for n in threads)
    about_all = f"Training minutes on {devices}; the models of faces trained on a tenth of CelebA."
    return page(["experiment", "data", "minutes of `fast`"], rows if shown else [], about_all)


def compared(root: Path, document: Path) -> str:
    """A row for each experiment that the paper has: log-likelihoods of the recommended recipe and the paper's."""
    rows, shown = [], []
    for experiment, about in EXPERIMENTS.items():
        paper, some = of_the_paper(experiment), _fast(root, experiment)
        if not paper:
            continue
        found, measured, row = estimates(experiment, some), measures(some) if some else {}, [experiment]
        for name in (quantity.format(label=about.label) for quantity in OF_THE_IMAGE[:2]):
            digits = ".1f" if abs(paper[name]) > 1000 else ".2f"
            ours = found.get((name, IMAGE))
            shown += [ours] if ours else []
            row.append(f"{f'{ours.mean:{digits}}{ours.star}' if ours else '–'} / {paper[name]:{digits}}")
        accuracy = [f"{100 * measured[name].mean:.1f} %" for name in about.accuracies if name in measured]
        rows.append([*row, accuracy[0] if accuracy else "–"])
    columns = ["experiment", "log p(image), ours / paper", "log p(image, label), ours / paper", "label accuracy"]
    about_all = (
        "Nats per test example, by importance sampling from q(z | image): our preset `fast`, and the paper's Table 2."
    )
    return page(columns, rows, about_all + starred(shown))


def short(experiment: str) -> Make:
    """The table of an experiment's own page: the recommended recipe and the paper."""

    def whole(root: Path, document: Path) -> str:
        some, paper, about = _fast(root, experiment), of_the_paper(experiment), EXPERIMENTS[experiment]
        if not some:
            return NOTHING
        found, measured = estimates(experiment, some), measures(some)
        names = [quantity.format(label=about.label) for quantity in OF_THE_IMAGE]
        shown = {name: found[name, IMAGE]._replace(spread=None) for name in names if (name, IMAGE) in found}
        rows = [[name, one.nats(), f"{paper[name]:.2f}" if name in paper else ""] for name, one in shown.items()]
        rows += [
            [name, measured[name]._replace(spread=None).percent(), ""] for name in about.accuracies if name in measured
        ]
        epochs, minutes = _epochs_and_minutes(some)
        rows.append(["epochs", epochs.partition(" / ")[2], str(PAPER["epochs"][experiment])])
        rows.append(["training minutes", minutes, ""])
        seeds = f", over {len(some)} seeds" if len(some) > 1 else ""
        about_all = (
            f"Log p in nats: mean ± standard error over {some[0].content['n_examples']:,} test examples{seeds}, by "
            f"{some[0].content['n_samples']:,} importance samples from q(z | image)."
        )
        about_all += starred(shown.values())
        width = 3 if paper else 2
        return page(["", "`fast`", "the paper"][:width], [row[:width] for row in rows], about_all)

    return whole


def of_experiment(experiment: str) -> Make:
    """The table of one experiment: everything that was estimated and measured, a column for each recipe."""

    def whole(root: Path, document: Path) -> str:
        recipes, paper = runs(root, experiment), of_the_paper(experiment)
        if not recipes:
            return NOTHING
        found = [estimates(experiment, some) for some in recipes.values()]
        measured = [measures(some) for some in recipes.values()]
        rows: list[list[str]] = []
        by_attribute: dict[str, Any] = {}
        for quantity, proposal in dict.fromkeys(key for one in found for key in one):
            cells = [one[quantity, proposal].nats() if (quantity, proposal) in one else "–" for one in found]
            papers = f"*{paper[quantity]:.2f}*" if quantity in paper and proposal == IMAGE else ""
            rows.append([quantity, proposal, *cells, papers])
        for name in dict.fromkeys(name for one in measured for name in one):
            cells = [one[name].percent() if name in one else "–" for one in measured]
            if of_one := re.fullmatch(r"([a-z ]+) of ([A-Z]\w*)", name):
                by_attribute.setdefault(of_one[2], {})[of_one[1]] = cells
            else:
                rows.append([name, "", *cells, ""])
        epochs, minutes = zip(*map(_epochs_and_minutes, recipes.values()), strict=True)
        rows.append(["epoch (best / run)", "", *epochs, f"*{PAPER['epochs'][experiment]}*"])
        rows.append(["training minutes", "", *minutes, ""])
        columns = ["", "proposal distribution", *(f"`{recipe}`" for recipe in recipes), "the paper"]
        if not paper:
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        about = "Log p in nats per test example; mean ± standard error over the examples."
        if any(some[0].coherence for some in recipes.values()):
            about += (
                " Coherence: how often a classifier reads the label from images drawn given it. Agreement: how often "
                "it reads from an image drawn from the prior the label that the same z gives."
            )
        about += _brackets(recipes.values()) + starred(average for one in found for average in one.values())
        parts = [page(columns, rows, about)]
        if by_attribute:
            parts.append(folded("Each attribute", _attributes(by_attribute, list(recipes))))
        return "\n\n".join([*parts, *(folded(*_origin(recipe, some)) for recipe, some in recipes.items())])

    return whole


def _attributes(cells: Mapping[str, Mapping[str, list[str]]], recipes: Sequence[str]) -> str:
    """A row for each attribute: its accuracy and other measures in every recipe."""
    kinds = dict.fromkeys(kind for found in cells.values() for kind in found)
    columns = ["attribute", *(f"{kind}, `{recipe}`" for recipe in recipes for kind in kinds)]
    rows = [
        [name, *(found[kind][i] if kind in found else "–" for i in range(len(recipes)) for kind in kinds)]
        for name, found in cells.items()
    ]
    return table(columns, rows)


def _origin(recipe: str, some: Sequence[Run]) -> tuple[str, str]:
    """Return a heading, and how many examples and samples there were, the commits and the commands."""
    first, also = some[0].content, some[0].coherence
    seeds = [str(run.settings["seed"]) for run in some]
    about = [f"{first['n_examples']:,} test examples with {first['n_samples']:,} importance samples each"]
    if also:
        classifier = also["classifier"]
        balanced = f" ({100 * classifier['balanced']:.1f} % balanced)" if "balanced" in classifier else ""
        about.append(f"coherence over {also['n_pictures_per_label']} images per label")
        about.append(f"agreement over {also['n_prior']:,} draws")
        about.append(f"accuracy of the classifier on held-out images {100 * classifier['mean']:.1f} %{balanced}")
    about.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    about.append(commits([source for run in some for source in (run.settings, run.content)]))
    lines = [source.get("command") for run in some for source in (run.settings, run.content, run.coherence or {})]
    listed = "\n".join(dict.fromkeys(filter(None, lines)))
    text = f"*{'; '.join(about)}. Run each command at its commit.*\n\n```\n{listed}\n```"
    return f"How <code>{recipe}</code> was made", text


# The quality of draws, from what quality.py wrote.


def quality(root: Path, document: Path) -> str:
    """A row for each kind of draw, for each experiment and recipe."""
    files: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(root.glob("results/quality-*.json")):
        files.setdefault(path.stem.removeprefix("quality-").rpartition("-")[0], []).append(read(path))
    rows = []
    for experiment in EXPERIMENTS:
        for recipe, some in files.items():
            if recipe.partition("-")[0] != experiment:
                continue
            epochs = either(one["training"]["epoch"] for one in some)
            first = f"{recipe}<br>best epoch {epochs}, {len(some)} seed{'s' * (len(some) > 1)}"
            names = some[0]["drawn"]
            rows += [["" if i else first, name, *_drawn(some, name)] for i, name in enumerate(names)]
    every = [
        source for some in files.values() for one in some for source in (one["training"], one) if "command" in source
    ]
    about = (
        "Agreement: how often a classifier reads from a picture its label, mean ± standard error over the draws, or "
        "over strings and attributes given. Distance to real images and variance within a label: of the classifier's "
        "features, mean ± standard error over seeds. Real images are compared with as many training images. In "
        "brackets: standard deviation over seeds."
    )
    if some := [one["n_samples"] for one in every if one.get("log_p")]:
        about += f" log p: by {either(some)} importance samples from q(z | image) under the prior of the row."
    headings = ["", "drawn from", "agreement", "Fréchet distance", "variance within a label", "log p(image), nats"]
    return page(headings, rows, about, every)


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


# Paired differences: recipes compared with a base by example.

QUANTITIES = ("log p(image), q(z | image)", "log p(image, text), q(z | image)")
"""What is compared: columns of what loglike.py --per-example wrote."""

AGREEMENT = "agreement with a given label"
"""What is also compared, where quality.py measured it: in per cent."""

BySeed = dict[int, dict[str, list[float]]]
"""Values of the test examples, by seed and column."""


def paired(grid: str) -> Make:
    """The table of a grid on MNIST."""

    def whole(root: Path, document: Path) -> str:
        folder = root / "results" / grid
        values: dict[str, BySeed] = {}
        files: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("mnist-*.csv")):
            recipe, _, seed = path.stem.removeprefix("mnist-").rpartition("-")
            found = values.setdefault(recipe, {})[int(seed)] = _per_example(path)
            files.setdefault(recipe, []).append(read(path.with_suffix(".json")))
            if (measured := folder / f"quality-{path.stem}.json").exists():
                found[AGREEMENT] = [100 * read(measured)["drawn"]["q(z | label)"]["mean"]]
        base = next(iter(GRIDS[grid].recipes))
        if base not in values:
            return NOTHING
        every = [file for some in files.values() for file in some]
        n_examples, n_samples = (agreed(every, name, f"the runs of {grid}") for name in ("n_examples", "n_samples"))
        compared = {name: name.partition(", q")[0] for name in QUANTITIES}
        if _with(values[base], AGREEMENT):
            compared[AGREEMENT] = f"{AGREEMENT}, %"
        rows = []
        for recipe, by_seed in sorted(values.items(), key=lambda run: -_mean(run[1], QUANTITIES[0])):
            cells = [f"`{recipe}`", str(len(by_seed)), f"{minutes_of(files[recipe]):.1f}"]
            for name in compared:
                cells.append(f"{_mean(by_seed, name):.2f}" if _with(by_seed, name) else "–")
                cells.append("" if recipe == base else _difference(by_seed, values[base], name))
            rows.append(cells)
        headings = [heading for name in compared.values() for heading in (name, f"Δ vs `{base}`")]
        about = (
            f"{n_examples:,} test examples with {n_samples:,} importance samples each from q(z | image), the same in "
            "every run. Δ is paired by seed and example: mean ± standard error over the examples, in brackets that "
            "over the seeds. With so few examples, compare only these runs with each other."
        )
        return page(["recipe", "seeds", "training minutes", *headings], rows, about)

    return whole


def _per_example(path: Path) -> dict[str, list[float]]:
    """Return a CSV file of loglike.py. Raises UserError, naming it, if it can't be read."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in QUANTITIES}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't read {path}: {error!r}") from None


def _with(by_seed: BySeed, name: str) -> BySeed:
    return {seed: found for seed, found in by_seed.items() if name in found}


def _mean(by_seed: BySeed, name: str) -> float:
    return statistics.fmean(statistics.fmean(found[name]) for found in _with(by_seed, name).values())


def _difference(ours: BySeed, base: BySeed, name: str) -> str:
    """Return the mean difference over the seeds that both have."""
    seeds = sorted(_with(ours, name).keys() & _with(base, name).keys())
    if not seeds:
        return "–"
    by_seed = [[a - b for a, b in zip(ours[seed][name], base[seed][name], strict=True)] for seed in seeds]
    mean = over_seeds([statistics.fmean(values) for values in zip(*by_seed, strict=True)], "+.2f")
    means = [statistics.fmean(values) for values in by_seed]
    return mean + (f" ({statistics.stdev(means) / len(means) ** 0.5:.2f})" if len(means) > 1 else "")


# Weak supervision: a row for each method, a column for each number of labels.

METHODS = {
    "weak": "`--preset weak`",
    "no_hold": "`--preset weak`, β rising from the start",
    "half": "`--preset weak`, self-labels for the most confident half",
    "no_labels": "`--preset weak`, without self-labels",
    "paper": "the paper's terms, one stage",
    "spread": "label propagation on the VAE's means, transductive",
    "pca": "label propagation on 50 principal components, transductive",
    "pixels": "label propagation on pixels, transductive",
    "m1": "M1: VAE, logistic regression on its means",
    "dropout": "supervised, with dropout",
    "favoured": "supervised, with dropout, stopped early on all validation labels",
    "supervised": "supervised",
    "logistic": "logistic regression on pixels",
}
"""The methods as the tables name them, in the tables' order."""

PLOTTED = {
    "weak": "MVAE, preset weak",
    "pca": "label propagation, no network",
    "dropout": "classifier, labelled examples only",
    "paper": "MVAE, the paper's objective",
}
"""The methods that the plot shows, as it names them."""

AGAINST = ("pca", "favoured", "dropout", "m1")
"""The methods that `weak` is compared with, seed by seed."""

Accuracies = dict[str, dict[str, dict[int, dict[int, float]]]]
"""Accuracies by measure, method, number of labels and seed."""


def accuracies(files: Iterable[Mapping[str, Any]]) -> Accuracies:
    found: Accuracies = {}
    for file in files:
        for name, measure in file["measures"].items():
            by_n = found.setdefault(name, {}).setdefault(file["method"], {})
            by_n.setdefault(file["n"], {})[file["seed"]] = measure["mean"]
    return found


def weak_files(root: Path, experiment: str) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(root.glob(f"results/weak/{experiment}-*.json"))]


def weak(experiment: str) -> Make:
    """The table of one experiment; one for each measure, if there are several."""

    def whole(root: Path, document: Path) -> str:
        files, parts, n_seeds = weak_files(root, experiment), [], set()
        for measure, by_method in accuracies(files).items():
            numbers = sorted({n for by_n in by_method.values() for n in by_n})
            rows = []
            for method in (method for method in METHODS if method in by_method):
                found = [by_method[method].get(n, {}) for n in numbers]
                n_seeds |= {len(by_seed) for by_seed in found if by_seed}
                rows.append([METHODS[method], *(over_seeds([100 * x for x in one.values()], ".1f") for one in found)])
            for method in (method for method in AGAINST if method in by_method):
                row = [f"*Δ: preset weak − {METHODS[method]}*"]
                for n in numbers:
                    ours, theirs = (by_method[one].get(n, {}) for one in ("weak", method))
                    both = ours.keys() & theirs.keys()
                    row.append(over_seeds([100 * (ours[seed] - theirs[seed]) for seed in both], "+.1f"))
                rows.append(row)
            parts.append(table([f"{measure}, %", *(f"{n:,} labels" for n in numbers)], rows))
        if not files:
            return NOTHING
        total = either(file["total"] for file in files if "total" in file)
        parts.append(
            f"*{f'{total} training and validation examples; ' if total else ''}{files[0]['n_examples']:,} test "
            f"examples. Means ± standard errors over {either(n_seeds)} seed{'s' * (n_seeds != {1})} of the labels and "
            f"the weights; Δ is paired. A fraction of the labels validates. {commits(files).capitalize()}.*"
        )
        return "\n\n".join(parts)

    return whole


# Speed.


def step_files(root: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(root.glob("results/step-*.json"))]


def speed(root: Path, document: Path) -> str:
    """A row for each timing of a step."""
    files = step_files(root)
    timed = [(file, step) for file in files for step in file["steps"]]
    timed.sort(key=lambda pair: (pair[1]["device"], list(EXPERIMENTS).index(pair[1]["experiment"])))
    rows = [
        [
            step["experiment"],
            str(step["batch_size"]),
            _device(file, step),
            step["precision"],
            "yes" if step["compiled"] else "no",
            *(spread(step[name], ".1f") for name in ("plain_ms", "ours_ms")),
            *(spread(step[name]) for name in ("plain / ours", "given only / ours")),
            f"{100 * step['data_share']:.1f} %",
        ]
        for file, step in timed
    ]
    columns = ["", "examples", "device", "precision", "compiled", "plain, ms", "ours, ms", "plain / ours"]
    about = "Milliseconds per step: median (lower to upper quartile) of blocks that take turns in one process."
    about = f"{about} {machines(files)}"
    return page([*columns, "given only / ours", "share of the batch"], rows, about, files)


def _device(file: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    return file["gpu"] if step["device"] != "cpu" else f"CPU, {step['threads']} thread{'s' * (step['threads'] > 1)}"


def of_one_file(name: str, rows: Callable[[dict[str, Any]], tuple[list[str], list[list[str]], str]]) -> Make:
    """The table that `rows` makes of the results file of this name, if there is one."""

    def whole(root: Path, document: Path) -> str:
        path = root / "results" / f"{name}.json"
        return page(*rows(content := read(path)), [content]) if path.exists() else NOTHING

    return whole


def processes(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """A row for each number of examples and of processes."""
    rows = [
        [str(row["examples"]), str(row["processes"]), *(spread(row[name]) for name in ("rate", "cpu"))]
        for row in content["rows"]
    ]
    about = (
        "Relative to one process with as many examples: median (lower to upper quartile) of turns in mnist's shapes, "
        f"fp32, one thread each. {machines([content])}"
    )
    return ["examples per process", "processes", "examples per second", "CPU time per example"], rows, about


def peer(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """A row for each thing that both can do."""
    rows = [
        [name, *(spread(ratios[other]) if other in ratios else "–" for other in ("MultiVae", "products"))]
        for name, ratios in content["ratios"].items()
    ]
    about = (
        f"The time of MultiVae {content['multivae']}, always in float32, divided by ours; and that of the decoders' "
        "matrix products alone, a lower limit: median (lower to upper quartile) of turns on one thread. "
        f"{machines([content])}"
    )
    return ["mnist", "MultiVae / ours", "matrix products / ours"], rows, about


def launches(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """A row for each experiment: the operations of a step's parts, and all of them, eager and captured."""
    parts = ("batch", "objective", "rest", "optimizer")
    rows = []
    for row in content["rows"]:
        eager = sum(row[part] for part in parts)
        numbers = [*(row[part] for part in parts), eager, eager - row["objective"] + 2]
        rows.append([row["experiment"], *map(str, numbers)])
    about = (
        "Tensor operations of a step on a GPU, each a kernel launch or more. Objective: with its gradient; captured, "
        f"two CUDA graphs. torch {content['torch']}."
    )
    return ["", "batch", "objective", "β, sums, watch", "AdamW", "eager step", "captured step"], rows, about


def kills(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """A row for each way to run mnist/train.py, and their sum."""
    names = ["runs", "SIGKILL", "stop signals", "saved stops"]
    failures = ["tracebacks", "refusals", "hung", "lost", "differences"]
    kinds = {**content["kinds"], "all": sum(map(Counter, content["kinds"].values()), Counter())}
    rows = [[kind, *(str(found.get(name, 0)) for name in names + failures)] for kind, found in kinds.items()]
    return ["", *names, *failures], rows, "Counts of runs and kills; the last five columns count failures."


def gpu(content: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """A row for each experiment and precision: an eager and a captured step, and the device's floors."""
    columns = {
        "eager_ms": "eager",
        "captured_ms": "captured",
        "products_floor_ms": "products",
        "weights_floor_ms": "weights",
    }
    rows = [
        [row["experiment"], row["precision"], *(f"{row[name]:.2f}" for name in columns)]
        + [f"{100 * row[name]:.0f} %" for name in ("eager_busy", "captured_busy")]
        for row in content["steps"].values()
        if "captured_ms" in row  # not from --quick
    ]
    about = (
        "Milliseconds of a step, eager and captured as a CUDA graph, and of its matrix products and its weights' "
        "traffic at the device's best rates; and the fraction of a step in which a kernel runs. fp32 is TF32. "
        f"{content['gpu']}, torch {content['torch']}."
    )
    headings = [f"{name}, ms" for name in columns.values()]
    return ["", "precision", *headings, "busy, eager", "busy, captured"], rows, about


TABLES: dict[str, Make] = {
    "experiments": experiments,
    "compared": compared,
    **{f"short_{name}": short(name) for name in EXPERIMENTS},
    **{name: of_experiment(name) for name in EXPERIMENTS},
    **{grid: paired(grid) for grid in ("ablation", "precision", "reconstruct")},
    "quality": quality,
    **{f"weak_{name}": weak(name) for name in ("mnist", "fashionmnist", "multimnist", "celeba")},
    "speed": speed,
    **{made.__name__: of_one_file(made.__name__, made) for made in (processes, peer, launches, kills, gpu)},
}
