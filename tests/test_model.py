"""The MVAE: which experts a posterior has, draws, and what is refused."""

import math
from typing import Any

from mvae import MVAE, Bernoulli, UsageError, experts
from mvae.model import evaluating

import pytest
import torch
from torch import Tensor, nn

from helpers import SmallEncoder
from reference import LATENTS, plain_product, small_batch, small_model

N = 7
NAMES = ("m0", "m1", "m2")
SETS = [("m0",), ("m1",), ("m2", "m0"), NAMES]


@pytest.fixture(scope="module")
def model() -> MVAE:
    return small_model(3)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return small_batch(3, N)


@pytest.mark.parametrize("given", SETS)
def test_posterior_is_the_product_of_the_prior_and_the_experts_given(
    model: MVAE, batch: dict[str, Tensor], given: tuple[str, ...]
) -> None:
    q = plain_product([model.encoders[name](batch[name]) for name in given])
    mu, logvar = model.posterior({name: batch[name] for name in given})
    torch.testing.assert_close(mu, q.mean)
    torch.testing.assert_close(logvar, q.variance.log())


def test_posterior_given_nothing_is_the_prior(model: MVAE) -> None:
    mu, logvar = model.posterior({})
    assert mu.tolist() == logvar.tolist() == [[0.0] * LATENTS]


def test_a_label_of_0_is_a_condition(model: MVAE) -> None:
    zero, one = (model.posterior({"m1": torch.tensor([label])})[0] for label in (0, 1))
    assert zero.any()
    assert not torch.equal(zero, one)


def test_absent_examples_have_no_expert(model: MVAE, batch: dict[str, Tensor]) -> None:
    rows = {"m0": [1, 1, 0, 0, 0, 1, 0], "m1": [1, 0, 1, 0, 0, 0, 0]}
    here = {name: torch.tensor(some).bool() for name, some in rows.items()}
    absent = {
        "m0": batch["m0"].masked_fill(~here["m0"].view(N, 1, 1), math.nan),
        "m1": batch["m1"].masked_fill(~here["m1"], -1),
    }
    mask = model.presence(absent, here)
    assert mask.tolist() == [here["m0"].tolist(), here["m1"].tolist(), [False] * N]  # m2 isn't in the batch
    for part in model.encode(absent, mask):
        assert part.shape == (3, N, LATENTS)
        assert torch.equal(part.any(dim=2), mask)
    found = model.posterior(absent, here)
    for row in range(N):
        given = {name: batch[name][row : row + 1] for name in here if here[name][row]}
        for whole, own in zip(found, model.posterior(given), strict=True):
            torch.testing.assert_close(whole[row : row + 1], own)


def test_draws_are_from_the_prior_or_from_the_posterior_of_an_example(model: MVAE, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    z = model.draw({}, 20_000)
    assert z.shape == (20_000, LATENTS)
    assert z.mean(dim=0).abs().max() < 5 / 20_000**0.5
    assert (z.var(dim=0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    for given in SETS:
        example = {name: batch[name][3:4] for name in given}
        for temperature in (1.0, 0.25):
            torch.manual_seed(0)
            z = model.draw(example, 5, temperature)
            torch.manual_seed(0)
            noise = torch.randn(5, LATENTS, dtype=z.dtype)
            torch.testing.assert_close(z, experts.draw(*model.posterior(example), noise, temperature))


def test_evaluation_mode_ends_as_it_was_and_a_frozen_part_stays_frozen() -> None:
    model = small_model(2, batch_norm=True).train()
    model.encoders["m0"].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_latents": 0}, "n_latents must be an integer >= 1, got 0"),
        ({"n_latents": 2.0}, "n_latents must be an integer >= 1, got 2.0"),
        ({"likelihoods": {"x": nn.Linear(2, 6)}}, "x: expected an mvae.Likelihood, got a Linear"),
        ({"encoders": {}, "likelihoods": {}}, "must name the same modalities"),
        ({"likelihoods": {"y": Bernoulli(nn.Identity())}}, r"must name the same modalities, got \['x'\], \['y'\]"),
    ],
)
def test_wrong_model_is_refused(arguments: dict[str, Any], said: str) -> None:
    right = {"encoders": {"x": SmallEncoder(6)}, "likelihoods": {"x": Bernoulli(nn.Linear(2, 6))}, "n_latents": 2}
    with pytest.raises(UsageError, match=said):
        MVAE(**{**right, **arguments})


@pytest.mark.parametrize(
    ("change", "present", "said"),
    [
        ({"m3": torch.zeros(N)}, None, "unknown modality m3; expected m0, m1, m2"),
        ({"m1": torch.zeros(3).long()}, None, "the same number of examples, got m0 7, m1 3"),
        ({}, {"m3": torch.ones(N).bool()}, "unknown modality m3"),
        ({}, {"m1": torch.ones(N)}, r"present\['m1'\] must be torch.bool of shape \(7,\), got torch.float32"),
        ({}, {"m1": torch.ones(3).bool()}, r"present\['m1'\] .* got torch.bool of shape \(3,\)"),
    ],
)
def test_wrong_batch_is_refused(
    model: MVAE, batch: dict[str, Tensor], change: dict[str, Tensor], present: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        model.posterior({"m0": batch["m0"], **change}, present)


@pytest.mark.parametrize(
    ("name", "x", "said"),
    [
        ("m0", torch.full((7, 2, 3), 255.0), "m0: values must be from 0 to 1, got 255.*divide"),
        ("m0", torch.zeros(7, 2, 3).to_sparse(), "m0 must be a dense torch.Tensor .*got torch.sparse_coo"),
        ("m1", torch.tensor([9]), "m1: labels must be from 0 to 3, got 9 to 9"),
        ("m2", torch.full((7, 5), math.inf).double(), "m2: values must be finite"),
    ],
)
def test_posterior_refuses_what_a_run_refuses(model: MVAE, name: str, x: Any, said: str) -> None:
    for use in (model.posterior, lambda given: model.draw(given, 2)):
        with pytest.raises(UsageError, match=said):
            use({name: x})
