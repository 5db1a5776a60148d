"""p(x | z): normalised log-probabilities, means that samples approach, and stacked latents."""

import itertools
import math

from mvae import Bernoulli, Categorical, Gaussian, Likelihood, UsageError

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


def test_probabilities_of_all_values_sum_to_one() -> None:
    z = latents(7)
    classes = [likelihood_of("m1").log_prob(z, torch.full((7,), c)) for c in range(CLASSES)]
    pictures = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(64, 2, 3)
    binary = [likelihood_of("m0").log_prob(z, picture.expand(7, 2, 3)) for picture in pictures]
    for log_probs in (classes, binary):
        torch.testing.assert_close(torch.stack(log_probs).exp().sum(dim=0), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_and_mean_are_torchs(kind: str) -> None:
    found, z, x = likelihood_of(kind), latents(7), small_batch(3, 7)[kind]
    p = distribution(found, z)
    torch.testing.assert_close(found.log_prob(z, x), p.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean(z), p.probs if isinstance(p, torch.distributions.Categorical) else p.mean)


def test_a_value_may_be_a_single_number() -> None:
    z, x = torch.randn(4, 7, 1).double(), torch.randn(7).double()
    found = Gaussian(nn.Flatten(0), std=0.5).log_prob(z, x)
    torch.testing.assert_close(found, torch.distributions.Normal(z.squeeze(2), 0.5).log_prob(x))


def test_extreme_logits_are_scored_without_overflow() -> None:
    identity, z = nn.Identity(), torch.tensor([[300.0, -300.0]])
    assert Bernoulli(identity).log_prob(z, torch.tensor([[0.0, 0.0]])).item() == -300
    assert Categorical(identity).log_prob(z, torch.tensor([1])).item() == -600


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(dim=-1)


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 784])
@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_bernoulli_scores_of_grey_values_and_their_gradients_are_the_cross_entropys(n: int, scale: float) -> None:
    torch.manual_seed(0)
    z, x = torch.randn(2, 3, n) * scale, torch.rand(3, n)
    x[0] = x[0].round()
    z[0, 1] = 0.0
    found, gradients = [], []
    for dtype, score in ((torch.float32, Bernoulli(nn.Identity()).log_prob), (torch.float64, cross_entropy)):
        latents = z.clone().to(dtype).requires_grad_()
        log_p = score(latents, x.to(dtype))
        (log_p * torch.tensor([[1.0], [-2.0]])).sum().backward()
        assert log_p.dtype == dtype
        found.append(log_p.detach().double())
        assert latents.grad is not None
        gradients.append(latents.grad.double())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_bernoulli_scores_have_second_derivatives() -> None:
    torch.manual_seed(0)
    z, x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True), torch.rand(3, 20, dtype=torch.float64)
    score = Bernoulli(nn.Identity()).log_prob
    assert torch.autograd.gradcheck(lambda z: score(z, x), z)
    assert torch.autograd.gradgradcheck(lambda z: score(z, x), z)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_float32_or_better(kind: str) -> None:
    found, x = likelihood_of(kind).to(torch.bfloat16), small_batch(3, 7)[kind]
    assert found.log_prob(latents(7).bfloat16(), x.float() if x.is_floating_point() else x).dtype == torch.float32


def test_standard_deviation_must_be_positive() -> None:
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="std must be > 0"):
            Gaussian(nn.Identity(), std=std)


# sample


@pytest.mark.parametrize("kind", KINDS)
def test_samples_approach_the_mean(kind: str) -> None:
    found, n, z = likelihood_of(kind), 20_000, latents(2)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = found.sample(z.expand(n, 2, LATENTS))
        mean = found.mean(z)
    if isinstance(found, Categorical):
        assert samples.shape == (n, 2)
        samples = functional.one_hot(samples, CLASSES).double()
    std = torch.full_like(mean, 0.7) if isinstance(found, Gaussian) else (mean * (1 - mean)).sqrt()
    assert samples.shape == (n, *mean.shape)
    assert ((samples.mean(dim=0) - mean).abs() < 4 * std / math.sqrt(n)).all()
    assert ((samples.std(dim=0) - std).abs() < 0.02).all()


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_is_a_power_of_the_density(kind: str) -> None:
    """p(x)^4 normalised: odds to the power of 4, or a quarter of the variance."""
    found, n, z = likelihood_of(kind), 20_000, latents(1)
    torch.manual_seed(0)
    with torch.no_grad():
        samples, mean = found.sample(z.expand(n, 1, LATENTS), temperature=0.25), found.mean(z)
    if isinstance(found, Gaussian):
        assert ((samples.std(dim=0) - 0.35).abs() < 0.02).all()
        return
    if isinstance(found, Categorical):
        samples, others = functional.one_hot(samples, CLASSES).double(), mean.pow(4).sum(dim=-1, keepdim=True)
    else:
        others = mean.pow(4) + (1 - mean).pow(4)
    assert (samples.mean(dim=0) - mean.pow(4) / others).abs().max() < 0.02


# Stacked latents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_stacked_latents_are_scored_as_one_by_one(kind: str, leading: tuple[int, ...]) -> None:
    found, z, x = likelihood_of(kind), latents(*leading, 7), small_batch(3, 7)[kind]
    each = z.reshape(-1, 7, LATENTS)
    log_prob = torch.stack([found.log_prob(part, x) for part in each])
    mean = torch.stack([found.mean(part) for part in each])
    torch.testing.assert_close(found.log_prob(z, x), log_prob.reshape(*leading, *log_prob.shape[1:]))
    torch.testing.assert_close(found.mean(z), mean.reshape(*leading, *mean.shape[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_terms_are_decoded_in_one_call(kind: str) -> None:
    found, z = likelihood_of(kind, batch_norm=True).train(), latents(2, 3, 7)
    expected = found.decoder(z.reshape(-1, LATENTS))
    rows: list[int] = []
    found.decoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    torch.testing.assert_close(found.decode(z), expected.reshape(2, 3, 7, *expected.shape[1:]))
    assert rows == [42]
