"""The networks for vision: CelebA's convolutions for each of six pictures of a face."""

from mvae import MVAE, Bernoulli, experts
from mvae.layers import FaceEncoder, face_decoder

import torch

CHANNELS = {"image": 3, "gray": 1, "edge": 1, "mask": 1, "obscured": 3, "watermark": 3}


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of the six pictures."""
    model = MVAE(
        encoders={name: FaceEncoder(n, n_latents) for name, n in CHANNELS.items()},
        likelihoods={name: Bernoulli(face_decoder(n, n_latents)) for name, n in CHANNELS.items()},
        n_latents=n_latents,
        fuse=experts.product,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and GPUs
