"""The product of Gaussian experts, its KL divergence to the prior, and draws."""

import itertools
import math

from mvae import experts

import pytest
import torch
from torch import Tensor, distributions


def some_experts(
    n: int, *, low: float = -3.0, high: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu, and logvar in [low, high], (n, 20, 5) each, and a random mask (9, n, 20)."""
    generator = torch.Generator().manual_seed(n)
    mu = torch.randn(n, 20, 5, generator=generator, dtype=dtype)
    logvar = low + (high - low) * torch.rand(n, 20, 5, generator=generator, dtype=dtype)
    return mu, logvar, torch.rand(9, n, 20, generator=generator) < 0.6


def exact(mu: Tensor, logvar: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product by its precisions, which don't overflow in float64: mu, logvar, and sum |weight * mu|."""
    precision = (-logvar.double()).exp() * present.unsqueeze(-1)
    total = 1 + precision.sum(dim=1)
    parts = precision * mu.double() / total.unsqueeze(1)
    return parts.sum(dim=1), -total.log(), parts.abs().sum(dim=1)


def assert_right_in_float32(mu: Tensor, logvar: Tensor, present: Tensor) -> None:
    found_mu, found_logvar = experts.product(mu, logvar, present)
    expected_mu, expected_logvar, scale = exact(mu, logvar, present)
    assert found_mu.dtype == found_logvar.dtype == torch.float32
    assert ((found_mu - expected_mu).abs() <= 1e-5 * scale).all()
    assert ((found_logvar - expected_logvar).abs() <= 2e-7 * (1 + expected_logvar.abs())).all()


@pytest.mark.parametrize("n", [1, 2, 6, 19])
def test_product_is_right_from_minus_80_to_80_in_float32(n: int) -> None:
    assert_right_in_float32(*some_experts(n, low=-80, high=80, dtype=torch.float32))
    if n == 2:
        corners = list(itertools.product([-80.0, -79.9, -17.0, -1e-3, 0.0, 16.0, 80.0], repeat=2))
        logvar = torch.tensor(corners).T.unsqueeze(-1)
        mu = torch.tensor([[[1.5]], [[-2.5]]]).expand_as(logvar)
        both_and_first = torch.tensor([[[True], [True]], [[True], [False]]])
        assert_right_in_float32(mu, logvar, both_and_first.expand(2, 2, len(corners)))


def test_gradients_of_the_product_are_right_from_minus_80_to_80_in_float32() -> None:
    mu, logvar, present = some_experts(6, low=-80, high=80, dtype=torch.float32)
    leaves = mu.requires_grad_(), logvar.requires_grad_()
    found = torch.autograd.grad(torch.cat(experts.product(mu, logvar, present)).sum(), leaves)
    expected = torch.autograd.grad(torch.cat(exact(mu, logvar, present)[:2]).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_product_is_the_product_of_densities() -> None:
    mu, logvar, present = (part[:, :4, :1] if part.is_floating_point() else part[..., :4] for part in some_experts(3))
    found_mu, found_logvar = experts.product(mu, logvar, present)
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    standard = distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for term, row in itertools.product(range(len(present)), range(4)):
        density = standard.log_prob(x).exp()
        for m in range(3):
            if present[term, m, row]:
                density = density * distributions.Normal(mu[m, row], (logvar[m, row] / 2).exp()).log_prob(x).exp()
        found = distributions.Normal(found_mu[term, row], (found_logvar[term, row] / 2).exp()).log_prob(x).exp()
        torch.testing.assert_close(found, density / torch.trapezoid(density, x), rtol=1e-9, atol=1e-12)


def test_product_without_experts_is_exactly_the_prior() -> None:
    mu, logvar, present = some_experts(6)
    found = experts.product(mu, logvar, torch.zeros_like(present))
    assert all(torch.equal(part, torch.zeros(9, 20, 5, dtype=torch.float64)) for part in found)
    assert torch.equal(experts.kl_to_prior(*found), torch.zeros(9, 20, dtype=torch.float64))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_absent_experts_may_hold_any_values(garbage: float) -> None:
    mu, logvar, present = some_experts(4)
    present[:, :, 0] = torch.tensor([True, False, True, False])  # an example whose absent experts no term takes
    expected = experts.product(mu, logvar, present)
    mu[1::2, 0], logvar[1::2, 0] = garbage, garbage
    leaves = mu.requires_grad_(), logvar.requires_grad_()
    found = experts.product(mu, logvar, present)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for gradient in torch.autograd.grad(found[0].sum() + found[1].sum(), leaves):
        assert gradient.isfinite().all()
        assert (gradient[1::2, 0] == 0).all()


def test_masks_broadcast_and_leave_experts_out() -> None:
    mu, logvar, present = some_experts(5)
    chosen = torch.tensor([True, False, True, True, False])
    few = experts.product(mu[chosen], logvar[chosen])
    torch.testing.assert_close(experts.product(mu, logvar, chosen.view(1, 5, 1)), few, rtol=1e-14, atol=1e-14)
    found, whole = (experts.product(mu, logvar, mask) for mask in (present[..., :1], present[..., :1].expand(9, 5, 20)))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_one_precise_expert_dominates() -> None:
    mu, logvar, present = some_experts(6, dtype=torch.float32)
    logvar[2], present[:, 2] = -80, True
    found_mu, found_logvar = experts.product(mu, logvar, present)
    assert torch.equal(found_mu, mu[2].expand_as(found_mu))
    assert (found_logvar == -80).all()


def test_kl_to_prior_and_log_standard_normal_are_torchs() -> None:
    mu, logvar, _ = some_experts(3, low=-20, high=5)
    prior = distributions.Normal(torch.zeros_like(mu), 1.0)
    expected = distributions.kl_divergence(distributions.Normal(mu, (logvar / 2).exp()), prior).sum(dim=-1)
    torch.testing.assert_close(experts.kl_to_prior(mu, logvar), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(experts.log_standard_normal(mu), prior.log_prob(mu).sum(dim=-1))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_draw_has_the_mean_and_the_variance_times_the_temperature(temperature: float) -> None:
    mu, logvar = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-2.0, 0.0, 1.5])
    n = 100_000
    z = experts.draw(mu, logvar, torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), temperature)
    assert ((z.mean(dim=0) - mu).abs() < 4 * (logvar / 2).exp() / math.sqrt(n)).all()
    assert ((z.var(dim=0).log() - logvar - math.log(temperature)).abs() < 4 * math.sqrt(2 / n)).all()
