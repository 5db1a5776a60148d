"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and 18 attributes, each 0 or 1, as `attrs` (18).

As a command it looks whether the set is complete, and decodes its pictures: python datasets.py [--data-dir DIR]
"""

from mvae.datasets import celeba
from mvae.scripts import faces, flags

MODALITIES = ("image", "attrs")
training_data, test_data = celeba.training_data, celeba.test_data


def main() -> None:
    faces.prepare(__doc__)


if __name__ == "__main__":
    flags.run(main)
