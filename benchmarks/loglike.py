"""Measure how log-likelihoods are estimated faster: by sharing draws and decodings, by smaller chunks, and in bfloat16.

`ours` is what loglike.py does for an experiment. Beside it, in turns in one process on one thread, run

    each by itself      every quantity under every proposal, and every prediction, is evaluated alone
    predictions apart   log-likelihoods in one evaluation, and predictions in another
    larger chunks       four times the latents are decoded in one call
    each logarithm      log(1 + exp(l)) is taken of each pixel, as torch's cross-entropy does

A ratio is that of the processor's time in one round. `--bf16` takes what two commands loglike.py --per-example FILE.npz
wrote, of the same examples and noise, with --precision fp32 and bf16, and compares them example by example.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from step import processor
from torch import Tensor
from torch.nn import functional as F

from mvae import MVAE, Data, evaluate, likelihoods
from mvae.estimators import mean_and_error
from mvae.files import write_atomically
from mvae.scripts import machine, running, types

from experiments import EXPERIMENTS, Experiment, build_model


def variants(experiment: Experiment, model: MVAE, data: Data, n_samples: int) -> dict[str, Callable[[], object]]:
    """What takes turns."""
    example, _ = data.batch(torch.zeros(1, dtype=torch.long))
    chunk = 2**20 // max(x.numel() for x in example.values())

    def run(quantities: Any, predictions: Any, max_rows: int | None = None) -> None:
        evaluate(model, data, quantities=quantities, predictions=predictions, n_samples=n_samples, max_rows=max_rows)

    def each_by_itself() -> None:
        for quantity, proposals in experiment.quantities.items():
            for proposal in proposals:
                run({quantity: [proposal]}, {})
        for name, given in experiment.predictions.items():
            run({}, {name: given})

    def predictions_apart() -> None:
        run(experiment.quantities, {})
        run({}, experiment.predictions)

    def each_logarithm() -> None:
        with mock.patch.object(likelihoods, "_BernoulliScore", CrossEntropy):
            run(experiment.quantities, experiment.predictions)

    return {
        "ours": lambda: run(experiment.quantities, experiment.predictions),
        "each by itself": each_by_itself,
        "predictions apart": predictions_apart,
        "larger chunks": lambda: run(experiment.quantities, experiment.predictions, 4 * chunk),
        "each logarithm": each_logarithm,
    }


class CrossEntropy:
    """In place of ours, torch's."""

    @staticmethod
    def apply(logits: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(dim=-1)


def times(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor of each, in each round; the order turns about."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds):
        for name in order:
            started = time.process_time()
            variants[name]()
            found[name].append(time.process_time() - started)
        order.reverse()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="which")
    parser.add_argument("--examples", type=types.positive_int, default=2, help="to evaluate in a turn (default: 2)")
    parser.add_argument("--n-samples", type=types.two_or_more, default=1000, help="draws for each (default: 1000)")
    parser.add_argument("--rounds", type=types.positive_int, default=7, help="turns of each (default: 7)")
    parser.add_argument(
        "--bf16", nargs=2, type=Path, metavar=("FP32", "BF16"), help="what loglike.py --per-example wrote in each"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, too")
    args = parser.parse_args()
    machine.device(argparse.Namespace(threads=1, cuda=False))
    torch.manual_seed(0)
    experiment = EXPERIMENTS[args.experiment]
    model = build_model(args.experiment, experiment.n_latents).eval()
    took = times(variants(experiment, model, experiment.data()[: args.examples], args.n_samples), args.rounds)
    content: dict[str, Any] = {**running.origin(), "experiment": args.experiment, "torch": torch.__version__}
    content |= {"processor": processor(), "ratios": {}}
    for name, seconds in took.items():
        ratios = np.quantile(np.divide(seconds, took["ours"]), [0.25, 0.5, 0.75]).tolist()
        content["ratios"][name] = ratios
        print(f"{name} / ours: {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})", flush=True)
    if args.bf16:
        fp32, bf16 = map(np.load, args.bf16)
        content["bf16 less fp32"] = []
        for i, (quantity, proposal) in enumerate(zip(fp32["quantity"], fp32["proposal"], strict=True)):
            mean, error = mean_and_error(torch.from_numpy(bf16["log_p"][:, i] - fp32["log_p"][:, i]))
            row = {"quantity": str(quantity), "proposal": str(proposal), "mean": mean, "standard_error": error}
            content["bf16 less fp32"].append({**row, "n_examples": len(fp32["log_p"])})
            print(f"{quantity} under {proposal}: {mean:.4f} ± {error:.4f} nats")
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    running.run(main)
