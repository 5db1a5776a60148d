"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and 18 attributes, each 0 or 1, as `attrs` (18).

As a command it checks the data set and decodes its pictures: python datasets.py [--data-dir DIR]
"""

from collections.abc import Mapping
from typing import Any

from mvae import cli
from mvae.data import celeba
from mvae.data.celeba import ATTRIBUTES, Source
from mvae.data.dataset import Data
from mvae.tools.controls import Attributes, Picture

NAME = "celeba"
MODALITIES = ("image", "attrs")
CONTROLS = {"image": Picture("RGB", 64), "attrs": Attributes(ATTRIBUTES)}

training_data = celeba.training_data


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the official split "train", "validation" or "test"."""
    return celeba.examples(split, config, settings)


def main() -> None:
    celeba.prepare(cli.parse(__doc__, Source))


if __name__ == "__main__":
    cli.run(main)
