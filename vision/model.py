"""The networks for vision: for each of six pictures of a face, convolutions of CelebA's shape."""

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from mvae.layers import FoldConvTranspose2d
from mvae.likelihoods import Bernoulli
from mvae.model import MVAE

CHANNELS = {"image": 3, "gray": 1, "edge": 1, "mask": 1, "obscured": 3, "watermark": 3}
HIDDEN = 512


class PictureEncoder(nn.Module):
    """q(z | picture): (batch, channels, 64, 64) in [0, 1] -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_channels: int, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(n_channels, 32, 4, 2, 1, bias=False), nn.SiLU(),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
            nn.Conv2d(128, 256, 4, 1, 0, bias=False), nn.BatchNorm2d(256), nn.SiLU(),
            Permute([0, 2, 3, 1]), nn.Flatten(), nn.Linear(5 * 5 * 256, HIDDEN), nn.SiLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(picture)
        return self.mu(hidden), self.logvar(hidden)


def picture_decoder(n_channels: int, n_latents: int) -> nn.Sequential:
    """From z to the pixels' logits, (rows, channels, 64, 64): the encoder's layers in reverse."""
    return nn.Sequential(
        nn.Linear(n_latents, 5 * 5 * 256), nn.SiLU(), nn.Unflatten(1, (5, 5, 256)), Permute([0, 3, 1, 2]),
        nn.ConvTranspose2d(256, 128, 4, 1, 0, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        FoldConvTranspose2d(32, 1, 4, 2, 1) if n_channels == 1 else nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False),
    )  # fmt: skip


def build_model(n_latents: int) -> MVAE:
    """The MVAE of the six; its experts are fused by `mvae.experts.product`, with the prior as one more.

    Terms score pictures that they weren't given, from posteriors of their own kinds: hence the decoders' joint norm.
    """
    model = MVAE(
        encoders={name: PictureEncoder(n, n_latents) for name, n in CHANNELS.items()},
        likelihoods={name: Bernoulli(picture_decoder(n, n_latents), joint_norm=True) for name, n in CHANNELS.items()},
        n_latents=n_latents,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
