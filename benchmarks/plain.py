"""A training step's loss as the published 2018 code computes it, for any MVAE: the reference of step.py.

Every ELBO term has a pass for itself alone: it encodes, fuses, draws z, decodes every modality and scores some. The
layers are the published ones: Swish, cross-entropies and the product of experts, operation by operation. Only
multimnist's recurrent networks are ours.

A pass per term gives batch norm each term's statistics; ours takes those of all terms together. So in training the two
losses are equal only for networks without batch norm and dropout; in evaluation mode they are equal for all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mvae import MVAE, Batch, Bernoulli, Categorical, Likelihood, Term
from mvae.layers import FoldConvTranspose2d

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Encode = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Maps an encoder and its modality to mu and logvar, each (batch, latents)."""


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def published(model: nn.Module) -> nn.Module:
    """Change the model in place to the published code's layers and torch's default memory format; return it."""
    for name, child in model.named_children():
        if isinstance(child, nn.SiLU):  # one operation; a Swish is two
            setattr(model, name, Swish())
        elif isinstance(child, FoldConvTranspose2d):
            child.__class__ = nn.ConvTranspose2d  # type: ignore[assignment]  # the weights stay
        else:
            published(child)
    return model.to(memory_format=torch.contiguous_format)


def encode_labels(encoder: Any, label: Tensor) -> tuple[Tensor, Tensor]:
    """Run a label encoder on each example instead of each class."""
    hidden = encoder.hidden(encoder.embedding(label))
    return encoder.mu(hidden), encoder.logvar(hidden)


def encode_attribute(encoder: Any, there: Tensor) -> tuple[Tensor, Tensor]:
    """Run the network of one of CelebA-19's attributes on each example instead of each value."""
    networks, which = encoder.networks[0], encoder.which
    hidden = F.silu(networks.embedding[which.start][there.long()]).unsqueeze(0)
    hidden = F.silu(networks.hidden(hidden, which))
    return networks.mu(hidden, which)[0], networks.logvar(hidden, which)[0]


def product(experts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the prior times the Gaussians of these (mu, logvar), each (batch, latents), by their precisions."""
    prior = torch.zeros_like(experts[0][0])
    mu = torch.stack([prior, *(mu for mu, _ in experts)])
    logvar = torch.stack([prior, *(logvar for _, logvar in experts)])
    precision = 1 / (logvar.exp() + 1e-8)
    total = precision.sum(dim=0)
    return (mu * precision).sum(dim=0) / total, (1 / total).log()


def log_prob(likelihood: Likelihood, z: Tensor, x: Tensor) -> Tensor:
    """Return log p(x | z) in nats, (batch,); a likelihood that the published code lacks has its own log_prob."""
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
    *,
    encode: Mapping[str, Encode] | None = None,
    given_only: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Return the negative sum of the terms' ELBOs at β = 1, in nats, a mean over the batch: the loss of `Objective`.

    Args:
        model, batch, terms, weights: as for `mvae.Objective`, all modalities present.
        encode: by modality, how to run its encoder where that isn't a plain call.
        given_only: a term encodes its inputs only, as the published code does, instead of every modality.
        noise: (terms, batch, latents) standard normal; drawn when None.
    """
    losses = []
    for t, term in enumerate(terms):
        experts = {}
        for name in term.inputs if given_only else model.modalities:
            encoder, x = model.encoders[name], batch[name]
            mu, logvar = encode[name](encoder, x) if encode and name in encode else encoder(x)
            experts[name] = mu.float(), logvar.float()
        mu, logvar = product([experts[name] for name in term.inputs])
        z = mu + (0.5 * logvar).exp() * (torch.randn_like(mu) if noise is None else noise[t])
        reconstruction: Tensor | float = 0.0
        for name in model.modalities:
            likelihood = model.likelihood(name)
            if name in term.reconstructs:
                reconstruction = reconstruction + weights.get(name, 1.0) * log_prob(likelihood, z, batch[name])
            elif isinstance(likelihood, Bernoulli | Categorical):
                likelihood.decode(z)
            else:
                likelihood.log_prob(z, batch[name])
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
        losses.append((kl - reconstruction).mean())
    return torch.stack(losses).sum()
