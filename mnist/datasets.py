"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mvae.datasets import mnist
from mvae.scripts import flags, running, training
from mvae.scripts.kinds import Label, Picture

if TYPE_CHECKING:
    from mvae import Data

MODALITIES = ("image", "text")
CLASSES = tuple(str(digit) for digit in range(10))
CONTROLS = {"image": Picture("L", 28, dark=True, pen=2.5), "text": Label(CLASSES)}

training_data, test_data = partial(mnist.training_data, "MNIST"), partial(mnist.test_data, "MNIST")


def examples(split: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> "Data":
    """The split "train", "validation" or "test" as a model of these settings has it."""
    binarize = training.recorded(settings, "binarize", bool)
    if split == "test":
        return test_data(args.data_dir, binarize=binarize)
    train, validation = training_data(args.data_dir, n_val=training.recorded(settings, "n_val", int), binarize=binarize)
    return train if split == "train" else validation


def main() -> None:
    print(mnist.check("MNIST", flags.parser(__doc__).parse_args().data_dir))


if __name__ == "__main__":
    running.run(main)
