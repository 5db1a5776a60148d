"""The networks for FashionMNIST: a picture, in convolutions, and a label (Wu & Goodman 2018, appendix)."""

from mvae import MVAE, Bernoulli, Categorical, experts
from mvae.layers import FoldConvTranspose2d, Permute

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 512


class ImageEncoder(nn.Module):
    """q(z | image): (batch, 1, 28, 28) in [0, 1] -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 64, 4, stride=2, padding=1, bias=False), nn.SiLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1, bias=False), nn.SiLU(),
            Permute(0, 2, 3, 1), nn.Flatten(), nn.Linear(7 * 7 * 128, HIDDEN), nn.SiLU(),
        )  # fmt: skip
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(image)
        return self.mu(hidden), self.logvar(hidden)


class TextEncoder(nn.Module):
    """q(z | label): (batch,) class indices -> mu, logvar, each (batch, latents).

    The network runs on the ten classes, not on the batch; its output is looked up.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Embedding(10, HIDDEN)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(self.embedding.weight)
        return F.embedding(label, self.mu(hidden)), F.embedding(label, self.logvar(hidden))


def image_decoder(n_latents: int) -> nn.Sequential:
    """Map z to the logits of the pixels, (rows, 1, 28, 28): the encoder's layers in reverse."""
    return nn.Sequential(
        nn.Linear(n_latents, HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, 7 * 7 * 128), nn.SiLU(), nn.Unflatten(1, (7, 7, 128)), Permute(0, 3, 1, 2),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, bias=False), nn.SiLU(),
        FoldConvTranspose2d(64, 1, 4, stride=2, padding=1, bias=False),
    )  # fmt: skip


def text_decoder(n_latents: int) -> nn.Sequential:
    """Map z to the logits of the ten classes, in four layers."""
    return nn.Sequential(
        nn.Linear(n_latents, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 10),
    )  # fmt: skip


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of image and text."""
    model = MVAE(
        encoders={"image": ImageEncoder(n_latents), "text": TextEncoder(n_latents)},
        likelihoods={"image": Bernoulli(image_decoder(n_latents)), "text": Categorical(text_decoder(n_latents))},
        n_latents=n_latents,
        fuse=experts.product,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
