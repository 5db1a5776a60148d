"""Measure what makes log-likelihoods fast: shared samples and decodings, small chunks, a fused logarithm.

`ours` is what loglike.py does for an experiment. The alternatives take turns with it in one process on one thread:

    each by itself      every quantity under every proposal, and every prediction, is evaluated separately
    predictions apart   log-likelihoods in one evaluation, predictions in another
    larger chunks       four times the latents are decoded in one call
    each logarithm      log(1 + exp(l)) is taken of each pixel, as in torch's cross-entropy

A ratio is that of the CPU time in one round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from mvae import cli, evaluate, likelihoods

import numpy as np
import torch
from common import about, in_turns, quartiles, spread, write
from step import Setting, prepare
from torch import Tensor
from torch.nn import functional as F

from experiments import EXPERIMENTS, Name, build_model


@dataclass(kw_only=True)
class Config:
    experiment: Name  # experiment to measure

    examples: int = 2  # examples to evaluate in a turn
    n_samples: int = 1000  # importance samples per example
    rounds: int = 7  # turns of each
    json: Path | None = None  # file for the numbers


class CrossEntropy:
    """torch's score, in place of ours."""

    @staticmethod
    def apply(logits: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(dim=-1)


def variants(config: Config) -> dict[str, Callable[[], object]]:
    """Return ours and the alternatives."""
    experiment, data = EXPERIMENTS[config.experiment], prepare(config.experiment, Setting())[: config.examples]
    model = build_model(config.experiment, experiment.n_latents)
    example, _ = data.batch(torch.zeros(1, dtype=torch.long))
    chunk = 2**20 // max(x.numel() for x in example.values())

    def run(
        quantities: Any = experiment.quantities, predictions: Any = experiment.predictions, rows: Any = None
    ) -> None:
        evaluate(model, data, quantities=quantities, predictions=predictions, n_samples=config.n_samples, max_rows=rows)

    def each_by_itself() -> None:
        for quantity, proposals in experiment.quantities.items():
            for proposal in proposals:
                run({quantity: [proposal]}, {})
        for name, given in experiment.predictions.items():
            run({}, {name: given})

    def each_logarithm() -> None:
        with mock.patch.object(likelihoods, "_BernoulliScore", CrossEntropy):
            run()

    return {
        "ours": run,
        "each by itself": each_by_itself,
        "predictions apart": lambda: (run(predictions={}), run({})),
        "larger chunks": lambda: run(rows=4 * chunk),
        "each logarithm": each_logarithm,
    }


def main() -> None:
    config = cli.parse(__doc__, Config)
    seconds = in_turns(variants(config), config.rounds)
    ratios = {name: quartiles(np.divide(found, seconds["ours"])) for name, found in seconds.items()}
    for name, found in ratios.items():
        print(f"{name} / ours: {spread(found)}")
    write(config.json, {**about(), "experiment": config.experiment, "ratios": ratios})


if __name__ == "__main__":
    cli.run(main)
