"""The networks for CelebA: a face, in convolutions, and its attributes as one vector (Wu & Goodman 2018, appendix)."""

from mvae import MVAE, Bernoulli, experts
from mvae.layers import FaceEncoder, face_decoder

import torch
from torch import Tensor, nn

N_ATTRIBUTES, HIDDEN = 18, 512


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
    """Map z to the logits of the 18 attributes, in four layers."""
    return nn.Sequential(
        nn.Linear(n_latents, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, N_ATTRIBUTES),
    )  # fmt: skip


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of image and attrs."""
    model = MVAE(
        encoders={"image": FaceEncoder(3, n_latents), "attrs": AttributesEncoder(n_latents)},
        likelihoods={
            "image": Bernoulli(face_decoder(3, n_latents)),
            "attrs": Bernoulli(attributes_decoder(n_latents)),
        },
        n_latents=n_latents,
        fuse=experts.product,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
