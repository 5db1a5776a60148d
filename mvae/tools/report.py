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
from ..run.distributed import Processes, is_first
from ..run.evaluate import Evaluation, Quantity, evaluate, listed, mean_and_error
from .folder import Build, Examples, Tool, with_source

STARTED = time.perf_counter()


@dataclass(kw_only=True)
class Loglike(Tool):
    """The flags of every loglike.py. Under torchrun the processes share the examples."""

    # Estimates
    n_samples: int = 1000  # importance samples per example
    split: Literal["test", "validation"] = "test"  # split to read
    limit: int | None = None  # read the first N examples only
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # of the networks; auto: bf16 if the processor supports it

    # Output
    json: Path | None = None  # file to write the results to, as JSON
    per_example: Path | None = None  # .csv or .npz file for each example's log p

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(2, "n_samples", "limit")
        if self.per_example and self.per_example.suffix not in (".csv", ".npz"):
            raise UsageError(f"per_example must end in .csv or .npz, got {self.per_example}")
        self.check_outputs(self.json, self.per_example)


def load(
    description: str | None, experiment: str, source: type, build: Build, examples: Examples
) -> tuple[Loglike, MVAE, Data, dict[str, Any]]:
    """Return the flags (with those of `source`), the model, the examples on its device, and what trained the model."""
    config = cli.parse(description, with_source(Loglike, source))
    origin()  # the commit that the run began with
    device = config.device()
    model, trained = load_model(config.model_path, experiment, build, device)
    return config, model, examples(config.split, config, trained["settings"])[: config.limit].to(device), trained


def estimate(
    config: Loglike,
    model: MVAE,
    data: Data,
    quantities: Mapping[Quantity, Sequence[Modalities]],
    predictions: Mapping[str, Modalities] | None = None,
) -> Evaluation:
    """Estimate the quantities, each with its proposals, and predict modalities; see `mvae.run.evaluate.evaluate`."""
    config.precision = resolve(config.precision, data.device)  # recorded by `report`
    processes = Processes.join(data.device)
    with processes.together():
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
    rows: list[dict[str, Any]] = []
    for (quantity, proposal), one in found.estimates.items():
        names = {"quantity": quantity.name, "proposal": _under(proposal)}
        rows.append({**names, **_summary(one.log_p), "log_weight_variance": one.log_weight_variance.mean().item()})
    others = {name: _summary(values) for name, values in measures.items()}
    n = len(torch.cat([*found.examples.values()]).unique())
    if config.json:
        settings = {name: value for name, value in trained["settings"].items() if not name.endswith("_dir")}
        content = {
            **origin(),
            "checkpoint": str(config.model_path),
            "split": config.split,
            "n_examples": n,
            "n_samples": config.n_samples,
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
    # If examples lack modalities, quantities are over different examples, so their number gets a column.
    own = any(row["n_examples"] != n for row in rows)
    over = f"those of {n} examples that have its modalities" if own else f"{n} examples"
    head = f"{config.split.capitalize()} log-likelihood in nats: mean ± standard error over {over}, {config.n_samples}"
    print(f"{head} importance samples,\nand the variance of the log importance weights (mean over examples).")
    table = [("quantity", "proposal", "log-likelihood", "variance", "examples")]
    for row in rows:
        value, variance = f"{row['mean']:.3f} ± {row['standard_error']:.3f}", f"{row['log_weight_variance']:.2f}"
        table.append((row["quantity"], row["proposal"], value, variance, str(row["n_examples"])))
    left, right = (max(24, 2 + max(map(len, column))) for column in [*zip(*table, strict=True)][:2])
    for name, under, value, variance, examples in table:
        print(f"{name:{left}}{under:{right}}{value:>20}{variance:>12}" + f"{examples:>12}" * own)
    for name, other in others.items():
        text = f"{name}: {other['mean']:.4f} ± {other['standard_error']:.4f}"
        print(text + f", over {other['n_examples']} examples" * own)


def _summary(values: Tensor) -> dict[str, float]:
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error, "n_examples": len(values)}


def write_per_example(found: Evaluation, path: Path) -> None:
    """Write each example's estimates, in nats, with its number in the split, to a .csv or an .npz file.

    There is a column for each quantity and proposal. If an example lacks a modality, a value is empty, or NaN in .npz.
    """
    quantities = [quantity.name for quantity, _ in found.estimates]
    proposals = [_under(proposal) for _, proposal in found.estimates]
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


def _under(proposal: tuple[str, ...]) -> str:
    return f"q(z | {listed(proposal)})" if proposal else "p(z)"
