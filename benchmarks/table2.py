"""Table 2 of the paper for the data sets of MNIST's family: its numbers, and ours for the MVAE and the baselines."""

import re
from pathlib import Path

from markdown import either, page, read
from rows import PAPER, Make, Run, estimates, measures, minutes_of, of_the_paper, runs

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


def table2(experiment: str) -> Make:
    """The table of one data set: a row for each model, and for each of the MVAE's recipes that has been run."""

    def whole(root: Path, document: Path) -> str:
        ours: dict[str, list[Run]] = {}
        for path in sorted(root.glob("results/baselines/*.json")):
            if name := re.fullmatch(rf"(.+)-{experiment}-\d+", path.stem):
                ours.setdefault(name[1], []).append(Run(read(path), None))
        papers = PAPER["baselines"][experiment]
        rows = [
            row(experiment, name, ours.get(model, []), papers.get(model, {}))
            for model, name in MODELS.items()
            if model in ours or model in papers
        ]
        mvae = {name: some for name, some in runs(root, experiment).items() if name in ("paper", "fast")}
        for recipe, some in mvae.items():
            rows.append(row(experiment, f"MVAE, `{recipe}`", some, of_the_paper(experiment)))
        every = [run for some in (*ours.values(), *mvae.values()) for run in some]
        if not every:
            rows = []
        columns = [name for quantity in QUANTITIES for name in (f"{quantity}, paper", "ours")]
        columns = ["", *columns, "variance of log weights", "label accuracy", "epochs (best / run)", "minutes", "seeds"]
        about = (
            f"Nats per test example, mean ± standard error over {either(run.content['n_examples'] for run in every)} "
            f"examples, by {either(run.content['n_samples'] for run in every)} importance samples, from the "
            "proposal distribution with the highest estimate. In brackets: standard deviation over seeds. Variance: of "
            "the log weights of log p(image), for the CVAE of log p(image | text). The paper: Table 2, 500 epochs."
        )
        return page(columns, rows, about, [run.content["training"]["settings"] for run in every])

    return whole


def row(experiment: str, name: str, some: list[Run], papers: dict[str, float]) -> list[str]:
    """Return the cells of one model: `some` are its runs, one for each seed."""
    cells = [name]
    variances: list[float] = []
    found = estimates(experiment, some)
    for quantity in QUANTITIES:
        cells.append(f"*{papers[quantity]:.2f}*" if quantity in papers else "")
        by_proposal = {proposal: average for (which, proposal), average in found.items() if which == quantity}
        best = max(by_proposal, key=lambda proposal: by_proposal[proposal].mean, default=None)
        cells.append("" if best is None else by_proposal[best].nats())
        variances += [
            line["log_weight_variance"]
            for run in some if best and not variances
            for line in run.content["log_likelihood"] if (line["quantity"], line["proposal"]) == (quantity, best)
        ]  # fmt: skip
    if not some:
        return [*cells, *[""] * 5]
    accuracy = "".join(average.percent() for name, average in measures(some).items() if "accuracy of the label" in name)
    cells += [f"{sum(variances) / len(variances):.1f}", accuracy, ", ".join(dict.fromkeys(run.epochs for run in some))]
    return [*cells, f"{minutes_of(run.content for run in some):.0f}", str(len(some))]


TABLES = {f"baselines_{name}": table2(name) for name in PAPER["baselines"]}
