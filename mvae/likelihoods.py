"""p(x | z) of one modality: a decoder network, and the distribution whose parameters it returns.

Every likelihood has the same three methods, on latents `z` of shape (..., batch, latents):
    log_prob(z, x)  nats of each example (..., batch), summed over the dimensions of x (batch, *event).
    mean(z)         the expected x, or the probabilities of a label, (..., batch, *event).
    sample(z)       a draw of x, (..., batch, *event).
`Distribution` makes one from any distribution of torch.distributions. For another kind of modality, such as a sequence,
write a subclass of Likelihood with these methods, and with `check` if not every x is valid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from .errors import UsageError


def float32_at_least(values: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32: log-probabilities need its 24 bits."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class Likelihood(nn.Module, ABC):
    """Base class: a decoder network and a distribution.

    Args:
        decoder: (rows, latents) -> (rows, *event). Its rows are those of all ELBO terms together, so batch norm has the
            same mixture in training as its running statistics have in evaluation.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def decode(self, z: Tensor) -> Tensor:
        """Run the decoder once on z (..., batch, latents); return (..., batch, *event), float32 or better."""
        output = float32_at_least(self.decoder(z.reshape(-1, z.shape[-1])))
        return output.reshape(*z.shape[:-1], *output.shape[1:])

    @abstractmethod
    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | z) in nats, (..., batch)."""

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """Return E[x | z], or a label's probabilities, (..., batch, *event)."""

    @abstractmethod
    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw x, (..., batch, *event), from p(x | z) to the power 1 / temperature, normalised."""

    def check(self, x: Tensor, z: Tensor) -> None:
        """Raise UsageError unless log_prob(z, x) is defined for x (batch, *event) and z (batch, latents).

        `Run` and `evaluate` check their first examples and those with the smallest and largest values. A subclass
        checks its values; this checks the shape: the mean's, or the mean's without the classes of a label.
        """
        shape = self.mean(z).shape
        if x.shape != shape[:-1]:
            check_shape(x, shape)


def check_shape(x: Tensor, shape: torch.Size) -> None:
    """Raise UsageError unless x has this shape: one that broadcasts would count several times."""
    if x.shape != shape:
        raise UsageError(f"must have the decoder's shape {tuple(shape)}, got {tuple(x.shape)}")


class Bernoulli(Likelihood):
    """Independent Bernoulli values in [0, 1]; the decoder returns logits.

    For binary x the result is a probability. For grey values it is the usual cross-entropy, which isn't a normalised
    density.
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
            raise UsageError(f"must be floats from 0 to 1 for a Bernoulli likelihood, got {x.dtype}")
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):
            remedy = "divide pictures of 0 to 255 by 255, and don't standardise them"
            raise UsageError(f"values must be from 0 to 1, got {low:g} to {high:g}: {remedy}")


class _BernoulliScore(torch.autograd.Function):
    """The sum of x l - log(1 + exp(l)) over the last dimension of logits l and x, for a CPU.

    A log1p of each pixel would be most of the cost. Instead,

        log(1 + exp(l)) = max(l, 0) + log(1 + exp(-|l|)),

    and since 1 + exp(-|l|) is from 1 to 2, sixteen pixels are multiplied before one logarithm of the product. Rounding
    1 + exp(-|l|) loses at most 6e-8 nats a pixel in float32, no more than the sum does.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        linear = (x * logits).sub_(logits.relu()).sum(dim=-1)
        factors = logits.abs().neg_().exp_().add_(1)
        n = factors.shape[-1]
        for _ in range(4):  # multiply the first half by the second
            half = (n + 1) // 2
            factors[..., : n - half].mul_(factors[..., half:n])
            n = half
        return linear - factors[..., :n].log().sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, x = ctx.saved_tensors
        return (x - logits.sigmoid()) * gradient.unsqueeze(-1), None


class Categorical(Likelihood):
    """One of several classes, or one in each place of x, such as a pixel of a mask.

    x: class numbers, int64 (batch, *event). The decoder returns logits, (rows, *event, classes).
    """

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        log_probs = self.decode(z).log_softmax(dim=-1)
        check_shape(x, log_probs.shape[z.dim() - 2 : -1])
        nats = log_probs.gather(-1, x.expand(log_probs.shape[:-1]).unsqueeze(-1))
        return nats.reshape(*z.shape[:-1], -1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).softmax(dim=-1)

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        return torch.distributions.Categorical(logits=self.decode(z) / temperature).sample()

    def check(self, x: Tensor, z: Tensor) -> None:
        shape = self.mean(z).shape
        if x.dtype != torch.int64 or x.shape != shape[:-1]:
            found = f"{x.dtype} of {tuple(x.shape)}" + ": use argmax(dim=-1)" * (x.shape == shape)
            raise UsageError(f"must be class numbers, torch.int64 of {tuple(shape[:-1])}, got {found}")
        classes = shape[-1]
        low, high = x.aminmax()
        if low < 0 or high >= classes:
            raise UsageError(f"labels must be from 0 to {classes - 1}, got {low} to {high}")


class Gaussian(Likelihood):
    """Independent Gaussian values; the decoder returns their means.

    std: standard deviation in the unit of x, a number > 0. As an nn.Parameter, of shape () or one that broadcasts to x,
        it is learned, on a log scale from its values. Raises UsageError for anything else.
    """

    def __init__(self, decoder: nn.Module, std: float | nn.Parameter = 1.0):
        super().__init__(decoder)
        learned = isinstance(std, nn.Parameter) and bool((std > 0).all())
        if not learned and not (isinstance(std, int | float) and 0 < std < math.inf):
            raise UsageError(f"std must be a number > 0, or an nn.Parameter to learn it, got {std}")
        self.log_std = nn.Parameter(std.detach().log()) if isinstance(std, nn.Parameter) else math.log(std)

    @property
    def std(self) -> float | Tensor:
        """The standard deviation."""
        return self.log_std.exp() if isinstance(self.log_std, Tensor) else math.exp(self.log_std)

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        mean = self.decode(z)
        check_shape(x, mean.shape[z.dim() - 2 :])
        error = (x.expand_as(mean) - mean) / self.std
        nats = 0.5 * error.square() + self.log_std + 0.5 * math.log(2 * math.pi)
        return -nats.reshape(*z.shape[:-1], -1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        mean = self.mean(z)
        return mean + math.sqrt(temperature) * self.std * torch.randn_like(mean)

    def check(self, x: Tensor, z: Tensor) -> None:
        check_shape(x, self.mean(z).shape)
        if not x.is_floating_point():
            raise UsageError(f"must be floats for a Gaussian likelihood, got {x.dtype}")
        if not x.abs().max() < 1e15:  # its square must be finite
            raise UsageError(f"values must be finite, and best of a size around 1, got {x.abs().max():g}")


class Distribution(Likelihood):
    """Independent values of any distribution in torch.distributions.

    of: from the decoder's output (..., batch, *event) to a distribution over x (..., batch, *event), such as
        `lambda out: Poisson(out.exp())`, or `lambda out: Normal(out[..., 0], out[..., 1].exp())`.
    """

    def __init__(self, decoder: nn.Module, of: Callable[[Tensor], distributions.Distribution]):
        super().__init__(decoder)
        self.of = of

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        nats = self.of(self.decode(z)).log_prob(x)
        return nats.reshape(*z.shape[:-1], -1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.of(self.decode(z)).mean

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        p = self.of(self.decode(z))
        if temperature != 1:
            raise UsageError(f"temperature must be 1 for a {type(p).__name__}, got {temperature}")
        return p.sample()

    def check(self, x: Tensor, z: Tensor) -> None:
        p = self.of(self.decode(z))
        check_shape(x, p.mean.shape)
        if p.support is not None and not p.support.check(x).all():
            raise UsageError(f"values must be valid for a {type(p).__name__}, got {x.min():g} to {x.max():g}")
