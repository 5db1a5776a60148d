"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and 18 attributes, each 0 or 1, as `attrs` (18).

As a command it looks whether the set is complete, and decodes its pictures: python datasets.py [--data-dir DIR]
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mvae.datasets import celeba
from mvae.scripts import faces, running
from mvae.scripts.kinds import Attributes, Picture

if TYPE_CHECKING:
    from mvae import Data

MODALITIES = ("image", "attrs")
CONTROLS = {"image": Picture("RGB", 64), "attrs": Attributes(celeba.ATTRIBUTES)}
training_data, test_data = celeba.training_data, celeba.test_data


def examples(split: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> "Data":
    """The official split "train", "validation" or "test"."""
    return faces.examples(split, args, training_data, test_data)


def main() -> None:
    faces.prepare(__doc__)


if __name__ == "__main__":
    running.run(main)
