"""The networks for CelebA-19: a face, in convolutions, and 18 attributes, each a modality.

The networks of the 18 attributes have the same layers and run together: a layer of all of them is one batched product.
"""

import functools
import itertools
import math
from collections.abc import Sequence

from mvae import MVAE, Batch, Bernoulli, experts
from mvae.data.celeba import ATTRIBUTES
from mvae.layers import FaceEncoder, face_decoder
from mvae.likelihoods import float32_at_least

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 512
ALL = slice(None)


class AttributeLinear(nn.Module):
    """A linear layer for each attribute: (attributes, rows, inputs) -> (attributes, rows, outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(n_inputs)  # as nn.Linear is initialised
        self.weight = nn.Parameter(torch.empty(len(ATTRIBUTES), n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(ATTRIBUTES), 1, n_outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, which: slice = ALL) -> Tensor:
        """Apply the layers of the attributes `which`."""
        return torch.baddbmm(self.bias[which], x, self.weight[which])


class AttributeEncoders(nn.Module):
    """q(z | attribute) of each attribute.

    The networks run on the two values 0 and 1, not on the batch; their output is looked up.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(len(ATTRIBUTES), 2, HIDDEN))
        self.hidden = AttributeLinear(HIDDEN, HIDDEN)
        self.mu = AttributeLinear(HIDDEN, n_latents)
        self.logvar = AttributeLinear(HIDDEN, n_latents)

    def forward(self, values: Tensor, which: slice = ALL) -> tuple[Tensor, Tensor]:
        """Map values (attributes, batch), 0 and 1, to mu, logvar, each (attributes, batch, latents)."""
        hidden = F.silu(self.hidden(F.silu(self.embedding[which]), which))
        one = values.bool().unsqueeze(-1)
        zero_and_one = (layer(hidden, which).split(1, dim=1) for layer in (self.mu, self.logvar))
        mu, logvar = (torch.where(one, if_one, if_zero) for if_zero, if_one in zero_and_one)
        return mu, logvar


class AttributeDecoders(nn.Module):
    """Map z to the logit of each attribute, in four layers."""

    def __init__(self, n_latents: int):
        super().__init__()
        sizes = [n_latents, HIDDEN, HIDDEN, HIDDEN, 1]
        self.layers = nn.ModuleList(AttributeLinear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, z: Tensor, which: slice = ALL) -> Tensor:
        """Map z (attributes, rows, latents) to logits (attributes, rows)."""
        first, *others = self.layers
        z = first(z, which)
        for layer in others:
            z = layer(F.silu(z), which)
        return float32_at_least(z.squeeze(-1))


class One(nn.Module):
    """The network of one attribute, as a view of the networks that hold all weights."""

    def __init__(self, networks: nn.Module, number: int):
        super().__init__()
        self.networks = (networks,)  # in a tuple, so that this module doesn't register their weights
        self.which = slice(number, number + 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = self.networks[0](x.unsqueeze(0), self.which)
        return result[0] if isinstance(result, Tensor) else tuple(part[0] for part in result)


class MVAE19(MVAE):
    """The MVAE of the image and 18 attributes, whose networks run together."""

    def __init__(self, n_latents: int):
        attribute_encoders, attribute_decoders = AttributeEncoders(n_latents), AttributeDecoders(n_latents)
        numbered = list(enumerate(ATTRIBUTES))
        super().__init__(
            encoders={"image": FaceEncoder(3, n_latents), **{name: One(attribute_encoders, i) for i, name in numbered}},
            likelihoods={
                "image": Bernoulli(face_decoder(3, n_latents)),
                **{name: Bernoulli(One(attribute_decoders, i)) for i, name in numbered},
            },
            n_latents=n_latents,
            fuse=experts.product,
        )
        self.attribute_encoders, self.attribute_decoders = attribute_encoders, attribute_decoders

    def encode(self, batch: Batch, present: Tensor) -> tuple[Tensor, Tensor]:
        """As in MVAE, with one call for all attributes. An absent attribute's rows may hold any values."""
        image = super().encode({name: batch[name] for name in batch if name == "image"}, present)
        if len(batch) == ("image" in batch):
            return image
        parts = zip(image, self.attribute_encoders(values_of(batch)), strict=True)
        mu, logvar = (torch.cat([zeros[:1], float32_at_least(attributes)]) for zeros, attributes in parts)
        return mu, logvar

    def mean(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """As in MVAE, with one call for all attributes."""
        found = super().mean(z, [name for name in names if name == "image"])
        if len(found) < len(names):
            rows = z.reshape(-1, z.shape[-1]).expand(len(ATTRIBUTES), -1, -1)
            means = self.attribute_decoders(rows).sigmoid().view(-1, *z.shape[:-1])
            found |= dict(zip(ATTRIBUTES, means, strict=True))
        return {name: found[name] for name in names}

    def log_prob(self, z: Tensor, batch: Batch, decoded: Sequence[Sequence[str]], mask: Tensor | None = None) -> Tensor:
        """As in MVAE, with one call for all attributes."""
        image = super().log_prob(z, batch, [[name for name in names if name == "image"] for names in decoded], mask)
        order, counts, every = orders(tuple(map(tuple, decoded)), z.device)
        if not order.shape[1]:
            return image
        rows = z.expand(len(ATTRIBUTES), *z.shape) if every else z[order]  # (attributes, n, batch, latents)
        logits = self.attribute_decoders(rows.flatten(1, 2)).view(rows.shape[:-1])
        values = values_of(batch).unsqueeze(1).expand_as(logits)
        nats = -F.binary_cross_entropy_with_logits(logits, values, reduction="none")
        # Scatter the scores to their terms; then zero the padding and what the mask leaves out.
        nats = torch.zeros_like(nats[:, :1]).expand(-1, len(z), -1).scatter(1, order.unsqueeze(2).expand_as(nats), nats)
        counts = counts if mask is None else counts & mask[:, 1:]
        return torch.cat([image[:, :1], torch.where(counts, nats.transpose(0, 1), 0.0)], dim=1)


@torch.compiler.assume_constant_result
def orders(decoded: tuple[tuple[str, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Return what `_orders` does. Dynamo warns of a cached function that it meets itself."""
    return _orders(decoded, device)


@functools.lru_cache(maxsize=64)
def _orders(decoded: tuple[tuple[str, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Return the terms to decode for each attribute, (attributes, n); which count, (terms, attributes, 1); if all do.

    The terms that reconstruct the attribute come first, then others up to the most that any attribute has, so that all
    attributes have the same number of rows. The result is cached, so that no step on a GPU copies it.
    """
    wanted = [[name in names for names in decoded] for name in ATTRIBUTES]
    n = max(map(sum, wanted))
    order = [sorted(range(len(decoded)), key=[not score for score in scores].__getitem__)[:n] for scores in wanted]
    counts = torch.tensor(wanted).T.unsqueeze(2)
    return torch.tensor(order, dtype=torch.long).to(device), counts.to(device), all(map(all, wanted))


def values_of(batch: Batch) -> Tensor:
    """Return the attributes of a batch, (attributes, batch); zeros for one that isn't in it."""
    some = next(batch[name] for name in ATTRIBUTES if name in batch)
    return torch.stack([batch.get(name, torch.zeros_like(some)) for name in ATTRIBUTES])


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of image and attributes."""
    return MVAE19(n_latents).to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
