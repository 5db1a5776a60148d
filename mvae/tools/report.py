"""Log-likelihoods of a model: the flags of a loglike.py, what it prints, and its JSON and per-example files.

As a command it joins the .npz files that parts of a split wrote: python -m mvae.tools.report PART...
"""

import csv
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data.dataset import Data
from ..errors import UsageError, UserError
from ..estimators import Modalities
from ..files import whole, write_atomically
from ..model import MVAE
from ..run.checkpoint import load_model, origin
from ..run.device import resolve
from ..run.distributed import Processes, is_first, together
from ..run.evaluate import Evaluation, Quantity, evaluate, row, shown, summary, table, under
from .folder import Build, Examples, with_source
from .prior import WithPrior

STARTED = time.perf_counter()

COLUMNS = ("quantity", "proposal")


@dataclass(kw_only=True)
class Loglike(WithPrior):
    """The flags of every loglike.py. Under torchrun the processes share the examples."""

    # Estimates
    n_samples: int = 1000  # importance samples per example
    split: Literal["test", "validation"] = "test"  # split to read
    offset: int = 0  # number of the first example, to split the work; the estimates are those of the whole
    limit: int | None = None  # number of examples (default: all from --offset on)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # network precision; auto: bf16 if the processor supports it

    # Output
    json: Path | None = None  # file to write the results to, as JSON
    per_example: Path | None = None  # .csv or .npz file for each example's log p

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(2, "n_samples")
        self.check_counts(1, "limit")
        self.check_counts(0, "offset")
        if self.per_example and self.per_example.suffix not in (".csv", ".npz"):
            raise UsageError(f"per_example must end in .csv or .npz, got {self.per_example}")
        self.check_outputs(self.json, self.per_example)

    def rows(self, data: Data) -> range:
        """Return the numbers of the examples to estimate. Raises UsageError if there are none."""
        if self.offset >= len(data):
            raise UsageError(f"offset must be below {len(data)}, the number of examples, got {self.offset}")
        return range(len(data))[self.offset :][: self.limit]


def load(
    description: str | None, experiment: str, source: type, build: Build, examples: Examples
) -> tuple[Loglike, MVAE, Data, dict[str, Any]]:
    """Return the flags (with those of `source`), the model, the split on its device, and what trained the model."""
    config = cli.parse(description, with_source(Loglike, source))
    origin()  # the commit that the run began with
    device = config.device()
    model, trained = load_model(config.model_path, experiment, build, device)
    config.load_prior(model)
    return config, model, examples(config.split, config, trained["settings"]).to(device), trained


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
            rows=config.rows(data),
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
            "offset": config.offset,
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
    _print(rows, n, head, config.n_samples)
    for name, other in others.items():
        text = f"{name}: {shown(other['mean'], other['standard_error'], 4)}"
        print(text + f", over {other['n_examples']} examples" * (other["n_examples"] != n))


def _print(rows: Sequence[Mapping[str, Any]], n: int, head: str, n_samples: int) -> None:
    own = any(row["n_examples"] != n for row in rows)
    over = f"those of {n} examples that have its modalities" if own else f"{n} examples"
    print(f"{head} in nats: mean ± standard error over {over}, {n_samples} importance samples,")
    print("and the variance of the log importance weights (mean over examples).")
    print(table(rows, n, n_samples))


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
            columns["n_samples"] = np.array(found.n_samples)
            np.savez(file, log_p=log_p, log_weight_variance=variance, **columns)  # type: ignore[arg-type]
        else:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerow(["example", *map(", ".join, zip(quantities, proposals, strict=True))])
            for number, row in zip(example.tolist(), log_p.tolist(), strict=True):
                lines.writerow([number, *("" if math.isnan(value) else value for value in row)])
            file.write(text.getvalue().encode())


@dataclass(kw_only=True)
class Parts:
    """The flags of this module as a command."""

    parts: tuple[Path, ...]  # .npz files of `loglike.py --per-example`
    json: Path | None = None  # file to write the results to, as JSON


def join(parts: Sequence[Path]) -> tuple[int, list[dict[str, Any]], int]:
    """Return the number of examples in the files, the estimates over them all, and the least number of samples.

    Raises UserError for a file that isn't one of `write_per_example`, other columns, or an example that is in two.
    """
    found = []
    for path in parts:
        try:
            with np.load(path) as file:
                names = (*COLUMNS, "example", "log_p", "log_weight_variance", "n_samples")
                found.append({name: file[name] for name in names})
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            raise UserError(f"{path} is missing, or not an .npz file of loglike.py --per-example") from None
        if any(not np.array_equal(found[-1][name], found[0][name]) for name in COLUMNS):
            raise UserError(f"{path} has other quantities or proposals than {parts[0]}")
    example, log_p, variance = (
        np.concatenate([part[name] for part in found]) for name in ("example", "log_p", "log_weight_variance")
    )
    numbers, order = np.unique(example, return_index=True)
    if len(numbers) != len(example):
        raise UserError(f"{len(example) - len(numbers)} examples are in more than one of the files")
    rows = []
    for i, (quantity, proposal) in enumerate(zip(*(found[0][name].tolist() for name in COLUMNS), strict=True)):
        here = order[~np.isnan(log_p[order, i])]
        rows.append(row(quantity, proposal, torch.from_numpy(log_p[here, i]), torch.from_numpy(variance[here, i])))
    return len(numbers), rows, min(int(part["n_samples"]) for part in found)


def main() -> None:
    config = cli.parse(__doc__, Parts)
    n, rows, n_samples = join(config.parts)
    if config.json:
        content = {**origin(), "n_examples": n, "log_likelihood": rows}
        write_atomically(config.json, (json.dumps(content, indent=2) + "\n").encode())
    _print(rows, n, "Log-likelihood", n_samples)


if __name__ == "__main__":
    cli.run(main)
