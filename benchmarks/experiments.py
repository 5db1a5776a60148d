"""The experiments to measure: random data in the shapes of the real ones, and the settings of train.py."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from celeba19.datasets import apart
from mvae import MVAE, Bernoulli, Data, Quantity, of_a_pair
from mvae.data import pictures_and_labels
from mvae.datasets.celeba import ATTRIBUTES, pictures_and_attributes
from mvae.estimators import Modalities
from mvae.layers import FaceEncoder, face_decoder
from vision import datasets as vision

import plain


class Experiment(NamedTuple):
    """One experiment, by the name of its folder.

    data: makes its training data, random, on the CPU and as stored.
    weights: λ by modality.
    quantities: what loglike.py estimates, each with its proposals.
    predictions: what loglike.py predicts, and from what.
    plain_encode: how the plain reference runs an encoder that ours runs more cleverly; see `plain.loss`.
    plain_model: by its latents, the plain reference's model where ours has other modules; they compute the same.
    approx_m: random subsets a step.
    reconstruct: what every term scores beside what it is given.
    """

    data: Callable[[], Data]
    batch_size: int
    n_latents: int
    weights: Mapping[str, float]
    lr: float
    quantities: Mapping[Quantity, Sequence[Modalities]]
    predictions: Mapping[str, tuple[str, ...]]
    plain_encode: Mapping[str, plain.Encode] = {}
    plain_model: Callable[[int], MVAE] | None = None
    approx_m: int = 0
    reconstruct: str = "given"


def build_model(name: str, n_latents: int) -> MVAE:
    """The model of an experiment's folder."""
    return importlib.import_module(f"{name}.model").build_model(n_latents)


def digits_or_garments() -> Data:
    image = torch.randint(256, (60000, 1, 28, 28), dtype=torch.uint8)
    text = torch.randint(10, (60000,), dtype=torch.uint8)
    return Data(tensors={"image": image, "text": text}, transform=pictures_and_labels)


def canvases() -> Data:
    image = torch.randint(256, (60000, 1, 50, 50), dtype=torch.uint8)
    text = torch.randint(10, (60000, 4), dtype=torch.uint8)
    return Data(tensors={"image": image, "text": text}, transform=pictures_and_labels)


def faces() -> Data:
    image = torch.randint(256, (5000, 3, 64, 64), dtype=torch.uint8)
    attrs = torch.randint(2, (5000, len(ATTRIBUTES)), dtype=torch.uint8)
    return Data(tensors={"image": image, "attrs": attrs}, transform=pictures_and_attributes)


def faces_and_attributes() -> Data:
    return dataclasses.replace(faces(), transform=apart)


def six_pictures() -> Data:
    channels = {"image": 3, "gray": 1, "edge": 1, "mask": 1}
    tensors = {name: torch.randint(256, (2000, n, 64, 64), dtype=torch.uint8) for name, n in channels.items()}
    return Data(tensors=tensors, transform=vision.six)


class AttributeEncoder(nn.Module):
    """q(z | attribute) of one attribute: (batch,) of 0 and 1 -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(nn.Embedding(2, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU())
        self.mu = nn.Linear(512, n_latents)
        self.logvar = nn.Linear(512, n_latents)

    def forward(self, there: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(there.long())
        return self.mu(hidden), self.logvar(hidden)


def attribute_decoder(n_latents: int) -> nn.Sequential:
    """From z to one attribute's logit, (rows,)."""
    layers = (nn.Linear(n_latents, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU())
    return nn.Sequential(*layers, nn.Linear(512, 1), nn.Flatten(0))


def attributes_apart(n_latents: int) -> MVAE:
    """CelebA-19's model with a network apart for each of the 18 attributes."""
    encoders = {"image": FaceEncoder(3, n_latents), **{name: AttributeEncoder(n_latents) for name in ATTRIBUTES}}
    decoders = {"image": face_decoder(3, n_latents), **{name: attribute_decoder(n_latents) for name in ATTRIBUTES}}
    likelihoods = {name: Bernoulli(decoder) for name, decoder in decoders.items()}
    return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=n_latents)


LABEL = of_a_pair(("image",), ("text",))
TEXT = of_a_pair(("image",), ("text",), y_proposal=("text",))
FACE = of_a_pair(("image",), ("attrs",))
FACE_19 = of_a_pair(("image",), ATTRIBUTES)
SIX: dict[Quantity, list[Modalities]] = {
    **{Quantity((name,)): [(name,), vision.MODALITIES] for name in vision.MODALITIES},
    Quantity(vision.MODALITIES): [("image",), vision.MODALITIES],
    **{
        Quantity((name,), given=("image",), given_proposal=("image",)): [("image",), vision.MODALITIES]
        for name in vision.MODALITIES[1:]
    },
}

EXPERIMENTS = {
    "mnist": Experiment(
        data=digits_or_garments,
        batch_size=100,
        n_latents=64,
        weights={"image": 1.0, "text": 50.0},
        lr=1e-3,
        quantities=LABEL,
        predictions={"text": ("image",)},
        plain_encode={"text": plain.encode_labels},
    ),
    "fashionmnist": Experiment(
        data=digits_or_garments,
        batch_size=100,
        n_latents=64,
        weights={"image": 1.0, "text": 50.0},
        lr=1e-3,
        quantities=LABEL,
        predictions={"text": ("image",)},
        plain_encode={"text": plain.encode_labels},
    ),
    "multimnist": Experiment(
        data=canvases,
        batch_size=100,
        n_latents=100,
        weights={"image": 1.0, "text": 10.0},
        lr=1e-3,
        quantities=TEXT,
        predictions={},
    ),
    "celeba": Experiment(
        data=faces,
        batch_size=100,
        n_latents=100,
        weights={"image": 1.0, "attrs": 10.0},
        lr=1e-4,
        quantities=FACE,
        predictions={"attrs": ("image",)},
    ),
    "celeba19": Experiment(
        data=faces_and_attributes,
        batch_size=100,
        n_latents=100,
        weights={"image": 1.0, **dict.fromkeys(ATTRIBUTES, 10.0)},
        lr=1e-4,
        quantities=FACE_19,
        predictions=dict.fromkeys(ATTRIBUTES, ("image",)),
        plain_model=attributes_apart,
        approx_m=1,
    ),
    "vision": Experiment(
        data=six_pictures,
        batch_size=50,
        n_latents=250,
        weights={},
        lr=1e-4,
        quantities=SIX,
        predictions={},
        reconstruct="all",
    ),
}
