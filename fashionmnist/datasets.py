"""FashionMNIST: pictures (1, 28, 28) in [0, 1] as `image`, and the numbers 0 to 9 of their classes as `text`.

As a command it downloads what is absent and checks it: python datasets.py [--data-dir DIR]
"""

from functools import partial

from mvae import cli
from mvae.data import mnist
from mvae.data.dataset import DataDir
from mvae.tools.controls import Label, Picture

NAME = "fashionmnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CONTROLS = {"image": Picture("L", 28, dark=True, pen=4), "text": Label(CLASSES)}
Source = DataDir

training_data, examples = partial(mnist.training_data, "FashionMNIST"), partial(mnist.examples, "FashionMNIST")


def main() -> None:
    print(mnist.check("FashionMNIST", cli.parse(__doc__, Source).data_dir))


if __name__ == "__main__":
    cli.run(main)
