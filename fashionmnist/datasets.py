"""FashionMNIST: pictures (1, 28, 28) in [0, 1] as `image`, and the numbers 0 to 9 of their classes as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

import argparse
from pathlib import Path

from mvae import cli, data

MODALITIES = ("image", "text")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def class_number(text: str) -> int:
    """An argparse type: the number of a class that is given by its number or, in any case, its name."""
    numbers = [str(number) for number in range(len(CLASSES))]
    names = [name.casefold() for name in CLASSES]
    for known in (numbers, names):
        if text.casefold() in known:
            return known.index(text.casefold())
    allowed = ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))
    raise argparse.ArgumentTypeError(f"{text!r} is no class: give the number or the name of one of {allowed}")


def training_data(
    data_dir: Path, *, n_val: int, limit: int | None = None, binarize: bool = False
) -> tuple[data.Data, data.Data]:
    """Training and validation examples, of FashionMNIST's training split.

    With `binarize`, each pixel is drawn from Bernoulli(grey value): for training afresh at every step, for validation
    once. Raises UserError if the files can't be had or are damaged.
    """
    train, validation = data.split(_load(data_dir, "train"), n_val, limit)
    if binarize:
        return data.binarize(train, "image"), data.binarize_once(validation, "image")
    return train, validation


def test_data(data_dir: Path, *, binarize: bool = False) -> data.Data:
    """FashionMNIST's test split; with `binarize`, drawn once by a fixed seed. Raises UserError as `training_data`."""
    test = _load(data_dir, "t10k")
    return data.binarize_once(test, "image") if binarize else test


def _load(data_dir: Path, part: str) -> data.Data:
    images, labels = data.load_idx(data_dir, "FashionMNIST", part)
    return data.Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=data.pictures_and_labels)


def main() -> None:
    args = cli.parser(__doc__).parse_args()
    counts = [len(_load(args.data_dir, part)) for part in ("train", "t10k")]
    print(f"FashionMNIST in {args.data_dir} is complete: {counts[0]} training and {counts[1]} test examples")


if __name__ == "__main__":
    cli.run(main)
