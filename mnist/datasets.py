"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent and checks it: python datasets.py [--data-dir DIR]
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mvae import cli
from mvae.data import mnist
from mvae.data.dataset import Data, DataDir
from mvae.tools.controls import Label, Picture

NAME = "mnist"
MODALITIES = ("image", "text")
CLASSES = tuple(str(digit) for digit in range(10))
CONTROLS = {"image": Picture("L", 28, dark=True, pen=2.5), "text": Label(CLASSES)}
Source = DataDir

training_data, test_data = partial(mnist.training_data, "MNIST"), partial(mnist.test_data, "MNIST")


def examples(split: str, config: Source, settings: Mapping[str, Any]) -> Data:
    """Return the split "train", "validation" or "test" as a model with these settings uses it."""
    if split == "test":
        return test_data(config.data_dir, binarize=settings["binarize"])
    train, validation = training_data(config.data_dir, n_val=settings["n_val"], binarize=settings["binarize"])
    return train if split == "train" else validation


def main() -> None:
    print(mnist.check("MNIST", cli.parse(__doc__, Source).data_dir))


if __name__ == "__main__":
    cli.run(main)
