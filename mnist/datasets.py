"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

from pathlib import Path

from mvae import cli, data

MODALITIES = ("image", "text")
CLASSES = tuple(str(digit) for digit in range(10))


def training_data(
    data_dir: Path, *, n_val: int, limit: int | None = None, binarize: bool = False
) -> tuple[data.Data, data.Data]:
    """Training and validation examples, of MNIST's training split.

    With `binarize`, each pixel is drawn from Bernoulli(grey value): for training afresh at every step, for validation
    once. Raises UserError if the files can't be had or are damaged.
    """
    train, validation = data.split(_load(data_dir, "train"), n_val, limit)
    if binarize:
        return data.binarize(train, "image"), data.binarize_once(validation, "image")
    return train, validation


def test_data(data_dir: Path, *, binarize: bool = False) -> data.Data:
    """MNIST's test split; with `binarize`, drawn once with a fixed seed. Raises UserError as `training_data` does."""
    test = _load(data_dir, "t10k")
    return data.binarize_once(test, "image") if binarize else test


def _load(data_dir: Path, part: str) -> data.Data:
    images, labels = data.load_idx(data_dir, "MNIST", part)
    return data.Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=data.pictures_and_labels)


def main() -> None:
    args = cli.parser(__doc__).parse_args()
    counts = [len(_load(args.data_dir, part)) for part in ("train", "t10k")]
    print(f"MNIST in {args.data_dir} is complete: {counts[0]} training and {counts[1]} test examples")


if __name__ == "__main__":
    cli.run(main)
