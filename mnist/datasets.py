"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent and checks it: python datasets.py [--data-dir DIR]
"""

from functools import partial

from mvae import cli
from mvae.data import mnist
from mvae.data.dataset import DataDir
from mvae.tools.controls import Label, Picture

NAME = "mnist"
CLASSES = tuple(str(digit) for digit in range(10))
CONTROLS = {"image": Picture("L", 28, dark=True, pen=2.5), "text": Label(CLASSES)}
Source = DataDir

training_data, examples = partial(mnist.training_data, "MNIST"), partial(mnist.examples, "MNIST")


def main() -> None:
    print(mnist.check("MNIST", cli.parse(__doc__, Source).data_dir))


if __name__ == "__main__":
    cli.run(main)
