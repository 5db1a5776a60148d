"""p(x | z) of one modality: a decoder network, and how its output is read as a distribution.

Every likelihood has the same three methods, on latents `z` of shape (..., batch, latents):
    log_prob(z, x)  nats of each example, summed over x's own dimensions; x is (batch, *event); returns (..., batch).
    mean(z)         the expected x, or the probabilities of a label; (..., batch, *event).
    sample(z)       a draw of x.
A modality that needs another one (a sequence, say) is a module of its own with these methods.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Likelihood(nn.Module, ABC):
    """Holds the decoder, and runs it on stacked latents.

    Args:
        decoder: (rows, latents) -> (rows, *event).
        joint_norm: whether batch norm, if the decoder has it, takes its statistics in training from all terms of the
            objective together, as it does in evaluation, or from each term alone, as a pass for each term would. The
            terms' posteriors differ much where some score what they weren't given; what is learned from each one's own
            statistics then doesn't fit the running ones.
    """

    def __init__(self, decoder: nn.Module, *, joint_norm: bool = False):
        super().__init__()
        self.decoder = decoder
        has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in decoder.modules())
        self.norm_by_term = has_norm and not joint_norm

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output, float32 at least, for z of (..., batch, latents): one call for all leading dimensions.

        In training, a decoder whose batch norm is each term's own runs once per (batch, latents) slice.
        """
        if self.norm_by_term and self.training and z.dim() > 2:
            return torch.stack([self.decode(part) for part in z])
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

    def __init__(self, decoder: nn.Module, std: float = 1.0, *, joint_norm: bool = False):
        super().__init__(decoder, joint_norm=joint_norm)
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
