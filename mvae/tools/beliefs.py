"""What a model infers from some modalities of one example: each expert's share, bounds, and probabilities of values.

Here `given` is a batch of one example, with the modalities that are given.
"""

import collections

import torch
from torch import Tensor

from .. import experts
from ..estimators import log_likelihood
from ..model import MVAE, Batch
from .controls import Controls, Kind

N_DRAWS = 100  # importance samples of a bound


@torch.no_grad()
def shares(model: MVAE, given: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the share (latents,) of "prior" and each modality in the precision of q(z | given), and their widths.

    A width is a standard deviation's geometric mean over the latents: of each modality, and of q(z | given) as "all".
    """
    names = [name for name in model.modalities if name in given]
    _, logvar = model.posterior(given)
    experts_logvar = logvar[:0]
    if names:
        present = model.presence(given)
        experts_logvar = model.encode(given, present)[1][present]  # (names, latents)
    precision = torch.cat([torch.zeros_like(logvar), -experts_logvar])  # of the prior 1, in log space
    deviations = (0.5 * torch.cat([experts_logvar, logvar]).mean(dim=1)).exp().tolist()
    found = dict(zip(["prior", *names], precision.softmax(dim=0).cpu(), strict=True))
    return found, dict(zip([*names, "all"], deviations, strict=True))


@torch.no_grad()
def bounds(model: MVAE, given: Batch, seed: int = 0) -> tuple[float, float]:
    """Return two lower bounds on log p(given) in nats: the ELBO, and a tighter one by importance sampling."""
    names = tuple(name for name in model.modalities if name in given)
    mu, logvar = model.posterior(given)
    noise = torch.randn(N_DRAWS, 1, model.n_latents, generator=torch.Generator().manual_seed(seed)).to(mu.device)
    scores = model.log_prob(experts.draw(mu, logvar, noise), given, [names] * N_DRAWS)
    elbo = scores.sum() / N_DRAWS - experts.kl_to_prior(mu, logvar)
    log_p = log_likelihood(model, given, proposal=names, targets=[names], noise=noise)[names].log_p
    return elbo.item(), log_p.item()


def probabilities(kind: Kind, mean: Tensor) -> list[tuple[str, float]]:
    """Return values as text with their probabilities, from the means of n draws: of names, or of frequent values."""
    if kind.names:
        return list(zip(kind.names, mean.mean(dim=0).tolist(), strict=True))
    counts = collections.Counter(kind.lines(mean))
    return [(words, count / len(mean)) for words, count in counts.most_common(10)]


@torch.no_grad()
def strongest(model: MVAE, controls: Controls, n: int) -> list[int]:
    """Return the n latents that change the first control's mean most from z = -1 to 1, with the rest of z at zero."""
    name, kind = next(iter(controls.items()))
    ends = torch.eye(model.n_latents, device=next(model.parameters()).device)
    up, down = (kind.join(model.mean(z, kind.modalities(name)), name) for z in (ends, -ends))
    return (up - down).abs().flatten(1).mean(dim=1).argsort(descending=True)[:n].tolist()
