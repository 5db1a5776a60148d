"""The networks for CelebA-19: a face, in convolutions, and each of its 18 attributes as a modality of its own.

The 18 attributes' networks are alike, and run together: each layer of all of them is one batched matrix product.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Permute

from mvae.likelihoods import Bernoulli
from mvae.model import MVAE, Batch

from datasets import ATTRIBUTES

HIDDEN = 512


class ImageEncoder(nn.Module):
    """q(z | image): (batch, 3, 64, 64) in [0, 1] -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.SiLU(),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
            nn.Conv2d(128, 256, 4, 1, 0, bias=False), nn.BatchNorm2d(256), nn.SiLU(),
            Permute([0, 2, 3, 1]), nn.Flatten(), nn.Linear(5 * 5 * 256, HIDDEN), nn.SiLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(image)
        return self.mu(hidden), self.logvar(hidden)


def image_decoder(n_latents: int) -> nn.Sequential:
    """From z to the pixels' logits, (rows, 3, 64, 64): the encoder's layers in reverse."""
    return nn.Sequential(
        nn.Linear(n_latents, 5 * 5 * 256), nn.SiLU(), nn.Unflatten(1, (5, 5, 256)), Permute([0, 3, 1, 2]),
        nn.ConvTranspose2d(256, 128, 4, 1, 0, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False),
    )  # fmt: skip


class AttributeLinear(nn.Module):
    """A linear layer for each attribute: (attributes, rows, inputs) -> (attributes, rows, outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(n_inputs)  # as nn.Linear begins
        self.weight = nn.Parameter(torch.empty(len(ATTRIBUTES), n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(ATTRIBUTES), 1, n_outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        """`which` attributes' layers x is for, by number and in ascending order."""
        if len(which) == len(ATTRIBUTES):
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[which], x, self.weight[which])


class AttributeEncoders(nn.Module):
    """q(z | attribute) of all attributes: each one's mu and logvar for absent and for there.

    The networks run on the two values, not on the batch: their output is then looked up.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(len(ATTRIBUTES), 2, HIDDEN))
        self.hidden = AttributeLinear(HIDDEN, HIDDEN)
        self.mu = AttributeLinear(HIDDEN, n_latents)
        self.logvar = AttributeLinear(HIDDEN, n_latents)

    def forward(self, values: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(attributes, batch) of 0 and 1, of `which` attributes -> mu, logvar, each (attributes, batch, latents)."""
        hidden = F.silu(self.hidden(F.silu(self.embedding[which]), which))
        there = values.bool().unsqueeze(-1)
        absent_or_there = (layer(hidden, which).split(1, dim=1) for layer in (self.mu, self.logvar))
        mu, logvar = (torch.where(there, when_there, when_absent) for when_absent, when_there in absent_or_there)
        return mu, logvar


class AttributeDecoders(nn.Module):
    """From z to the attributes' logits: four layers for each."""

    def __init__(self, n_latents: int):
        super().__init__()
        sizes = [n_latents, HIDDEN, HIDDEN, HIDDEN, 1]
        self.layers = nn.ModuleList(AttributeLinear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, z: Tensor, which: Sequence[int]) -> Tensor:
        """(attributes, rows, latents), of `which` attributes -> logits (attributes, rows)."""
        first, *others = self.layers
        z = first(z, which)
        for layer in others:
            z = layer(F.silu(z), which)
        return z.squeeze(-1)


class One(nn.Module):
    """One attribute's network of those that run together, which keep the weights."""

    def __init__(self, networks: nn.Module, number: int):
        super().__init__()
        self.networks = (networks,)  # in a tuple, so that its weights aren't this module's, too
        self.number = number

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = self.networks[0](x.unsqueeze(0), [self.number])
        return result[0] if isinstance(result, Tensor) else tuple(part[0] for part in result)


class MVAE19(MVAE):
    """The MVAE of the image and 18 attributes, whose experts run together."""

    def __init__(self, n_latents: int):
        attribute_encoders, attribute_decoders = AttributeEncoders(n_latents), AttributeDecoders(n_latents)
        numbered = list(enumerate(ATTRIBUTES))
        super().__init__(
            encoders={"image": ImageEncoder(n_latents), **{name: One(attribute_encoders, i) for i, name in numbered}},
            likelihoods={
                "image": Bernoulli(image_decoder(n_latents)),
                **{name: Bernoulli(One(attribute_decoders, i)) for i, name in numbered},
            },
            n_latents=n_latents,
        )
        self.attribute_encoders, self.attribute_decoders = attribute_encoders, attribute_decoders

    def encode(self, batch: Batch, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As MVAE's, but that an absent attribute's rows may hold anything: no product takes them."""
        which = [i for i, name in enumerate(ATTRIBUTES) if name in batch]
        parts = []
        if "image" in batch:
            parts.append(super().encode({"image": batch["image"]}, None if present is None else present[:1]))
        if which:
            values = torch.stack([batch[ATTRIBUTES[i]] for i in which])
            mu, logvar = self.attribute_encoders(values, which)
            parts.append((mu.float(), logvar.float()))
        mu, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
        return mu, logvar

    def log_prob(self, z: Tensor, batch: Batch, scored: Sequence[Sequence[str]], mask: Tensor | None = None) -> Tensor:
        """As MVAE's, with as few calls of the attributes' decoders as there are different sets of them to score."""
        image_only = [tuple({"image"} & set(names)) for names in scored]
        result = super().log_prob(z, batch, image_only, mask)
        terms = [[t for t, names in enumerate(scored) if name in names] for name in ATTRIBUTES]
        # The r-th round decodes, of each attribute that has so many terms, its r-th one; rounds of all go together.
        in_all = min(map(len, terms))
        rounds = [slice(0, in_all)] * (in_all > 0)
        rounds += [slice(r, r + 1) for r in range(in_all, max(map(len, terms)))]
        cells, scores = [], []
        for r in rounds:
            which = [i for i, of_one in enumerate(terms) if of_one[r]]
            index = torch.tensor([terms[i][r] for i in which], device=z.device)  # (attributes, terms)
            rows = z[index]  # (attributes, terms, batch, latents)
            logits = self.attribute_decoders(rows.flatten(1, 2), which).float().view(rows.shape[:-1])
            values = torch.stack([batch[ATTRIBUTES[i]] for i in which]).unsqueeze(1).expand_as(logits)
            nats = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
            number = torch.tensor(which, device=z.device).unsqueeze(1) + 1  # of the modality
            cells.append((index * len(self.modalities) + number).flatten())
            scores.append(-nats.flatten(0, 1))
        if not cells:
            return result
        attributes = result.flatten(0, 1).index_copy(0, torch.cat(cells), torch.cat(scores)).view(result.shape)
        return attributes if mask is None else torch.where(mask, attributes, 0.0)


def build_model(n_latents: int) -> MVAE:
    """The MVAE of image and attributes; its experts are fused by `mvae.experts.product`, with the prior as one more."""
    return MVAE19(n_latents).to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
