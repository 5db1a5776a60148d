"""p(x | z) of one modality: a decoder network, and how its output is read as a distribution.

Every likelihood has the same three methods, on latents `z` of shape (..., batch, latents):
    log_prob(z, x)  nats of each example, summed over x's own dimensions; x is (batch, *event); returns (..., batch).
    mean(z)         the expected x, or the probabilities of a label; (..., batch, *event).
    sample(z)       a draw of x.
For another kind of modality, such as a sequence, write a subclass of Likelihood with these methods.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Likelihood(nn.Module, ABC):
    """Holds the decoder, and runs it on stacked latents.

    Args:
        decoder: (rows, latents) -> (rows, *event). Batch norm in it takes its statistics in training over the rows of
            all ELBO terms together: the running ones, which evaluation uses, then fit every term's latents.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output for z of (..., batch, latents), in one call: (..., batch, *event), float32 at least."""
        output = self.decoder(z.reshape(-1, z.shape[-1]))
        output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
        return output.reshape(*z.shape[:-1], *output.shape[1:])

    @abstractmethod
    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats: (..., batch)."""

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], or a label's probabilities: (..., batch, *event)."""

    @abstractmethod
    def sample(self, z: Tensor) -> Tensor:
        """A draw from p(x | z)."""


class Bernoulli(Likelihood):
    """Independent Bernoulli values; the decoder gives logits.

    x lies in [0, 1]. For binary x this is a probability; for grey values it is the usual cross-entropy, which is not a
    normalised density.
    """

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.decode(z)
        nats = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return -nats.reshape(*z.shape[:-1], -1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).sigmoid()

    def sample(self, z: Tensor) -> Tensor:
        return self.mean(z).bernoulli()


class Categorical(Likelihood):
    """One label out of several; the decoder gives (rows, classes) logits. x is (batch,) of class indices."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        log_probs = self.decode(z).log_softmax(dim=-1)
        return log_probs.gather(-1, x.expand(z.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).softmax(dim=-1)

    def sample(self, z: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=self.decode(z)).sample()


class Gaussian(Likelihood):
    """Independent Gaussian values of one fixed standard deviation `std`; the decoder gives the means."""

    def __init__(self, decoder: nn.Module, std: float = 1.0):
        super().__init__(decoder)
        self.std = std

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        mean = self.decode(z)
        error = (x.expand_as(mean) - mean) / self.std
        nats = 0.5 * error.square() + math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -nats.flatten(z.dim() - 1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def sample(self, z: Tensor) -> Tensor:
        mean = self.mean(z)
        return mean + self.std * torch.randn_like(mean)
