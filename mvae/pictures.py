"""Grids of pictures, as PNG files."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .files import write_atomically
from .model import MVAE, Batch


def save_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Writes (n, channels, height, width) pictures in [0, 1] as one PNG. Raises UserError if it can't be written."""
    buffer = io.BytesIO()
    to_image(grid(images, columns)).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def grid(images: Tensor, columns: int) -> Tensor:
    """Pictures (n, channels, height, width) in rows of `columns`, with black lines of 2 pixels: (3, height, width)."""
    images = F.pad(images.expand(-1, 3, -1, -1), (2, 0, 2, 0))
    columns = min(columns, len(images))
    cells = torch.cat([images, torch.zeros_like(images[: -len(images) % columns])]).unflatten(0, (-1, columns))
    return F.pad(cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, 2, 0, 2))


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3 or 1, height, width) in [0, 1] as PIL has them."""
    pixels = (picture * 255).byte().cpu().movedim(0, 2).squeeze(2).numpy()
    return Image.fromarray(pixels)


@torch.no_grad()
def reconstructions(model: MVAE, batch: Batch) -> dict[str, Tensor]:
    """For each picture modality, a grid (3, height, width) with the true pictures in the first row.

    Below them their means given all modalities, then given each one alone, in the model's order; z is drawn.
    """
    was_training = model.training
    model.eval()
    givens = [
        {name: batch[name] for name in names} for names in (model.modalities, *zip(model.modalities, strict=True))
    ]
    draws = []
    for given in givens:
        mu, logvar = model.posterior(given)
        draws.append(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
    grids = {}
    for name in model.modalities:
        if batch[name].dim() == 4:
            rows = torch.cat([batch[name].unsqueeze(0), model.likelihood(name).mean(torch.stack(draws))])
            grids[name] = grid(rows.flatten(0, 1), len(batch[name])).cpu()
    model.train(was_training)
    return grids
