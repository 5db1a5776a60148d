"""The experiments to measure: random data in the shapes of the real ones, and the settings of train.py."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from celeba19.datasets import separated
from mvae import MVAE, Data, Objective, Quantity, Term, of_a_pair
from mvae.data.celeba import ATTRIBUTES, pictures_and_attributes
from mvae.data.dataset import pictures_and_labels
from mvae.estimators import Modalities
from vision import datasets as vision

import torch
from torch import Tensor

import plain

Name = Literal["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
NAMES: tuple[Name, ...] = get_args(Name)


class Experiment(NamedTuple):
    """The settings of one experiment.

    data: returns random training data on the CPU, as stored.
    weights: λ by modality.
    quantities, predictions: what loglike.py estimates, with its proposals, and predicts, and from what.
    plain_encode: by modality, the plain reference's way to run an encoder that ours runs on classes; see `plain.loss`.
    approx_m: random subsets per step.
    reconstruct_all: each term reconstructs all modalities instead of its inputs.
    """

    data: Callable[[], Data]
    weights: Mapping[str, float]
    quantities: Mapping[Quantity, Sequence[Modalities]]
    predictions: Mapping[str, tuple[str, ...]] = {}
    batch_size: int = 100
    n_latents: int = 100
    lr: float = 1e-3
    plain_encode: Mapping[str, plain.Encode] = {}
    approx_m: int = 0
    reconstruct_all: bool = False

    def objective(self, model: MVAE) -> Objective:
        """Return the paper's objective for a model."""
        names = model.modalities
        also = names if self.reconstruct_all else ()
        terms = [Term(names, names), *(Term((name,), (name, *also)) for name in names)]
        return Objective(model, terms, weights=self.weights, subset_also=also)


def build_model(name: str, n_latents: int) -> MVAE:
    """Return the model of an experiment's folder."""
    return importlib.import_module(f"{name}.model").build_model(n_latents)


def random_pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def digits(side: int, *places: int) -> Data:
    text = torch.randint(10, (60000, *places), dtype=torch.uint8)
    return Data(tensors={"image": random_pictures(60000, 1, side, side), "text": text}, transform=pictures_and_labels)


def faces() -> Data:
    attrs = torch.randint(2, (5000, len(ATTRIBUTES)), dtype=torch.uint8)
    tensors = {"image": random_pictures(5000, 3, 64, 64), "attrs": attrs}
    return Data(tensors=tensors, transform=pictures_and_attributes)


def six_pictures() -> Data:
    channels = {"image": 3, "gray": 1, "edge": 1, "mask": 1}
    return Data(tensors={name: random_pictures(2000, n, 64, 64) for name, n in channels.items()}, transform=vision.six)


IMAGE = ("image",)
SIX: dict[Quantity, list[Modalities]] = {
    **{Quantity((name,)): [(name,), vision.MODALITIES] for name in vision.MODALITIES},
    Quantity(vision.MODALITIES): [IMAGE, vision.MODALITIES],
    **{Quantity((name,), IMAGE, IMAGE): [IMAGE, vision.MODALITIES] for name in vision.MODALITIES[1:]},
}

MNIST = Experiment(
    data=lambda: digits(28),
    weights={"image": 1.0, "text": 50.0},
    quantities=of_a_pair(IMAGE, ("text",)),
    predictions={"text": IMAGE},
    n_latents=64,
    plain_encode={"text": plain.encode_labels},
)
EXPERIMENTS: dict[str, Experiment] = {
    "mnist": MNIST,
    "fashionmnist": MNIST,
    "multimnist": Experiment(
        data=lambda: digits(50, 4),
        weights={"image": 1.0, "text": 10.0},
        quantities=of_a_pair(IMAGE, ("text",), y_proposal=("text",)),
    ),
    "celeba": Experiment(
        data=faces,
        weights={"image": 1.0, "attrs": 10.0},
        quantities=of_a_pair(IMAGE, ("attrs",)),
        predictions={"attrs": IMAGE},
        lr=1e-4,
    ),
    "celeba19": Experiment(
        data=lambda: dataclasses.replace(faces(), transform=separated),
        weights={"image": 1.0, **dict.fromkeys(ATTRIBUTES, 10.0)},
        quantities=of_a_pair(IMAGE, ATTRIBUTES),
        predictions=dict.fromkeys(ATTRIBUTES, IMAGE),
        lr=1e-4,
        plain_encode=dict.fromkeys(ATTRIBUTES, plain.encode_attribute),
        approx_m=1,
    ),
    "vision": Experiment(
        data=six_pictures, weights={}, quantities=SIX, batch_size=50, n_latents=250, lr=1e-4, reconstruct_all=True
    ),
}
