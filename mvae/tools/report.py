"""Log-likelihoods of a model: the flags of a loglike.py, what it prints, and its JSON and per-example files."""

import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data.dataset import Data
from ..errors import UsageError
from ..estimators import Modalities
from ..files import whole, write_atomically
from ..model import MVAE
from ..run.checkpoint import load_model, origin
from ..run.device import resolve
from ..run.distributed import Processes, is_first, together
from ..run.evaluate import Evaluation, Quantity, evaluate, shown, summary, table, under
from .folder import Build, Examples, with_source
from .prior import WithPrior

STARTED = time.perf_counter()


@dataclass(kw_only=True)
class Loglike(WithPrior):
    """The flags of every loglike.py. Under torchrun the processes share the examples."""

    # Estimates
    n_samples: int = 1000  # importance samples per example
    split: Literal["test", "validation"] = "test"  # split to read
    limit: int | None = None  # read the first N examples only
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # network precision; auto: bf16 if the processor supports it

    # Output
    json: Path | None = None  # file to write the results to, as JSON
    per_example: Path | None = None  # .csv or .npz file for each example's log p

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(2, "n_samples")
        self.check_counts(1, "limit")
        if self.per_example and self.per_example.suffix not in (".csv", ".npz"):
            raise UsageError(f"per_example must end in .csv or .npz, got {self.per_example}")
        self.check_outputs(self.json, self.per_example)


def load(
    description: str | None, experiment: str, source: type, build: Build, examples: Examples
) -> tuple[Loglike, MVAE, Data, dict[str, Any]]:
    """Return the flags (with those of `source`), the model, the split on its device, and what trained the model."""
    config = cli.parse(description, with_source(Loglike, source))
    origin()  # the commit that the run began with
    device = config.device()
    model, trained = load_model(config.model_path, experiment, build, device)
    config.load_prior(model)
    data = examples(config.split, config, trained["settings"])[: config.limit]
    return config, model, data.to(device), trained


def estimate(
    config: Loglike,
    model: MVAE,
    data: Data,
    quantities: Mapping[Quantity, Sequence[Modalities]],
    predictions: Mapping[str, Modalities] | None = None,
) -> Evaluation:
    """Estimate the quantities, each with its proposals, and predict modalities; see `mvae.run.evaluate.evaluate`.

    N(0, I) is a poor proposal under a fitted prior. There q(z | target) or q(z | given) takes its place.
    """
    if config.prior == "fitted":
        quantities = {
            which._replace(given_proposal=which.given_proposal or which.given): [some for some in proposals if some]
            for which, proposals in quantities.items()
        }
    config.precision = resolve(config.precision, data.device)  # recorded by `report`
    processes = Processes.join(data.device)
    with together():
        return evaluate(
            model,
            data,
            quantities=quantities,
            predictions=predictions,
            n_samples=config.n_samples,
            seed=config.seed,
            precision=config.precision,
            processes=processes,
        )


def report(found: Evaluation, measures: Mapping[str, Tensor], config: Loglike, trained: Mapping[str, Any]) -> None:
    """Print the results and write --json and --per-example. Of several processes only the first does.

    `measures` are further values (n,) by name; `trained` is what `load` returns.
    """
    if not is_first():
        return
    rows, n = found.rows(), found.n_examples
    others = {name: summary(values) for name, values in measures.items()}
    if config.json:
        settings = {name: value for name, value in trained["settings"].items() if not name.endswith("_dir")}
        content = {
            **origin(),
            "checkpoint": str(config.model_path),
            "split": config.split,
            "n_examples": n,
            "n_samples": config.n_samples,
            "prior": config.prior,
            "seed": config.seed,
            "device": "cuda" if config.cuda and torch.cuda.is_available() else "cpu",
            "precision": config.precision,
            "threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "torch": torch.__version__,
            "seconds": time.perf_counter() - STARTED,
            "training": {**trained, "settings": settings},
            "log_likelihood": rows,
            "measures": others,
        }
        write_atomically(config.json, (json.dumps(content, indent=2) + "\n").encode())
    if config.per_example:
        write_per_example(found, config.per_example)
    head = f"{config.split.capitalize()} log-likelihood" + " under the fitted prior" * (config.prior == "fitted")
    own = any(row["n_examples"] != n for row in rows)
    over = f"those of {n} examples that have its modalities" if own else f"{n} examples"
    print(f"{head} in nats: mean ± standard error over {over}, {config.n_samples} importance samples,")
    print("and the variance of the log importance weights (mean over examples).")
    print(table(rows, n, config.n_samples))
    for name, other in others.items():
        text = f"{name}: {shown(other['mean'], other['standard_error'], 4)}"
        print(text + f", over {other['n_examples']} examples" * (other["n_examples"] != n))


def write_per_example(found: Evaluation, path: Path) -> None:
    """Write each example's estimates, in nats, with its number in the split, to a .csv or an .npz file.

    There is a column for each quantity and proposal. If an example lacks a modality, a value is empty, or NaN in .npz.
    """
    quantities = [quantity.name for quantity, _ in found.estimates]
    proposals = [under(proposal) for _, proposal in found.estimates]
    example = torch.cat([*found.examples.values()]).unique()
    log_p, variance = np.full((2, len(example), len(found.estimates)), np.nan)
    for column, (which, one) in enumerate(found.estimates.items()):
        rows = torch.searchsorted(example, found.examples[which])
        log_p[rows, column], variance[rows, column] = one.log_p, one.log_weight_variance
    with whole(path) as file:
        if path.suffix == ".npz":
            columns = {"quantity": np.array(quantities), "proposal": np.array(proposals), "example": example.numpy()}
            np.savez(file, log_p=log_p, log_weight_variance=variance, **columns)  # type: ignore[arg-type]
        else:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerow(["example", *map(", ".join, zip(quantities, proposals, strict=True))])
            for number, row in zip(example.tolist(), log_p.tolist(), strict=True):
                lines.writerow([number, *("" if math.isnan(value) else value for value in row)])
            file.write(text.getvalue().encode())
