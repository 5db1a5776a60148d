"""The tables of the experiments: the summary, and one for each, from what loglike.py and coherence.py wrote."""

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markdown import NOTHING, agreed, read, table

from mvae.errors import UserError

PAPER = json.loads((Path(__file__).resolve().parent / "paper.json").read_text())


class Experiment(NamedTuple):
    """What the tables show of an experiment.

    what: the modalities, for a newcomer.
    second: the modality beside the image, as the tables name it; all the others together if there are several.
    listed: how loglike.py writes log p of them all, and of them without the image, where that is another name.
    read: the measure of how well that is read off the image; and one more.
    folder: whose page has its table, where that is another name.
    """

    what: str
    second: str
    listed: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    folder: str = ""


LABEL = "accuracy of the label predicted from the image"
ATTRIBUTE = ("accuracy of an attribute predicted from the image", "balanced accuracy of an attribute")
EXPERIMENTS = {
    "mnist": Experiment("a digit, its label", "text", read=(LABEL,)),
    "binarymnist": Experiment("the same with binary pixels", "text", read=(LABEL,), folder="mnist"),
    "fashionmnist": Experiment("a piece of clothing, its class", "text", read=(LABEL,)),
    "multimnist": Experiment(
        "up to four digits, their string", "text", read=("accuracy of the text read off the image, whole strings",)
    ),
    "celeba": Experiment("a face, 18 attributes as one vector", "attrs", read=ATTRIBUTE),
    "celeba19": Experiment(
        "a face, 18 attributes apart", "attrs", ("Bald, Bangs, ..., Wearing_Hat", "Bald, ..., Wearing_Hat"), ATTRIBUTE
    ),
    "vision": Experiment(
        "a face: in colour, grey, edges, mask, half, watermarked", "the five others", ("gray, ..., watermark",)
    ),
}


class Run(NamedTuple):
    """One model: what loglike.py found, and what coherence.py did, if it was asked."""

    content: dict[str, Any]
    coherence: dict[str, Any] | None

    @property
    def measures(self) -> dict[str, Any]:
        return self.content["measures"] | (self.coherence["measures"] if self.coherence else {})


class Average(NamedTuple):
    """A mean over seeds; the standard error over the test examples, which all seeds share; the seeds' deviation."""

    mean: float
    error: float
    spread: float | None

    @classmethod
    def of(cls, found: Sequence[Mapping[str, float]]) -> "Average":
        means = [one["mean"] for one in found]
        spread = statistics.stdev(means) if len(means) > 1 else None
        return cls(statistics.fmean(means), statistics.fmean(one["standard_error"] for one in found), spread)

    def nats(self) -> str:
        digits = ".2f" if self.error < 1 else ".1f"
        spread = "" if self.spread is None else f" (seeds {self.spread:{digits}})"
        return f"{self.mean:{digits}} ± {self.error:{digits}}{spread}"

    def percent(self) -> str:
        spread = "" if self.spread is None else f" (seeds {100 * self.spread:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}{spread} %"


def runs(root: Path, experiment: str) -> dict[str, list[Run]]:
    """The runs of an experiment by recipe, each in the order of its seeds."""
    found: dict[str, list[Run]] = {}
    for path in sorted(root.glob(f"results/{experiment}-*.json"), key=_name_and_seed):
        recipe, _ = _name_and_seed(path)
        coherence = path.with_name(f"coherence-{path.name}")
        content, also = read(path), read(coherence) if coherence.exists() else None
        if also and also["training"]["validation_loss"] != content["training"]["validation_loss"]:
            raise UserError(f"{coherence.name} and {path.name} are of different models: make both of the same")
        found.setdefault(recipe.removeprefix(f"{experiment}-"), []).append(Run(content, also))
    for recipe, some in found.items():
        for name in ("n_examples", "n_samples"):
            agreed([run.content for run in some], name, f"the seeds of {experiment}-{recipe}")
    return found


def _name_and_seed(path: Path) -> tuple[str, int]:
    name, _, seed = path.stem.rpartition("-")
    if "-" not in name or not seed.isdigit():
        raise UserError(f"{path} is to be named EXPERIMENT-RECIPE-SEED.json")
    return name, int(seed)


def estimates(experiment: str, some: Sequence[Run]) -> dict[tuple[str, str], Average]:
    """By quantity and proposal, as the tables name them, the averages over runs of one recipe."""

    def named(text: str) -> str:
        for listed in EXPERIMENTS[experiment].listed:
            text = text.replace(listed, EXPERIMENTS[experiment].second)
        return text

    rows: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for run in some:
        for row in run.content["log_likelihood"]:
            rows.setdefault((named(row["quantity"]), named(row["proposal"])), []).append(row)
    return {key: Average.of(found) for key, found in rows.items()}


def measures(some: Sequence[Run]) -> dict[str, Average]:
    """The averages of what all runs of one recipe measured."""
    names = [name for name in some[0].measures if all(name in run.measures for run in some)]
    return {name: Average.of([run.measures[name] for run in some]) for name in names}


def of_the_paper(experiment: str) -> dict[str, float]:
    """The paper's numbers by quantity, under q(z | image); log p(second | image) is a difference of two of them."""
    found = dict(PAPER["log_likelihood"].get(experiment, {}))
    if found:
        second = EXPERIMENTS[experiment].second
        found[f"log p({second} | image)"] = found[f"log p(image, {second})"] - found["log p(image)"]
    return found


def epochs_of(run: Run) -> str:
    training = run.content["training"]
    return f"{training['epoch']} of {training['settings']['epochs']}"


def minutes_of(some: Sequence[Run]) -> str:
    minutes = statistics.fmean(run.content["training"]["training_seconds"] for run in some) / 60
    return f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"


def in_summary(recipes: Mapping[str, list[Run]]) -> str:
    """The recipe that stands for an experiment: of those called fast, or else of all, the one with the most epochs."""
    fast = [recipe for recipe in recipes if recipe.startswith("fast")]
    return max(fast or recipes, key=lambda recipe: recipes[recipe][0].content["training"]["settings"]["epochs"])


def summary(root: Path, document: Path) -> str:
    """A row for each experiment, with the paper's numbers below ours."""
    rows, shown = [], []
    for experiment, shown_as in EXPERIMENTS.items():
        recipes = runs(root, experiment)
        readme = os.path.relpath(root / (shown_as.folder or experiment) / "README.md", document.parent)
        row = [f"[{experiment}]({readme})", shown_as.what]
        if recipes:
            recipe = in_summary(recipes)
            row += [f"`{recipe}`", *summarized(experiment, recipes[recipe])]
            shown.append(recipes[recipe])
        rows.append(row + ["–"] * (10 - len(row)))
    if not shown:
        return NOTHING
    columns = [
        "",
        "modalities",
        "recipe",
        "log p(image)",
        "log p(image, second)",
        "log p(second | image)",
        "second read off image",
    ]
    columns += ["epochs", "minutes", "test examples"]
    samples = sorted({some[0].content["n_samples"] for some in shown})
    about = (
        "*Log p in nats per test example, mean ± standard error over the examples, by importance sampling with "
        f"{' or '.join(f'{n:,}' for n in samples)} draws from q(z | image); below it in italics the paper's (arXiv "
        "1802.05335, Table 2), where log p(second | image) is the difference of two, and its epochs. Epochs: the "
        f"model's, of those asked for; minutes: of training up to it, on {_devices(shown)}.{_about_seeds(shown)}*"
    )
    return f"{table(columns, rows)}\n\n{about}"


def summarized(experiment: str, some: Sequence[Run]) -> list[str]:
    """The cells of a row of the summary, from log p(image) on."""
    shown, paper = EXPERIMENTS[experiment], of_the_paper(experiment)
    found, measured = estimates(experiment, some), measures(some)
    cells = []
    for quantity in ("log p(image)", f"log p(image, {shown.second})", f"log p({shown.second} | image)"):
        ours = found.get((quantity, "q(z | image)"))
        below = f"<br>*{paper[quantity]:.2f}*" if quantity in paper else ""
        cells.append(ours.nats() + below if ours else "–")
    cells.append("<br>balanced ".join(measured[name].percent() for name in shown.read if name in measured) or "–")
    cells.append(f"{', '.join(dict.fromkeys(map(epochs_of, some)))}<br>*{PAPER['epochs'][experiment]}*")
    return [*cells, minutes_of(some), f"{some[0].content['n_examples']:,}"]


def _devices(shown: Iterable[Sequence[Run]]) -> str:
    """What the runs trained on: "1 CPU thread", or "a GPU"."""
    settings = [run.content["training"]["settings"] for some in shown for run in some]
    cpu = sorted({one["threads"] for one in settings if not one["cuda"]})
    parts = [f"{' or '.join(map(str, cpu))} CPU thread{'s' * (cpu != [1])}"] if cpu else []
    return " or ".join(parts + ["a GPU"] * any(one["cuda"] for one in settings))


def _about_seeds(shown: Iterable[Sequence[Run]]) -> str:
    several = any(len(some) > 1 for some in shown)
    return " In brackets: the standard deviation over seeds." if several else ""


def of_experiment(experiment: str) -> Callable[[Path, Path], str]:
    """The table of one experiment: all that was estimated and measured, a column for each recipe."""

    def whole(root: Path, document: Path) -> str:
        recipes = runs(root, experiment)
        if not recipes:
            return NOTHING
        paper = of_the_paper(experiment)
        found = {recipe: estimates(experiment, some) for recipe, some in recipes.items()}
        measured = {recipe: measures(some) for recipe, some in recipes.items()}
        columns = ["", "under", *(f"`{recipe}`" for recipe in recipes), *(["the paper"] if paper else [])]
        rows = []
        for quantity, proposal in dict.fromkeys(key for one in found.values() for key in one):
            cells = [one[quantity, proposal].nats() if (quantity, proposal) in one else "–" for one in found.values()]
            if paper:
                said = quantity in paper and proposal == "q(z | image)"
                cells.append(f"*{paper[quantity]:.2f}*" if said else "")
            rows.append([quantity, proposal, *cells])
        by_attribute: dict[str, dict[str, list[str]]] = {}
        for name in dict.fromkeys(name for one in measured.values() for name in one):
            cells = [one[name].percent() if name in one else "–" for one in measured.values()]
            of_one = re.fullmatch(r"([a-z ]+) of ([A-Z]\w*)", name)
            if of_one:
                by_attribute.setdefault(of_one[2], {})[of_one[1]] = cells
            else:
                rows.append([name, "", *cells, *([""] if paper else [])])
        epochs = [", ".join(dict.fromkeys(map(epochs_of, some))) for some in recipes.values()]
        rows.append(["epoch", "", *epochs, *([f"*{PAPER['epochs'][experiment]}*"] if paper else [])])
        rows.append(["minutes of training up to it", "", *map(minutes_of, recipes.values()), *([""] if paper else [])])
        parts = [table(columns, rows)]
        if by_attribute:
            parts.append(attribute_table(by_attribute, list(recipes)))
        parts.append(
            "*Log p in nats per test example; mean ± standard error over the examples. Commands are of their commits."
            + _about_seeds(recipes.values())
            + "*"
        )
        parts += [about_recipe(recipe, some) for recipe, some in recipes.items()]
        return "\n\n".join(parts)

    return whole


def attribute_table(cells: Mapping[str, Mapping[str, list[str]]], recipes: Sequence[str]) -> str:
    """A row for each attribute, folded: its accuracy and other measures in every recipe."""
    kinds = dict.fromkeys(kind for found in cells.values() for kind in found)
    columns = ["attribute", *(f"{kind}, `{recipe}`" for recipe in recipes for kind in kinds)]
    rows = [
        [name, *(found[kind][i] if kind in found else "–" for i in range(len(recipes)) for kind in kinds)]
        for name, found in cells.items()
    ]
    return f"<details><summary>Each attribute</summary>\n\n{table(columns, rows)}\n\n</details>"


def about_recipe(recipe: str, some: Sequence[Run]) -> str:
    """A line on how many examples and draws there were, and the commands."""
    first = some[0].content
    seeds = [str(run.content["training"]["settings"]["seed"]) for run in some]
    commits = {str(run.content["training"]["settings"].get("commit"))[:7] for run in some}
    commits |= {str(run.content["commit"])[:7] for run in some}
    commands = []
    for run in some:
        commands += [run.content["training"]["settings"].get("command"), run.content["command"]]
        commands += [run.coherence["command"]] if run.coherence else []
    about = [
        f"{first['n_examples']:,} test examples with {first['n_samples']:,} importance samples each",
        f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}",
        f"commit{'s' * (len(commits) > 1)} {', '.join(sorted(commits))}",
    ]
    if some[0].coherence:
        also = some[0].coherence
        about.insert(1, f"coherence over {also['n_pictures_per_label']} pictures for each label")
        about.insert(2, f"agreement over {also['n_prior']:,} draws")
        classifier = also["classifier"]
        balanced = f" ({100 * classifier['balanced']:.1f} % balanced)" if "balanced" in classifier else ""
        about.insert(3, f"the classifier reads {100 * classifier['mean']:.1f} %{balanced} of held-out pictures right")
    listed = "\n".join(dict.fromkeys(command for command in commands if command))
    return f"*`{recipe}`: {'; '.join(about)}.*\n\n```\n{listed}\n```"
