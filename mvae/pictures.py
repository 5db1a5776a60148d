"""Grids of pictures, as PNG files."""

import io
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .files import write_atomically
from .model import MVAE, Batch


def save_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Writes (n, channels, height, width) pictures in [0, 1] as one PNG. Raises UserError if it can't be written."""
    buffer = io.BytesIO()
    to_pil_image(make_grid(images.cpu(), nrow=columns, padding=2)).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


@torch.no_grad()
def reconstructions(model: MVAE, batch: Batch) -> dict[str, Tensor]:
    """For each picture modality, a grid (3, height, width) with the true pictures in the first row.

    Below them their means given all modalities, then given each one alone, in the model's order; z is drawn.
    """
    was_training = model.training
    model.eval()
    givens = [batch, *({name: batch[name]} for name in model.modalities)]
    draws = []
    for given in givens:
        mu, logvar = model.posterior(given)
        draws.append(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
    grids = {}
    for name in model.modalities:
        if batch[name].dim() == 4:
            rows = torch.cat([batch[name].unsqueeze(0), model.likelihood(name).mean(torch.stack(draws))])
            grids[name] = make_grid(rows.flatten(0, 1).cpu(), nrow=len(batch[name]), padding=2)
    model.train(was_training)
    return grids
