"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and each of 18 attributes, 0 or 1, as a modality by its name.

As a command it looks whether the set is complete, and decodes its pictures: python datasets.py [--data-dir DIR]
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvae.datasets import celeba
from mvae.datasets.celeba import ATTRIBUTES
from mvae.scripts import faces, running
from mvae.scripts.kinds import Attributes, Picture

if TYPE_CHECKING:
    from torch import Tensor

    from mvae import Data

MODALITIES = ("image", *ATTRIBUTES)
CONTROLS = {"image": Picture("RGB", 64), "attrs": Attributes(ATTRIBUTES, apart=True)}


def apart(rows: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """A `transform`: `image` as floats in [0, 1], and each attribute (batch,) as floats, 0 and 1."""
    batch = celeba.pictures_and_attributes(rows)
    return {"image": batch["image"], **dict(zip(ATTRIBUTES, batch["attrs"].unbind(dim=1), strict=True))}


def training_data(
    data_dir: Path, cache_dir: Path, *, limit: int | None = None, allow_missing: bool, workers: int
) -> tuple["Data", "Data"]:
    """The official training split (the first `limit` of it) and the official validation split, of all modalities."""
    parts = celeba.training_data(data_dir, cache_dir, limit=limit, allow_missing=allow_missing, workers=workers)
    train, validation = (dataclasses.replace(part, transform=apart) for part in parts)
    return train, validation


def test_data(data_dir: Path, cache_dir: Path, *, allow_missing: bool, workers: int) -> "Data":
    """The official test split, of all modalities."""
    test = celeba.test_data(data_dir, cache_dir, allow_missing=allow_missing, workers=workers)
    return dataclasses.replace(test, transform=apart)


def examples(split: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> "Data":
    """The official split "train", "validation" or "test"."""
    return faces.examples(split, args, training_data, test_data)


def main() -> None:
    faces.prepare(__doc__)


if __name__ == "__main__":
    running.run(main)
