"""Totals: sums that become one vector and back, means by name, and which parts aren't finite."""

from mvae.objective import Totals

import pytest
import torch
from torch import Tensor

TERMS, MODALITIES = ("joint", "x", "y", "empty", "subset", "subset"), ("x", "y")


def totals(**changed: Tensor) -> Totals:
    """Return the sums of 10 examples: one lacks x, five lack y; six are in the second random subset."""
    parts: dict[str, Tensor] = {
        "loss": torch.tensor(50.0),
        "n": torch.tensor(10.0),
        "log_prob": -torch.tensor([[18.0, 10.0], [27.0, 0.0], [0.0, 5.0], [0.0, 0.0], [9.0, 20.0], [0.0, 0.0]]),
        "n_log_prob": torch.tensor([[9, 5], [9, 0], [0, 5], [0, 0], [9, 5], [0, 0]]),
        "kl": torch.tensor([20.0, 9.0, 10.0, 0.0, 30.0, 12.0]),
        "n_kl": torch.tensor([10, 9, 5, 0, 10, 6]),
    }
    return Totals(TERMS, MODALITIES, **parts | changed)


def test_vectors_add_up_and_become_totals_again() -> None:
    vector = totals().vector()
    assert vector.dtype == torch.float64
    found = Totals.of(vector + vector, TERMS, MODALITIES)
    assert found[:2] == totals()[:2]
    for part, expected in zip(found[2:], totals()[2:], strict=True):
        assert torch.equal(part, 2 * expected.double())


def test_means_are_over_the_examples_that_contribute() -> None:
    found = totals().means()
    expected = {
        "loss": 50 / 10,
        "joint/elbo": (-18 - 10 - 20) / 10, "joint/kl": 20 / 10, "joint/log_prob/x": -2, "joint/log_prob/y": -2,
        "x/elbo": (-27 - 9) / 9, "x/kl": 1, "x/log_prob/x": -3,
        "y/elbo": (-5 - 10) / 5, "y/kl": 2, "y/log_prob/y": -1,
        "subset/elbo": (-9 - 20 - 30 - 12) / 16, "subset/kl": 42 / 16,
        "subset/log_prob/x": -1, "subset/log_prob/y": -4,
    }  # fmt: skip
    assert found == pytest.approx(expected)
