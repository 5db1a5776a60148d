"""What a loglike.py prints, and writes to --json."""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..estimators import Evaluation, listed, mean_and_error
from ..files import write_atomically
from .flags import origin

STARTED = time.perf_counter()


def report(
    found: Evaluation, measures: Mapping[str, Tensor], args: argparse.Namespace, trained: Mapping[str, Any]
) -> None:
    """Prints what a loglike.py found, and writes it to --json.

    Args:
        measures: further values (n,), by their names.
        trained: what `load_model` says of the model's training.
    """
    rows: list[dict[str, Any]] = []
    for (quantity, proposal), estimate in found.estimates.items():
        mean, error = mean_and_error(estimate.log_p)
        variance = estimate.log_weight_variance.mean().item()
        under = f"q(z | {listed(proposal)})" if proposal else "p(z)"
        row = {"quantity": quantity.name, "proposal": under, "mean": mean, "standard_error": error}
        rows.append({**row, "log_weight_variance": variance})
    n = len(next(iter(found.estimates.values())).log_p)
    others = {name: mean_and_error(values) for name, values in measures.items()}
    if args.json:
        settings = {name: value for name, value in trained["settings"].items() if not name.endswith("_dir")}
        content = {
            **origin(),
            "checkpoint": str(args.model_path),
            "n_examples": n,
            "n_samples": args.n_samples,
            "seed": args.seed,
            "device": "cuda" if args.cuda and torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": time.perf_counter() - STARTED,
            "training": {**trained, "settings": settings},
            "log_likelihood": rows,
            "measures": {name: {"mean": mean, "standard_error": error} for name, (mean, error) in others.items()},
        }
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())
    print(f"Test log-likelihood in nats: mean ± standard error over {n} examples, {args.n_samples} importance samples,")
    print("and the variance of the log importance weights (mean over examples).")
    widths = [max(24, *(len(row[name]) + 2 for row in rows)) for name in ("quantity", "proposal")]
    print(f"{'quantity':{widths[0]}}{'proposal':{widths[1]}}{'log-likelihood':>20}{'variance':>12}")
    for row in rows:
        value = f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        names = f"{row['quantity']:{widths[0]}}{row['proposal']:{widths[1]}}"
        print(f"{names}{value:>20}{row['log_weight_variance']:>12.2f}")
    for name, (mean, error) in others.items():
        print(f"{name}: {mean:.4f} ± {error:.4f}")
