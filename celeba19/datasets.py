"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and each of 18 attributes, 0 or 1, as a modality by its name.

As a command it checks the data set and decodes its pictures: python datasets.py [--data-dir DIR]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mvae import cli
from mvae.data import celeba
from mvae.data.celeba import ATTRIBUTES, Source
from mvae.data.dataset import Data
from mvae.tools.controls import Attributes, Picture

from torch import Tensor

NAME = "celeba19"
MODALITIES = ("image", *ATTRIBUTES)
CONTROLS = {"image": Picture("RGB", 64), "attrs": Attributes(ATTRIBUTES, separate=True)}


def separated(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert `image` to floats in [0, 1] and each attribute (batch,) to floats 0 and 1: a `transform` of Data."""
    batch = celeba.pictures_and_attributes(rows)
    return {"image": batch["image"], **dict(zip(ATTRIBUTES, batch["attrs"].unbind(dim=1), strict=True))}


def training_data(config: Source, *, limit: int | None = None) -> tuple[Data, Data]:
    """Return the official training split (the first `limit` of it) and the official validation split."""
    train, validation = celeba.training_data(config, limit=limit)
    return dataclasses.replace(train, transform=separated), dataclasses.replace(validation, transform=separated)


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the official split "train", "validation" or "test"."""
    return dataclasses.replace(celeba.examples(split, config, settings), transform=separated)


def main() -> None:
    celeba.prepare(cli.parse(__doc__, Source))


if __name__ == "__main__":
    cli.run(main)
