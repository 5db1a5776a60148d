"""Gaussian experts: their product with the prior, its KL divergence to the prior, and draws from it.

An expert is a diagonal Gaussian over the latents, given as mean `mu` and log-variance `logvar`. The prior N(0, I) is
always one of the factors (Wu & Goodman 2018, section 2.2), so a precision is at least 1 and no epsilon is needed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Fusion = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From experts to a posterior: (mu, logvar, present) -> (mu, logvar), with the shapes of `product`."""


def product(mu: Tensor, logvar: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return q(z | X) for many subsets X at once: the product of the prior and the present experts.

    With T_i = 1 / var_i: var = 1 / (1 + sum T_i) and mu = var * sum T_i mu_i (Cao & Fleet 2014), computed in log space,
    which is accurate in float32 for log-variances from -80 to 80. An absent expert may hold any values.

    Args:
        mu, logvar: (experts, batch, latents).
        present: bool, broadcastable to (terms, experts, batch): the experts in each term's product. None: one term with
            all of them.

    Returns:
        mu, logvar: (terms, batch, latents). Without experts it is the prior: zeros.
    """
    mu, log_precision = mu.unsqueeze(0), -logvar.unsqueeze(0)
    if present is not None:
        present = present.unsqueeze(-1)
        mu, log_precision = torch.where(present, mu, 0.0), torch.where(present, log_precision, -math.inf)
    log_precision = torch.cat([torch.zeros_like(log_precision[:, :1]), log_precision], dim=1)
    log_weight = log_precision.log_softmax(dim=1)  # the prior's, 0 - log T, is the product's log-variance
    return (log_weight[:, 1:].exp() * mu).sum(dim=1), log_weight[:, 0]


def kl_to_prior(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over the last dimension (Kingma & Welling 2014, B)."""
    return 0.5 * (mu.square() + logvar.expm1() - logvar).sum(dim=-1)


def draw(mu: Tensor, logvar: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the reparameterised draw mu + std * noise (Kingma & Welling 2014, section 2.4), shaped like `noise`.

    Args:
        mu, logvar: (..., latents).
        noise: standard normal, of their shape or with more dimensions in front.
        temperature: factor of the variance.
    """
    if temperature != 1:  # saves the addition in a training step
        logvar = logvar + math.log(temperature)
    return mu + (0.5 * logvar).exp() * noise


def log_standard_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) in nats, summed over the last dimension."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=-1)
