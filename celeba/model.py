"""The networks for CelebA: a face, in convolutions, and its attributes as one vector (Wu & Goodman 2018, appendix)."""

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from mvae.likelihoods import Bernoulli
from mvae.model import MVAE

N_ATTRIBUTES, HIDDEN = 18, 512


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


class AttributesEncoder(nn.Module):
    """q(z | attributes): (batch, 18) of 0 and 1 -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(N_ATTRIBUTES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
        )  # fmt: skip
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, attributes: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(attributes)
        return self.mu(hidden), self.logvar(hidden)


def attributes_decoder(n_latents: int) -> nn.Sequential:
    """From z to the 18 attributes' logits, in four layers."""
    return nn.Sequential(
        nn.Linear(n_latents, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, N_ATTRIBUTES),
    )  # fmt: skip


def build_model(n_latents: int) -> MVAE:
    """The MVAE of image and attrs; its experts are fused by `mvae.experts.product`, with the prior as one more."""
    model = MVAE(
        encoders={"image": ImageEncoder(n_latents), "attrs": AttributesEncoder(n_latents)},
        likelihoods={"image": Bernoulli(image_decoder(n_latents)), "attrs": Bernoulli(attributes_decoder(n_latents))},
        n_latents=n_latents,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
