"""p(x | z) of one modality: a decoder network, and how its output is read as a distribution.

Every likelihood has the same three methods, on latents `z` of shape (..., batch, latents):
    log_prob(z, x)  nats of each example, summed over x's own dimensions; x is (batch, *event); returns (..., batch).
    mean(z)         the expected x, or the probabilities of a label; (..., batch, *event).
    sample(z)       a draw of x.
For another kind of modality, such as a sequence, write a subclass of Likelihood with these methods, and with `check` if
its x may not have any value.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UsageError


def float32_at_least(values: Tensor) -> Tensor:
    """The values as they are, or as float32 where a network gave fewer bits: log-probabilities need 24 of them."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class Likelihood(nn.Module, ABC):
    """Holds the decoder, and runs it on stacked latents.

    Args:
        decoder: (rows, latents) -> (rows, *event). Batch norm in it takes its statistics in training over the rows of
            all ELBO terms together: the running ones, which evaluation uses, are then of that same mixture.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output for z of (..., batch, latents), in one call: (..., batch, *event), float32 at least."""
        output = float32_at_least(self.decoder(z.reshape(-1, z.shape[-1])))
        return output.reshape(*z.shape[:-1], *output.shape[1:])

    @abstractmethod
    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats: (..., batch)."""

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], or a label's probabilities: (..., batch, *event)."""

    @abstractmethod
    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """A draw from p(x | z) to the power 1 / temperature, normalised: (..., batch, *event)."""

    def check(self, x: Tensor, z: Tensor) -> None:
        """Raises UsageError, with what would be right, unless x (batch, *event) is what log_prob(z, x) scores.

        `fit` and `evaluate` ask it of their first examples and of those with the smallest and largest values; z is
        (batch, latents). A subclass says which values x may have. Here x is to have the mean's shape, or for labels
        the mean's without the classes.
        """
        shape = self.mean(z).shape
        if x.shape != shape[:-1]:
            check_shape(x, shape)


def check_shape(x: Tensor, shape: torch.Size) -> None:
    """Raises UsageError unless x has this shape: what broadcasts would be scored several times."""
    if x.shape != shape:
        raise UsageError(f"it is of shape {tuple(x.shape)}, and its decoder makes {tuple(shape)}")


class Bernoulli(Likelihood):
    """Independent Bernoulli values; the decoder gives logits.

    x lies in [0, 1]. For binary x this is a probability; for grey values it is the usual cross-entropy, which is not a
    normalised density.
    """

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.decode(z)
        check_shape(x, logits.shape[z.dim() - 2 :])
        logits, x = logits.reshape(*z.shape[:-1], -1), x.reshape(len(x), -1)
        if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not x.requires_grad:
            return _BernoulliScore.apply(logits, x)
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).sigmoid()

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        return (self.decode(z) / temperature).sigmoid().bernoulli()

    def check(self, x: Tensor, z: Tensor) -> None:
        check_shape(x, self.mean(z).shape)
        if not x.is_floating_point():
            raise UsageError(f"it is {x.dtype}, and a Bernoulli likelihood takes floats from 0 to 1")
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):
            remedy = "pictures of 0 to 255 are to be divided by 255, and none to be standardised"
            raise UsageError(f"it has values from {low:g} to {high:g}, and 0 to 1 are wanted: {remedy}")


class _BernoulliScore(torch.autograd.Function):
    """The sum of x l - log(1 + exp(l)) over the last dimension of logits l and x, for a CPU.

    That logarithm of each pixel is most of what a score costs, when it is taken as log1p. Here

        log(1 + exp(l)) = max(l, 0) + log(1 + exp(-|l|)),

    whose last part lies from 0 to log 2: sixteen pixels are multiplied before one logarithm is taken of them all. The
    rounding of 1 + exp(-|l|) loses 6e-8 nats a pixel at most in float32, no more than the sum does.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        linear = (x * logits).sub_(logits.relu()).sum(dim=-1)
        factors = logits.abs().neg_().exp_().add_(1)
        n = factors.shape[-1]
        for _ in range(4):  # the second half goes into the first
            half = (n + 1) // 2
            factors[..., : n - half].mul_(factors[..., half:n])
            n = half
        return linear - factors[..., :n].log().sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, x = ctx.saved_tensors
        return (x - logits.sigmoid()) * gradient.unsqueeze(-1), None


class Categorical(Likelihood):
    """One label out of several; the decoder gives (rows, classes) logits. x is (batch,) of class indices."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        check_shape(x, z.shape[-2:-1])
        log_probs = self.decode(z).log_softmax(dim=-1)
        return log_probs.gather(-1, x.expand(z.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).softmax(dim=-1)

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        return torch.distributions.Categorical(logits=self.decode(z) / temperature).sample()

    def check(self, x: Tensor, z: Tensor) -> None:
        *shape, classes = self.mean(z).shape
        check_shape(x, torch.Size(shape))
        if x.dtype != torch.int64:
            raise UsageError(f"it is {x.dtype}, and a Categorical likelihood takes class numbers as torch.int64")
        low, high = x.aminmax()
        if low < 0 or high >= classes:
            raise UsageError(f"it has labels from {low} to {high}, and its decoder knows classes 0 to {classes - 1}")


class Gaussian(Likelihood):
    """Independent Gaussian values; the decoder gives the means. `std`: the standard deviation of all, in x's unit.

    Raises UsageError unless `std` is above 0.
    """

    def __init__(self, decoder: nn.Module, std: float = 1.0):
        super().__init__(decoder)
        if not 0 < std < math.inf:
            raise UsageError(f"`std` is {std}, and a standard deviation is above 0")
        self.std = std

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        mean = self.decode(z)
        check_shape(x, mean.shape[z.dim() - 2 :])
        error = (x.expand_as(mean) - mean) / self.std
        nats = 0.5 * error.square() + math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -nats.reshape(*z.shape[:-1], -1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        mean = self.mean(z)
        return mean + math.sqrt(temperature) * self.std * torch.randn_like(mean)

    def check(self, x: Tensor, z: Tensor) -> None:
        check_shape(x, self.mean(z).shape)
        if not x.is_floating_point():
            raise UsageError(f"it is {x.dtype}, and a Gaussian likelihood takes floats")
