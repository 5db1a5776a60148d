"""What a model infers from some modalities: samples, expected values, each expert's share, and bounds."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import experts
from ..estimators import log_likelihood
from ..model import MVAE, Batch
from .controls import Controls

N_DRAWS = 100  # draws of z for expected values, and importance samples for a bound


class Beliefs(NamedTuple):
    """Result of `believe`.

    samples: means of n draws, by control (n, *event).
    expected: for each control that isn't drawn, values as text and their probabilities.
    shares: for "prior" and each modality given, its share of the posterior's precision, (latents,); they sum to 1.
    widths: for each modality given, and for the posterior as "all", the geometric mean over the latents of its standard
        deviation.
    elbo, log_p: two bounds on log p(modalities given) in nats, log_p by importance sampling and tighter; 0 if nothing
        is given.
    """

    samples: dict[str, Tensor]
    expected: dict[str, list[tuple[str, float]]]
    shares: dict[str, Tensor]
    widths: dict[str, float]
    elbo: float
    log_p: float


@torch.no_grad()
def believe(
    model: MVAE,
    controls: Controls,
    given: Batch,
    *,
    n: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    shifts: Mapping[int, float] | None = None,
) -> Beliefs:
    """Condition the model on some modalities of one example.

    Args:
        given: a batch of one example; an empty one gives the prior.
        n: number of samples.
        temperature: multiplies the variance of z, in the samples only.
        shifts: by the number of a latent, what is added to it in every sample.
    """
    device = next(model.parameters()).device
    given = {name: given[name].to(device) for name in model.modalities if name in given}
    names = tuple(given)
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, model.n_latents, generator=rng).to(device)
    more = torch.randn(N_DRAWS, 1, model.n_latents, generator=rng).to(device)
    mu, logvar = model.posterior(given)
    shares, widths = {"prior": torch.ones(model.n_latents)}, {}
    if names:
        present = model.presence(given)
        expert_logvar = model.encode(given, present)[1][present]  # (names, latents)
        precision = torch.cat([torch.zeros_like(mu), -expert_logvar])  # of the prior 1, in log space
        shares = dict(zip(("prior", *names), precision.softmax(dim=0).cpu(), strict=True))
        widths = {name: _width(one) for name, one in zip(names, expert_logvar, strict=True)}
    widths["all"] = _width(logvar)
    z = experts.draw(mu, logvar, noise, temperature)
    for latent, shift in (shifts or {}).items():
        z[:, latent] += shift
    samples = {name: kind.join(model.mean(z, kind.modalities(name)), name) for name, kind in controls.items()}
    draws = experts.draw(mu, logvar, more[:, 0])
    expected = {
        name: kind.probabilities(kind.join(model.mean(draws, kind.modalities(name)), name))
        for name, kind in controls.items()
        if not kind.size
    }
    elbo = log_p = 0.0
    if names:
        scores = model.log_prob(draws.unsqueeze(1), given, [names] * N_DRAWS)
        elbo = (scores.sum() / N_DRAWS - experts.kl_to_prior(mu, logvar)).item()
        log_p = log_likelihood(model, given, proposal=names, targets=[names], noise=more)[names].log_p.item()
    return Beliefs(samples, expected, shares, widths, elbo, log_p)


def _width(logvar: Tensor) -> float:
    return (0.5 * logvar.mean()).exp().item()


@torch.no_grad()
def strongest(model: MVAE, controls: Controls, n: int) -> list[int]:
    """Return the n latents that change the first control's mean most, by one standard deviation of the prior each way.

    The change is the mean absolute difference between z = e and z = -e, with the rest of z at zero.
    """
    name, kind = next(iter(controls.items()))
    ends = torch.eye(model.n_latents, device=next(model.parameters()).device)
    up, down = (kind.join(model.mean(z, kind.modalities(name)), name) for z in (ends, -ends))
    return (up - down).abs().flatten(1).mean(dim=1).argsort(descending=True)[:n].tolist()
