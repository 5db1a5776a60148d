"""What a loglike.py prints, and writes to --json and --per-example."""

import argparse
import csv
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..estimators import Evaluation, listed, mean_and_error
from ..files import whole, write_atomically
from .running import is_first, origin

STARTED = time.perf_counter()


def report(
    found: Evaluation, measures: Mapping[str, Tensor], args: argparse.Namespace, trained: Mapping[str, Any]
) -> None:
    """Prints what a loglike.py found, and writes it to --json and --per-example.

    Args:
        measures: further values (n,), by their names.
        trained: what `load_model` says of the model's training.

    Of several processes the first alone does it.
    """
    if not is_first():
        return
    rows: list[dict[str, Any]] = []
    for (quantity, proposal), estimate in found.estimates.items():
        mean, error = mean_and_error(estimate.log_p)
        variance = estimate.log_weight_variance.mean().item()
        row = {"quantity": quantity.name, "proposal": _under(proposal), "mean": mean, "standard_error": error}
        rows.append({**row, "log_weight_variance": variance, "n_examples": len(estimate.log_p)})
    n = len(torch.cat([*found.examples.values()]).unique())
    others = {name: (*mean_and_error(values), len(values)) for name, values in measures.items()}
    if args.json:
        settings = {name: value for name, value in trained["settings"].items() if not name.endswith("_dir")}
        content = {
            **origin(),
            "checkpoint": str(args.model_path),
            "split": args.split,
            "n_examples": n,
            "n_samples": args.n_samples,
            "seed": args.seed,
            "device": "cuda" if args.cuda and torch.cuda.is_available() else "cpu",
            "precision": args.precision,
            "threads": torch.get_num_threads(),
            "jobs": int(os.environ.get("WORLD_SIZE", 1)),
            "torch": torch.__version__,
            "seconds": time.perf_counter() - STARTED,
            "training": {**trained, "settings": settings},
            "log_likelihood": rows,
            "measures": {
                name: {"mean": mean, "standard_error": error, "n_examples": n_of_it}
                for name, (mean, error, n_of_it) in others.items()
            },
        }
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())
    if args.per_example:
        write_per_example(found, args.per_example)
    # Where examples lack modalities, a quantity is of those that have what it needs: their number stands beside it.
    own = len({row["n_examples"] for row in rows} | {n}) > 1
    of_what = (
        f"over {'those of ' * own}{n} examples{' that have what it takes' * own}, {args.n_samples} importance samples"
    )
    print(f"{args.split.capitalize()} log-likelihood in nats: mean ± standard error {of_what},")
    print("and the variance of the log importance weights (mean over examples).")
    widths = [max(24, *(len(row[name]) + 2 for row in rows)) for name in ("quantity", "proposal")]
    heads = f"{'quantity':{widths[0]}}{'proposal':{widths[1]}}{'log-likelihood':>20}{'variance':>12}"
    print(heads + f"{'examples':>12}" * own)
    for row in rows:
        value = f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        names = f"{row['quantity']:{widths[0]}}{row['proposal']:{widths[1]}}"
        print(f"{names}{value:>20}{row['log_weight_variance']:>12.2f}" + f"{row['n_examples']:>12}" * own)
    for name, (mean, error, n_of_it) in others.items():
        print(f"{name}: {mean:.4f} ± {error:.4f}" + f", over {n_of_it} examples" * own)


def write_per_example(found: Evaluation, path: Path) -> None:
    """Writes each example's estimates, in nats, to a .csv or an .npz file. Raises UserError if it can't be written.

    The CSV has a line for each example, which begins with its number in the split, and a column for each quantity and
    proposal. The .npz has `log_p` and `log_weight_variance` (examples, columns), the columns' `quantity` and
    `proposal`, and the examples' numbers as `example`. What an example lacks a modality for is empty, in the .npz not a
    number.
    """
    quantities = [quantity.name for quantity, _ in found.estimates]
    proposals = [_under(proposal) for _, proposal in found.estimates]
    example = torch.cat([*found.examples.values()]).unique()
    log_p, variance = np.full((2, len(example), len(found.estimates)), np.nan)
    for column, (which, estimate) in enumerate(found.estimates.items()):
        rows = torch.searchsorted(example, found.examples[which])
        log_p[rows, column], variance[rows, column] = estimate.log_p, estimate.log_weight_variance
    with whole(path) as file:
        if path.suffix == ".npz":
            columns = np.array(quantities), np.array(proposals)
            values = {"log_p": log_p, "log_weight_variance": variance, "example": example.numpy()}
            np.savez(file, quantity=columns[0], proposal=columns[1], **values)  # type: ignore[arg-type]
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["example", *(f"{name}, {under}" for name, under in zip(quantities, proposals, strict=True))])
        for number, row in zip(example.tolist(), log_p.tolist(), strict=True):
            lines.writerow([number, *("" if np.isnan(value) else value for value in row)])
        text.detach()


def _under(proposal: tuple[str, ...]) -> str:
    return f"q(z | {listed(proposal)})" if proposal else "p(z)"
