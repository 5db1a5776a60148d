"""A training step's loss as the published 2018 code computes it, for any MVAE: what `step.py` measures against.

Every ELBO term runs by itself: it encodes, fuses, draws z, decodes every modality and scores some. The layers are the
published ones too: Swish, cross-entropies and the product of experts are written out, operation by operation.

A pass per term gives batch norm each term's statistics; ours takes those of all terms together. So in training the two
losses are equal for networks without batch norm (and dropout) alone; in evaluation they are equal for all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvae import MVAE, Batch, Bernoulli, Categorical, Likelihood, Term
from mvae.layers import FoldConvTranspose2d

Encode = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""From an encoder and its modality to mu and logvar, each (batch, latents)."""


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def published(model: nn.Module) -> nn.Module:
    """The model, changed in place, in the published code's layers and torch's default memory format."""
    for name, child in model.named_children():
        if isinstance(child, nn.SiLU):  # one operation; a Swish is two
            setattr(model, name, Swish())
        elif isinstance(child, FoldConvTranspose2d):
            layer = nn.ConvTranspose2d(child.in_channels, child.out_channels, *child.geometry, bias=False)
            layer.weight = child.weight
            setattr(model, name, layer)
        else:
            published(child)
    return model.to(memory_format=torch.contiguous_format)


def encode_labels(encoder: Any, label: Tensor) -> tuple[Tensor, Tensor]:
    """A label encoder's output computed for each example, not for each class."""
    hidden = encoder.hidden(encoder.embedding(label))
    return encoder.mu(hidden), encoder.logvar(hidden)


def product(experts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The prior times the Gaussians of these (mu, logvar), each (batch, latents), by their precisions."""
    prior = torch.zeros_like(experts[0][0])
    mu = torch.stack([prior, *(mu for mu, _ in experts)])
    logvar = torch.stack([prior, *(logvar for _, logvar in experts)])
    precision = 1 / (logvar.exp() + 1e-8)
    total = precision.sum(dim=0)
    return (mu * precision).sum(dim=0) / total, (1 / total).log()


def log_prob(likelihood: Likelihood, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, (batch,); likelihoods that the published code lacks score by themselves."""
    if isinstance(likelihood, Bernoulli):
        logits = likelihood.decode(z)
        nats = logits.clamp(min=0) - logits * x + (1 + (-logits.abs()).exp()).log()
        return -nats.reshape(len(x), -1).sum(dim=1)
    if isinstance(likelihood, Categorical):
        log_probs = (likelihood.decode(z) + 1e-6).log_softmax(dim=1)
        one_hot = torch.zeros_like(log_probs).scatter(1, x.unsqueeze(1), 1)
        return (one_hot * log_probs).sum(dim=1)
    return likelihood.log_prob(z, x)


def loss(
    model: MVAE,
    batch: Batch,
    terms: Sequence[Term],
    weights: Mapping[str, float],
    beta: float = 1.0,
    *,
    encode: Mapping[str, Encode] | None = None,
    given_only: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """The negative sum of the terms' ELBOs in nats, a mean over the batch: what `Objective` gives.

    Args:
        model, batch, terms, weights, beta: as for `mvae.objective.Objective`, all modalities present.
        encode: by modality, how to run its encoder where that isn't a plain call.
        given_only: a term encodes just what it is given (the published code does); else, every modality again.
        noise: (terms, batch, latents) standard normal; drawn when None.
    """
    losses = []
    for t, term in enumerate(terms):
        experts = {}
        for name in term.given if given_only else model.modalities:
            encoder, x = model.encoders[name], batch[name]
            mu, logvar = encode[name](encoder, x) if encode and name in encode else encoder(x)
            experts[name] = mu.float(), logvar.float()
        mu, logvar = product([experts[name] for name in term.given])
        eps = torch.randn_like(mu) if noise is None else noise[t]
        z = mu + (0.5 * logvar).exp() * eps
        reconstruction: Tensor | float = 0.0
        for name in model.modalities:
            likelihood = model.likelihood(name)
            if name in term.scored:
                reconstruction = reconstruction + weights.get(name, 1.0) * log_prob(likelihood, z, batch[name])
            elif isinstance(likelihood, Bernoulli | Categorical):
                likelihood.decode(z)
            else:
                likelihood.log_prob(z, batch[name])
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
        losses.append((beta * kl - reconstruction).mean())
    return torch.stack(losses).sum()
