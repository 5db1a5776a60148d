"""The experiments to measure: random data in the shapes of the real ones, and what train.py's defaults make of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from mvae.data import Data, pictures_and_labels

import plain


class Experiment(NamedTuple):
    """One experiment, by the name of its folder.

    data: makes its training data, random, on the CPU and as stored.
    weights: λ by modality.
    predictions: what loglike.py predicts, and from what.
    plain_encode: how the plain reference runs an encoder that ours runs more cleverly; see `plain.loss`.
    """

    data: Callable[[], Data]
    batch_size: int
    n_latents: int
    weights: Mapping[str, float]
    lr: float
    predictions: Mapping[str, tuple[str, ...]]
    plain_encode: Mapping[str, plain.Encode]
    approx_m: int = 0


def mnist() -> Data:
    image = torch.randint(256, (60000, 1, 28, 28), dtype=torch.uint8)
    text = torch.randint(10, (60000,), dtype=torch.uint8)
    return Data(tensors={"image": image, "text": text}, transform=pictures_and_labels)


EXPERIMENTS = {
    "mnist": Experiment(
        data=mnist,
        batch_size=100,
        n_latents=64,
        weights={"image": 1.0, "text": 50.0},
        lr=1e-3,
        predictions={"text": ("image",)},
        plain_encode={"text": plain.encode_labels},
    ),
}
