"""Grids of pictures, as tensors and as PNG files."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from ..experts import draw
from ..files import write_atomically
from ..model import MVAE, Batch, evaluating

COLUMNS = 8
PADDING = 2  # pixels between pictures
LINE = 15  # pixels per line of text
FONT: Any = ImageFont.load_default(13)
VIEWABLE = 80_000_000  # pixels of a file that picture viewers accept


def save_grid(path: Path, images: Tensor, columns: int = COLUMNS) -> None:
    """Write (n, channels, height, width) pictures in [0, 1] as one PNG. Raises UserError if it can't be written."""
    write_atomically(path, png(as_bytes(grid(images, columns))))


def grid(images: Tensor, columns: int) -> Tensor:
    """Arrange (n, channels, height, width) pictures in rows, with black lines of 2 pixels: (3, height, width)."""
    images = F.pad(images.expand(-1, 3, -1, -1), (PADDING, 0, PADDING, 0))
    columns = min(columns, len(images))
    cells = torch.cat([images, torch.zeros_like(images[: -len(images) % columns])]).unflatten(0, (-1, columns))
    return F.pad(cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, PADDING, 0, PADDING))


def is_picture(x: Tensor) -> bool:
    """Return whether a modality can be drawn: floats (batch, 1 or 3, height, width)."""
    return x.is_floating_point() and x.dim() == 4 and x.shape[1] in (1, 3)


@torch.no_grad()
def reconstructions(model: MVAE, batch: Batch) -> dict[str, Tensor]:
    """Return a grid (3, height, width) for each picture modality, with the data in the first row.

    The rows below are means given all modalities, then given each modality alone, in the model's order; z is drawn.
    """
    givens = [model.modalities, *((name,) for name in model.modalities)]
    draws, grids = [], {}
    with evaluating(model):
        for given in givens:
            mu, logvar = model.fused({name: batch[name] for name in given})
            draws.append(draw(mu, logvar, torch.randn_like(mu)))
        for name in model.modalities:
            if is_picture(batch[name]):
                rows = torch.cat([batch[name].unsqueeze(0), model.likelihood(name).mean(torch.stack(draws))])
                grids[name] = grid(rows.flatten(0, 1), len(batch[name])).cpu()
    return grids


@torch.no_grad()
def given_labels(model: MVAE, batch: Batch, most: int = 10) -> dict[tuple[str, str], Tensor]:
    """Return a grid (3, height, width) for each pair of a label and a picture modality: a row for each label value.

    A label is any modality of at most two dimensions; the first `most` of its values in the batch are used, in order.
    A row holds the picture's means for eight draws of z given the label, with the same noise in every row.
    """
    noise = torch.randn(COLUMNS, model.n_latents, device=next(model.parameters()).device)
    drawn = [name for name in model.modalities if is_picture(batch[name])]
    grids = {}
    with evaluating(model):
        for label in (name for name in model.modalities if batch[name].dim() <= 2):
            mu, logvar = model.fused({label: batch[label].unique(dim=0)[:most]})
            z = draw(mu.unsqueeze(1), logvar.unsqueeze(1), noise)  # (values, draws, latents)
            for name, mean in model.mean(z, drawn).items():
                grids[label, name] = grid(mean.flatten(0, 1), COLUMNS).cpu()
    return grids


def as_bytes(images: Tensor) -> np.ndarray:
    """Convert pictures (..., channels, height, width) in [0, 1] to uint8 (..., height, width, channels)."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def png(pixels: np.ndarray, about: Mapping[str, Any] | None = None) -> bytes:
    """Encode uint8 (height, width, 1 or 3) as a PNG file, with `about` as JSON in its text chunk "mvae"."""
    info = PngInfo()
    if about is not None:
        info.add_text("mvae", json.dumps(about))
    buffer = io.BytesIO()
    _image(pixels).save(buffer, format="PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()


def sheet(
    captions: Sequence[str],
    left: Sequence[Sequence[np.ndarray | None]],
    lines: Sequence[Sequence[Any]],
    headings: Sequence[str] = (),
    scale: int = 1,
) -> np.ndarray:
    """Arrange pictures, uint8 (size, size, 1 or 3), on a black canvas (height, width, 3): a group for each caption.

    A group has its caption at the left, broken into lines, and its `lines` of pictures at the right. Between them are
    the pictures `left`, in its first line; None leaves a gap. `headings` are the text above each column. `scale` is the
    size of a picture's pixels.
    """
    every = [picture for group in (*lines, left) for line in group for picture in line if picture is not None]
    cell = max(map(len, every)) * scale + PADDING
    texts = [_broken(text, len(group) * cell - PADDING) for text, group in zip(captions, lines, strict=True)]
    indent = PADDING + max((_width(text) + 2 * PADDING for text in texts if text), default=0)
    margin = max(map(len, left))
    top = PADDING + LINE * max((text.count("\n") + 1 for text in headings), default=0)
    n_columns = margin + max(len(line) for group in lines for line in group)
    canvas = Image.new("RGB", (indent + n_columns * cell, top + sum(map(len, lines)) * cell))
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(headings):
        pen.multiline_text((indent + column * cell, 0), text, font=FONT, spacing=0)
    for text, beside, group in zip(texts, left, lines, strict=True):
        pen.multiline_text((PADDING, top), text, font=FONT, spacing=0)
        for i, line in enumerate(group):
            for column, picture in [*enumerate(beside if i == 0 else ()), *enumerate(line, margin)]:
                if picture is not None:
                    enlarged = _image(picture.repeat(scale, axis=0).repeat(scale, axis=1))
                    canvas.paste(enlarged, (indent + column * cell, top))
            top += cell
    return np.array(canvas)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _width(text: str) -> int:
    return int(max((FONT.getlength(line) for line in text.split("\n")), default=0))


def _broken(text: str, height: int) -> str:
    """Break text into as many lines as fit into `height` pixels, each as short as possible but for 16 letters."""
    most = max(1, height // LINE)
    for width in range(16, len(text) + 16):
        lines = textwrap.wrap(text, width)
        if len(lines) <= most:
            return "\n".join(lines)
    return text
