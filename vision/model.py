"""The networks for vision: for each of six pictures of a face, convolutions of CelebA's shape."""

import torch

from mvae import MVAE, Bernoulli, experts
from mvae.layers import FaceEncoder, face_decoder

CHANNELS = {"image": 3, "gray": 1, "edge": 1, "mask": 1, "obscured": 3, "watermark": 3}


def build_model(n_latents: int) -> MVAE:
    """The MVAE of the six."""
    model = MVAE(
        encoders={name: FaceEncoder(n, n_latents) for name, n in CHANNELS.items()},
        likelihoods={name: Bernoulli(face_decoder(n, n_latents)) for name, n in CHANNELS.items()},
        n_latents=n_latents,
        fuse=experts.product,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU and on a GPU
