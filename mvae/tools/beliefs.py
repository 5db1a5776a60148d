"""What a model believes given some modalities: samples, the values it expects, which expert decides, and bounds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import experts
from ..estimators import log_likelihood
from ..model import MVAE, Batch
from .kinds import Controls, Picture

N_DRAWS = 100
"""Draws of z for what is expected, and importance samples for a bound."""


class Beliefs(NamedTuple):
    """What `believe` finds.

    samples: the means of n draws, by control (n, *event).
    expected: of each control that is no picture, its values in words and their probabilities.
    shares: "prior" and each modality given, its share of the posterior's precision in each latent, (latents,); they sum
        to 1.
    widths: of each modality given, and of the posterior under "all", the geometric mean over the latents of its
        standard deviation.
    elbo, log_p: two bounds on log p(what is given) in nats, the second by importance sampling and the tighter one; 0 if
        nothing is given.
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
    """What the model believes of one example, of which some modalities are given.

    Args:
        given: a batch of one example; nothing gives the prior.
        n: samples.
        temperature: multiplies the variance of z, for the samples alone.
        shifts: by the number of a latent, what is added to it in every sample.
    """
    device = next(model.parameters()).device
    given = {name: given[name].to(device) for name in model.modalities if name in given}
    names = tuple(given)
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, model.n_latents, generator=rng).to(device)
    more = torch.randn(N_DRAWS, 1, model.n_latents, generator=rng).to(device)
    mu = logvar = torch.zeros(1, model.n_latents, device=device)
    shares, widths = {"prior": torch.ones(model.n_latents)}, {}
    if names:
        expert_mu, expert_logvar = model.encode(given)
        everything = torch.ones(1, len(names), 1, dtype=torch.bool, device=device)
        mu, logvar = (part[0] for part in model.fuse(expert_mu, expert_logvar, everything))
        precision = torch.cat([torch.zeros_like(mu), -expert_logvar[:, 0]])  # of the prior 1, in log space
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
        if not isinstance(kind, Picture)
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
def strongest(model: MVAE, controls: Controls, n: int) -> Sequence[int]:
    """The n latents that change the first control's mean most, from one standard deviation of the prior to the other.

    That is the mean of the absolute differences between z = e and z = -e, the rest of z being zero.
    """
    name, kind = next(iter(controls.items()))
    ends = torch.eye(model.n_latents, device=next(model.parameters()).device)
    up, down = (kind.join(model.mean(z, kind.modalities(name)), name) for z in (ends, -ends))
    return (up - down).abs().flatten(1).mean(dim=1).argsort(descending=True)[:n].tolist()
