"""Grids of pictures, as PNG files."""

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

from .errors import UsageError
from .experts import draw
from .files import write_atomically
from .model import MVAE, Batch, evaluating

COLUMNS = 8
PADDING = 2  # pixels between pictures
LINE = 12  # pixels, of text


def save_grid(path: Path, images: Tensor, columns: int = COLUMNS) -> None:
    """Writes (n, channels, height, width) pictures in [0, 1] as one PNG. Raises UserError if it can't be written."""
    write_atomically(path, png(as_bytes(grid(images, columns))))


def grid(images: Tensor, columns: int) -> Tensor:
    """Pictures (n, channels, height, width) in rows of `columns`, with black lines of 2 pixels: (3, height, width)."""
    images = F.pad(images.expand(-1, 3, -1, -1), (2, 0, 2, 0))
    columns = min(columns, len(images))
    cells = torch.cat([images, torch.zeros_like(images[: -len(images) % columns])]).unflatten(0, (-1, columns))
    return F.pad(cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, 2, 0, 2))


@torch.no_grad()
def reconstructions(model: MVAE, batch: Batch) -> dict[str, Tensor]:
    """For each picture modality, a grid (3, height, width) with the true pictures in the first row.

    Below them their means given all modalities, then given each one alone, in the model's order; z is drawn.
    """
    givens = [
        {name: batch[name] for name in names} for names in (model.modalities, *zip(model.modalities, strict=True))
    ]
    draws, grids = [], {}
    with evaluating(model):
        for given in givens:
            mu, logvar = model.posterior(given)
            draws.append(draw(mu, logvar, torch.randn_like(mu)))
        for name in model.modalities:
            if batch[name].dim() == 4:
                rows = torch.cat([batch[name].unsqueeze(0), model.likelihood(name).mean(torch.stack(draws))])
                grids[name] = grid(rows.flatten(0, 1), len(batch[name])).cpu()
    return grids


@torch.no_grad()
def given_labels(model: MVAE, batch: Batch, most: int = 10) -> dict[tuple[str, str], Tensor]:
    """Grids (3, height, width) by label and picture modality: a row for each value that the label has in the batch.

    A label is a modality that is no picture; of its values there are the first `most`, in order. A row has the means of
    the picture for eight draws of z given the label, by the same noise in every row.
    """
    noise = torch.randn(COLUMNS, model.n_latents, device=next(model.parameters()).device)
    shown = [name for name in model.modalities if batch[name].dim() == 4]
    grids = {}
    with evaluating(model):
        for label in (name for name in model.modalities if name not in shown):
            mu, logvar = model.posterior({label: batch[label].unique(dim=0)[:most]})
            z = draw(mu.unsqueeze(1), logvar.unsqueeze(1), noise)  # (values, draws, latents)
            for name, mean in model.mean(z, shown).items():
                grids[label, name] = grid(mean.flatten(0, 1), COLUMNS).cpu()
    return grids


def as_bytes(images: Tensor) -> np.ndarray:
    """Pictures (..., channels, height, width) in [0, 1] as uint8 (..., height, width, channels)."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def png(pixels: np.ndarray, about: Mapping[str, Any] | None = None) -> bytes:
    """uint8 (height, width, 1 or 3) as a PNG file, with `about` as JSON in its text chunk "mvae"."""
    info = PngInfo()
    if about is not None:
        info.add_text("mvae", json.dumps(about))
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        buffer, format="PNG", pnginfo=info, optimize=True
    )
    return buffer.getvalue()


class Sheet:
    """A black canvas of `rows` x `columns` square pictures, with text beside rows and above columns, if there is any.

    Text that is longer than its row is high is broken into lines. The canvas is uint8, and all the memory that the
    sheet takes. Raises UsageError for a canvas so large that picture viewers refuse it.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        size: int,
        *,
        beside: Mapping[int, tuple[str, int]] | None = None,
        above: Sequence[str] = (),
    ):
        """`beside`: texts by the first of the rows that they are of, each with how many there are."""
        self.cell = size + PADDING
        texts = {row: _broken(text, n * self.cell - PADDING) for row, (text, n) in (beside or {}).items()}
        self.left = max((_width(text) + 2 * PADDING for text in texts.values() if text), default=0)
        self.top = LINE * max((text.count("\n") + 1 for text in above), default=0)
        height, width = (self.top + rows * self.cell + PADDING, self.left + columns * self.cell + PADDING)
        if height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            raise UsageError(
                f"a grid of {width}x{height} pixels is too large to look at: ask for fewer samples, or --save images"
            )
        canvas = Image.new("RGB", (width, height))
        pen = ImageDraw.Draw(canvas)
        for row, text in texts.items():
            pen.multiline_text((PADDING, self._y(row)), text, font=_font(), spacing=0)
        for column, text in enumerate(above):
            pen.multiline_text((self._x(column), 0), text, font=_font(), spacing=0)
        self.pixels = np.array(canvas)

    def _x(self, column: int) -> int:
        return self.left + PADDING + column * self.cell

    def _y(self, row: int) -> int:
        return self.top + PADDING + row * self.cell

    def put(self, row: int, column: int, image: Tensor) -> None:
        """Puts a picture (channels, size, size) in [0, 1] into its place."""
        pixels = as_bytes(image)
        top, left = self._y(row), self._x(column)
        self.pixels[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Writes a PNG file; see `png`. Raises UserError if it can't be written."""
        write_atomically(path, png(self.pixels, about))


def _font() -> Any:
    return ImageFont.load_default(10)


def _width(text: str) -> int:
    return int(max((_font().getlength(line) for line in text.split("\n")), default=0))


def _broken(text: str, height: int) -> str:
    """The text in lines as short as `height` pixels allow; at least 16 letters."""
    most = max(1, height // LINE)
    for width in range(16, len(text) + 16):
        lines = textwrap.wrap(text, width)
        if len(lines) <= most:
            return "\n".join(lines)
    return text
