"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and 18 attributes, each 0 or 1, as `attrs` (18).

As a command it checks the data set and decodes its pictures: python datasets.py [--data-dir DIR]
"""

from mvae import cli
from mvae.data import celeba
from mvae.data.celeba import ATTRIBUTES, Source
from mvae.tools.controls import Attributes, Picture

NAME = "celeba"
CONTROLS = {"image": Picture("RGB", 64), "attrs": Attributes(ATTRIBUTES)}

training_data, examples = celeba.training_data, celeba.examples


def main() -> None:
    celeba.prepare(cli.parse(__doc__, Source))


if __name__ == "__main__":
    cli.run(main)
