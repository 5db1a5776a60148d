"""Table 2 of the paper for the data sets of MNIST's family: its numbers, and ours for the MVAE and the baselines."""

import re
from functools import partial
from pathlib import Path

from markdown import either, page, read
from rows import PAPER, Run, epochs_of, estimates, measures, minutes_of, notes, of_the_paper, runs, settings

MODELS = {
    "vae": "VAE",
    "cvae": "CVAE",
    "bivcca": "BiVCCA",
    "jmvae": "JMVAE",
    "mvae-q": "MVAE-Q",
    "mvae-joint": "MVAE's terms, joint network",
    "mopoe": "MoPoE",
}
"""The models of baselines/run.py as the tables name them."""

QUANTITIES = ("log p(image)", "log p(image, text)", "log p(image | text)")


def table2(experiment: str, root: Path) -> str:
    """The table of one data set: a row for each model, and for each of the MVAE's recipes that has been run."""
    ours: dict[str, list[Run]] = {}
    for path in sorted(root.glob("results/baselines/*.json")):
        if name := re.fullmatch(rf"(.+)-{experiment}-\d+", path.stem):
            ours.setdefault(name[1], []).append(read(path))
    papers = PAPER["baselines"][experiment]
    rows = [
        row(name, ours.get(model, []), papers.get(model, {}))
        for model, name in MODELS.items()
        if model in ours or model in papers
    ]
    mvae = {name: some for name, some in runs(root, experiment).items() if name in ("paper", "fast")}
    for recipe, some in mvae.items():
        rows.append(row(f"MVAE, `{recipe}`", some, of_the_paper(experiment)))
    models = [*ours.values(), *mvae.values()]
    every = [run for some in models for run in some]
    if not every:
        rows = []
    columns = [name for quantity in QUANTITIES for name in (f"{quantity}, paper", "ours")]
    columns = ["", *columns, "variance of log weights", "label accuracy", "epochs (best / run)", "minutes", "seeds"]
    about = (
        f"Nats per test example, mean ± standard error over {either(run['n_examples'] for run in every)} "
        f"examples, by {either(run['n_samples'] for run in every)} importance samples, from the "
        "proposal distribution with the highest estimate. Variance: of the log weights of log p(image), for the CVAE "
        "of log p(image | text). The paper: Table 2, 500 epochs."
        + notes(average for some in models for average in estimates(some).values())
    )
    return page(columns, rows, about, [settings(run) for run in every])


def row(name: str, some: list[Run], papers: dict[str, float]) -> list[str]:
    """Return the cells of one model: `some` are its runs, one for each seed."""
    cells, shown, found = [name], [], estimates(some)
    for quantity in QUANTITIES:
        cells.append(f"*{papers[quantity]:.2f}*" if quantity in papers else "")
        which = [average for (name, _), average in found.items() if name == quantity]
        best = max(which, key=lambda average: average.mean, default=None)
        shown += [best] if best else []
        cells.append(best.nats() if best else "")
    if not some:
        return [*cells, *[""] * 5]
    accuracy = "".join(average.percent() for name, average in measures(some).items() if "accuracy of the label" in name)
    return [*cells, f"{shown[0].variance:.1f}", accuracy, epochs_of(some), minutes_of(some), str(len(some))]


TABLES = {f"baselines_{name}": partial(table2, name) for name in PAPER["baselines"]}
