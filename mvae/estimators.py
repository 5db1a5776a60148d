"""Importance-weighted estimates of log-likelihoods: log p(x) or log p(x, y), of any set of modalities of a batch.

log p(X) = log E_q(z|Y) [ prod_{i in X} p(x_i | z) p(z) / q(z | Y) ], estimated with K draws from the proposal q(z | Y)
(Burda et al. 2016, equation 8; Wu & Goodman 2018, section 5.1). Its expectation is a lower bound of log p(X), which
rises to it with K. The weights λ of training have no part in it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import experts
from .errors import UsageError
from .model import MVAE, Batch

Modalities = tuple[str, ...]


class Estimate(NamedTuple):
    """Values in nats, one for each example, (n,).

    log_p: the estimate of log p(target).
    log_weight_variance: the variance, over the draws, of log p(target | z) + log p(z) - log q(z | proposal). It tells
        how well the proposal fits: at 0 one draw is enough, from about 1 on many are needed.
    """

    log_p: Tensor
    log_weight_variance: Tensor


def log_likelihood(
    model: MVAE,
    batch: Batch,
    *,
    proposal: Modalities,
    targets: Sequence[Modalities],
    noise: Tensor,
    max_rows: int = 4096,
) -> dict[Modalities, Estimate]:
    """Estimate log p(target) of each example for several targets, from the same draws of one proposal.

    Args:
        model: in evaluation mode.
        batch: the modalities in `proposal` and `targets`, each (batch, *event).
        proposal: z is drawn from q(z | these modalities); from the prior if there are none.
        targets: sets of one or more modalities.
        noise: standard normal (draws, batch, latents), two or more draws; nothing else is random.
        max_rows: bounds the latents decoded in one call, and so the memory, but for one draw per example; the result
            doesn't depend on it.

    Raises UsageError for an unknown modality, or noise of another shape.
    """
    return estimate_and_predict(model, batch, proposal, targets, (), noise, max_rows)[0]


@torch.no_grad()
def estimate_and_predict(
    model: MVAE,
    batch: Batch,
    proposal: Modalities,
    targets: Sequence[Modalities],
    predicted: Sequence[str],
    noise: Tensor,
    max_rows: int,
) -> tuple[dict[Modalities, Estimate], dict[str, Tensor]]:
    """Return `log_likelihood` of `targets`, and the means E_q(z|proposal)[E[x | z]] of the modalities `predicted`.

    Both are from the same draws. A mean has the shape (batch, *event); for a label it is its probabilities.
    """
    model.check_names(*proposal, *predicted, *(name for target in targets for name in target))
    if noise.dim() != 3 or len(noise) < 2 or noise.shape[2] != model.n_latents:
        expected = f"(draws >= 2, batch, {model.n_latents})"
        raise UsageError(f"noise must have shape {expected}, got {tuple(noise.shape)}")
    n_draws, n, _ = noise.shape
    scored = tuple(name for name in model.modalities if any(name in target for target in targets))
    if proposal:
        mu, logvar = model.fused({name: batch[name] for name in proposal})
    else:
        mu = logvar = torch.zeros_like(noise[0])
    weights: dict[Modalities, list[Tensor]] = {target: [] for target in targets}
    sums: dict[str, list[Tensor]] = {name: [] for name in predicted}
    for eps in noise.split(max(1, max_rows // n)):
        z = experts.draw(mu, logvar, eps)
        log_prob = model.log_prob(z, batch, [scored] * len(z))
        for name, mean in model.mean(z, predicted).items():
            sums[name].append(mean.sum(dim=0))
        log_q = experts.log_standard_normal(eps) - 0.5 * logvar.sum(dim=-1)
        ratio = model.log_prior(z) - log_q
        log_probs = dict(zip(model.modalities, log_prob.unbind(dim=1), strict=True))
        for target in targets:
            weights[target].append(sum((log_probs[name] for name in target), start=ratio))
    estimates = {}
    for target in targets:
        weight = torch.cat(weights[target]).double()
        estimates[target] = Estimate(weight.logsumexp(dim=0) - math.log(n_draws), weight.var(dim=0))
    return estimates, {name: torch.stack(sums[name]).sum(dim=0) / n_draws for name in predicted}
