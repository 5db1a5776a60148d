"""Random changes of training pictures, drawn anew for each batch."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .dataset import Data


def shifted(data: Data, name: str, most: int) -> Data:
    """Return `data` with pictures that are shifted by up to `most` pixels in both directions; what comes in is black.

    name: the modality of the pictures, (batch, channels, height, width).
    """
    if not most:
        return data

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = data.transform(rows)
        x = batch[name]
        n, _, height, width = x.shape
        windows = F.pad(x, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (n, channels, shifts, shifts, ...)
        down, right = torch.randint(2 * most + 1, (2, n), device=x.device)
        return {**batch, name: windows[torch.arange(n, device=x.device), :, down, right]}

    return dataclasses.replace(data, transform=transform)
