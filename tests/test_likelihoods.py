"""p(x | z): normalised log-probabilities, means that samples approach, and stacked latents."""

import itertools
import math
from typing import Any

from mvae import Bernoulli, Categorical, Distribution, Gaussian, Likelihood, UsageError

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from reference import CLASSES, LATENTS, distribution, small_batch, small_model

KINDS = ["m0", "m1", "m2"]  # Bernoulli, Categorical, Gaussian


def likelihood_of(kind: str, *, batch_norm: bool = False) -> Likelihood:
    """Return one of those of `small_model`, with larger weights, so that z matters."""
    found = small_model(3, batch_norm=batch_norm).likelihood(kind)
    for layer in found.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 3
    return found.eval()


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# log_prob


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_and_mean_are_torchs_also_for_stacked_latents(kind: str) -> None:
    found, x = likelihood_of(kind), small_batch(3, 7)[kind]
    for leading in ((), (4,), (2, 3)):
        z = latents(*leading, 7)
        each = [distribution(found, part) for part in z.reshape(-1, 7, LATENTS)]
        log_prob = torch.stack([p.log_prob(x) for p in each]).reshape(*leading, 7)
        mean = torch.stack([p.probs if isinstance(p, torch.distributions.Categorical) else p.mean for p in each])
        torch.testing.assert_close(found.log_prob(z, x), log_prob, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.mean(z), mean.reshape(*leading, *mean.shape[1:]))


def test_a_value_may_be_a_single_number() -> None:
    z, x = torch.randn(4, 7, 1).double(), torch.randn(7).double()
    found = Gaussian(nn.Flatten(0), std=0.5).log_prob(z, x)
    torch.testing.assert_close(found, torch.distributions.Normal(z.squeeze(2), 0.5).log_prob(x))


def test_extreme_logits_of_a_label_are_scored_without_overflow() -> None:
    z = torch.tensor([[300.0, -300.0]])
    assert Categorical(nn.Identity()).log_prob(z, torch.tensor([1])).item() == -600


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(dim=-1)


def test_bernoulli_scores_of_grey_values_and_their_gradients_are_the_cross_entropys() -> None:
    torch.manual_seed(0)
    for n, scale in itertools.product([1, 2, 3, 15, 16, 17, 784], [0.1, 10.0, 1000.0]):
        z, x = torch.randn(2, 3, n) * scale, torch.rand(3, n)
        x[0] = x[0].round()
        z[0, 1] = 0.0
        found, gradients = list[Tensor](), list[Tensor]()
        for dtype, score in ((torch.float32, Bernoulli(nn.Identity()).log_prob), (torch.float64, cross_entropy)):
            latents = z.to(dtype, copy=True).requires_grad_()
            log_p = score(latents, x.to(dtype))
            assert log_p.dtype == dtype
            found.append(log_p.double())
            gradients += torch.autograd.grad((log_p * torch.tensor([[1.0], [-2.0]])).sum(), latents)
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)


def test_bernoulli_scores_have_second_derivatives() -> None:
    torch.manual_seed(0)
    z, x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True), torch.rand(3, 20, dtype=torch.float64)
    score = Bernoulli(nn.Identity()).log_prob
    assert torch.autograd.gradgradcheck(lambda z: score(z, x), z)


def test_scores_are_float32_or_better() -> None:
    for kind, x in small_batch(3, 7).items():
        found = likelihood_of(kind).to(torch.bfloat16)
        assert found.log_prob(latents(7).bfloat16(), x.float() if x.is_floating_point() else x).dtype == torch.float32


def test_standard_deviation_must_be_positive() -> None:
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="std must be a number > 0"):
            Gaussian(nn.Identity(), std=std)


def test_a_standard_deviation_is_learned() -> None:
    """The best one for data of a standard deviation 0.1 around the mean is 0.1; each value may have its own."""
    torch.manual_seed(0)
    z = 0.1 * torch.tensor([1.0, 3.0]) * torch.randn(5000, 2)
    for initial, expected in ((torch.tensor(1.0), z.square().mean().sqrt()), (torch.ones(2), z.std(dim=0))):
        found = Gaussian(nn.Identity(), std=nn.Parameter(initial))
        optimizer = torch.optim.LBFGS(found.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss(found: Gaussian = found, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = -found.log_prob(z, torch.zeros_like(z)).mean()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.as_tensor(found.std), expected, rtol=1e-2, atol=0)
        nats = torch.distributions.Normal(z, found.std).log_prob(torch.zeros_like(z)).sum(dim=1)
        torch.testing.assert_close(found.log_prob(z, torch.zeros_like(z)), nats)


OF = {
    "Laplace": (lambda out: torch.distributions.Laplace(out, 0.5), torch.randn(7, 2), None),
    "Normal": (lambda out: torch.distributions.Normal(out[..., :1], out[..., 1:].exp()), torch.randn(7, 1), None),
    "Poisson": (lambda out: torch.distributions.Poisson(out.exp()), torch.ones(7, 2), -torch.ones(7, 2)),
    "NegativeBinomial": (lambda out: torch.distributions.NegativeBinomial(5.0, logits=out), torch.ones(7, 2), None),
    "ContinuousBernoulli": (
        lambda out: torch.distributions.ContinuousBernoulli(logits=out),
        torch.rand(7, 2),
        torch.full((7, 2), 1.5),
    ),
}


@pytest.mark.parametrize(("of", "x", "wrong"), OF.values(), ids=OF)
def test_a_likelihood_has_any_distribution_of_torchs(of: Any, x: Tensor, wrong: Tensor | None) -> None:
    found, z = Distribution(nn.Linear(LATENTS, 2), of), torch.randn(3, 7, LATENTS)
    p = of(found.decoder(z))
    torch.testing.assert_close(found.log_prob(z, x), p.log_prob(x).sum(dim=2))
    torch.testing.assert_close(found.mean(z), p.mean)
    assert found.sample(z).shape == p.mean.shape
    found.check(x, z[0])
    for bad in (x[:, :0], *([] if wrong is None else [wrong])):
        with pytest.raises(UsageError, match="must"):
            found.check(bad, z[0])
    with pytest.raises(UsageError, match="temperature must be 1 for a"):
        found.sample(z, temperature=0.5)


# sample


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_density_to_the_power_of_one_over_the_temperature(kind: str) -> None:
    """At 0.25: odds to the power of 4, or a quarter of the variance."""
    found, n, z = likelihood_of(kind), 20_000, latents(2)
    torch.manual_seed(0)
    for temperature in (1.0, 0.25):
        with torch.no_grad():
            samples, mean = found.sample(z.expand(n, 2, LATENTS), temperature), found.mean(z)
        std = torch.full_like(mean, 0.7 * temperature**0.5)
        if isinstance(found, Categorical):
            assert samples.shape == (n, 2)
            samples = functional.one_hot(samples, CLASSES).double()
        if not isinstance(found, Gaussian):
            power = mean ** (1 / temperature)
            of_all = power.sum(dim=-1, keepdim=True)
            mean = power / (power + (1 - mean) ** (1 / temperature) if isinstance(found, Bernoulli) else of_all)
            std = (mean * (1 - mean)).sqrt()
        assert samples.shape == (n, *mean.shape)
        assert ((samples.mean(dim=0) - mean).abs() < 4 * std / math.sqrt(n) + 1e-3).all()
        assert ((samples.std(dim=0) - std).abs() < 0.02).all()


# Decoding


def test_all_terms_are_decoded_in_one_call() -> None:
    found, z = likelihood_of("m0", batch_norm=True).train(), latents(2, 3, 7)
    expected = found.decoder(z.reshape(-1, LATENTS))
    rows: list[int] = []
    found.decoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    torch.testing.assert_close(found.decode(z), expected.reshape(2, 3, 7, *expected.shape[1:]))
    assert rows == [42]
