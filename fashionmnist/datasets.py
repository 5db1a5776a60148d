"""FashionMNIST: pictures (1, 28, 28) in [0, 1] as `image`, and the numbers 0 to 9 of their classes as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

import argparse
from functools import partial

from mvae.datasets import mnist
from mvae.scripts import flags

MODALITIES = ("image", "text")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

training_data, test_data = partial(mnist.training_data, "FashionMNIST"), partial(mnist.test_data, "FashionMNIST")


def class_number(text: str) -> int:
    """An argparse type: the number of a class that is given by its number or, in any case, its name."""
    numbers = [str(number) for number in range(len(CLASSES))]
    names = [name.casefold() for name in CLASSES]
    for known in (numbers, names):
        if text.casefold() in known:
            return known.index(text.casefold())
    allowed = ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))
    raise argparse.ArgumentTypeError(f"{text!r} is no class: give the number or the name of one of {allowed}")


def main() -> None:
    print(mnist.check("FashionMNIST", flags.parser(__doc__).parse_args().data_dir))


if __name__ == "__main__":
    flags.run(main)
