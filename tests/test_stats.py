"""Totals: sums that become one vector and come back, means by flat names, and what isn't finite."""

import math

import pytest
import torch
from torch import Tensor

from mvae.stats import Totals

TERMS, MODALITIES = ("joint", "x", "y", "subset", "subset"), ("x", "y")


def totals(**changed: Tensor) -> Totals:
    """Of 10 examples: one lacks x, five lack y; the second random subset is given to nobody."""
    parts: dict[str, Tensor] = {
        "loss": torch.tensor(50.0),
        "n": torch.tensor(10.0),
        "log_prob": -torch.tensor([[18.0, 10.0], [27.0, 0.0], [0.0, 5.0], [9.0, 20.0], [0.0, 0.0]]),
        "n_log_prob": torch.tensor([[9, 5], [9, 0], [0, 5], [9, 5], [0, 0]]),
        "kl": torch.tensor([20.0, 9.0, 10.0, 30.0, 0.0]),
        "n_kl": torch.tensor([10, 9, 5, 10, 0]),
    }
    return Totals(TERMS, MODALITIES, **parts | changed)


def assert_equal(found: Totals, expected: Totals) -> None:
    assert found[:2] == expected[:2]
    for part, expected_part in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(part, expected_part.double())


def test_totals_come_back_from_their_vector() -> None:
    assert_equal(Totals.of(totals().vector(), TERMS, MODALITIES), totals())


def test_vector_is_float64() -> None:
    assert totals().vector().dtype == torch.float64


def test_vectors_of_two_batches_add_up_to_that_of_both() -> None:
    whole = Totals.of(totals().vector() + totals().vector(), TERMS, MODALITIES)
    assert_equal(whole, Totals(TERMS, MODALITIES, *(2 * part for part in totals()[2:])))


def test_zeros_change_no_sum() -> None:
    nothing = Totals.zeros(TERMS, MODALITIES)
    assert_equal(Totals.of(nothing.vector() + totals().vector(), TERMS, MODALITIES), totals())


def test_means_are_over_the_examples_that_have_a_share() -> None:
    found = totals().means()
    assert found["loss"] == 50 / 10
    assert found["joint/elbo"] == pytest.approx((-18 - 10 - 20) / 10)
    assert found["joint/kl"] == 20 / 10
    assert found["joint/log_prob/x"] == -18 / 9
    assert found["joint/log_prob/y"] == -10 / 5
    assert found["x/elbo"] == pytest.approx((-27 - 9) / 9)


def test_means_sum_the_random_subsets_up() -> None:
    found = totals(n_kl=torch.tensor([10, 9, 5, 10, 6]), kl=torch.tensor([20.0, 9.0, 10.0, 30.0, 12.0])).means()
    assert found["subset/kl"] == pytest.approx((30 + 12) / (10 + 6))
    assert found["subset/elbo"] == pytest.approx((-9 - 20 - 30 - 12) / (10 + 6))


def test_means_leave_out_what_nobody_has() -> None:
    found = totals(n_kl=torch.tensor([10, 9, 0, 10, 0]), n_log_prob=torch.zeros(5, 2)).means()
    assert set(found) == {"loss", *(f"{term}/{part}" for term in ("joint", "x", "subset") for part in ("elbo", "kl"))}


def test_finite_totals_have_nothing_that_is_not_finite() -> None:
    assert totals().not_finite() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_single_terms_are_named_before_the_joint_one(bad: float) -> None:
    log_prob, kl = torch.zeros(5, 2), torch.zeros(5)
    log_prob[[0, 2, 4], 1] = bad
    kl[:2] = bad
    assert totals(log_prob=log_prob, kl=kl, loss=torch.tensor(bad)).not_finite() == [
        "log p of y in term y",
        "log p of y in term joint",
        "log p of y in term subset",
        "KL in term x",
        "KL in term joint",
        "the loss",
    ]
