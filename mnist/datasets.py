"""MNIST: pictures (1, 28, 28) in [0, 1] as `image`, and their labels 0 to 9 as `text`.

As a command it downloads what is absent, and checks it: python datasets.py [--data-dir DIR]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvae import cli, data
from mvae.errors import UserError

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
        train = data.Data(tensors=train.tensors, transform=lambda rows: _binary(_batch(rows)))
        validation = _binarized_once(validation)
    return train, validation


def test_data(data_dir: Path, *, binarize: bool = False) -> data.Data:
    """MNIST's test split; with `binarize`, drawn once with a fixed seed. Raises UserError as `training_data` does."""
    test = _load(data_dir, "t10k")
    return _binarized_once(test) if binarize else test


def held_out_image(data_dir: Path, label: int, settings: Mapping[str, Any]) -> Tensor:
    """A random validation picture of a digit, (1, 1, 28, 28), for a model trained with these settings.

    Raises UserError as `training_data` does, and if no validation picture has that label.
    """
    _, validation = training_data(data_dir, n_val=settings["n_val"], binarize=settings["binarize"])
    rows = (validation.tensors["text"] == label).nonzero().flatten()
    if not len(rows):
        raise UserError(f"none of the {len(validation)} validation pictures shows a {CLASSES[label]}")
    return validation.batch(rows[torch.randint(len(rows), (1,))])[0]["image"]


def _load(data_dir: Path, part: str) -> data.Data:
    images, labels = data.load_idx(data_dir, "MNIST", part)
    return data.Data(tensors={"image": images.unsqueeze(1), "text": labels}, transform=_batch)


def _batch(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"image": rows["image"].float() / 255, "text": rows["text"].long()}


def _binary(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "image": batch["image"].bernoulli()}


def _binarized_once(stored: data.Data) -> data.Data:
    grey = stored.tensors["image"].float() / 255
    image = grey.bernoulli(generator=torch.Generator().manual_seed(0)).mul(255).byte()
    return data.Data(tensors={**stored.tensors, "image": image}, transform=_batch)


def main() -> None:
    args = cli.parser(__doc__).parse_args()
    counts = [len(_load(args.data_dir, part)) for part in ("train", "t10k")]
    print(f"MNIST in {args.data_dir} is complete: {counts[0]} training and {counts[1]} test examples")


if __name__ == "__main__":
    cli.run(main)
