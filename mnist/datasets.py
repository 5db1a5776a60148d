"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

from functools import partial

from mvae.datasets import mnist
from mvae.scripts import flags

MODALITIES = ("image", "text")
CLASSES = tuple(str(digit) for digit in range(10))

training_data, test_data = partial(mnist.training_data, "MNIST"), partial(mnist.test_data, "MNIST")


def main() -> None:
    print(mnist.check("MNIST", flags.parser(__doc__).parse_args().data_dir))


if __name__ == "__main__":
    flags.run(main)
