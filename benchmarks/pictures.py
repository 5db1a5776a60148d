"""Make two pictures for the pages: a strip of what sample.py drew, and an animated walk among digits.

    python benchmarks/pictures.py runs/fast/mnist-fast-0/model_best.pth.tar

static/strip.png shows cells of other pictures in static/. static/mnist_walk.webp decodes latents on straight lines from
digit to digit, between draws from the fitted prior of the MNIST model given their labels.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from mnist.model import build_model
from mvae import cli, load_model
from mvae.files import write_atomically
from mvae.run.device import Machine
from mvae.run.grids import COLUMNS, PADDING, as_bytes, grid, png, sheet
from mvae.tools import prior

import numpy as np
import torch
from PIL import Image

from common import ROOT

STATIC = ROOT / "static"
SIDE = 112  # pixels of a picture in the strip
STRIP = {  # by heading: a file of eight columns, the side of its pictures in pixels, and row and column of each to show
    "given the label 5": ("mnist_five.png", 112, [(0, 0), (0, 1)]),
    "given the text 1773": ("multimnist_1773.png", 50, [(0, 0), (0, 1)]),
    "given half of a face, the whole": ("vision_completion.png", 64, [(0, 1), (1, 1), (0, 4), (1, 4)]),
}
FRAMES = 8  # from a digit to the next
SCALE = 3  # size of a pixel in the walk


@dataclass(kw_only=True)
class Config(Machine):
    model_path: Path  # MNIST checkpoint with a fitted prior next to it

    seed: int = 0  # random seed
    out_dir: Path = STATIC  # folder to write to


def strip() -> bytes:
    """Return a PNG with a row of pictures, each group under its heading."""
    cells, headings = [], []
    for heading, (name, side, places) in STRIP.items():
        headings += [heading, *[""] * (len(places) - 1)]
        with Image.open(STATIC / name) as picture:
            for row, column in places:
                left, top = picture.width - (COLUMNS - column) * (side + PADDING), PADDING + row * (side + PADDING)
                cell = picture.convert("RGB").crop((left, top, left + side, top + side))
                cells.append(np.array(cell.resize((SIDE, SIDE))))
    return png(sheet([""], [[]], [[cells]], headings))


@torch.no_grad()
def walk(config: Config) -> bytes:
    """Return an animated WebP: eight digits that pass from 0 to 9 and back to 0."""
    device = config.device()
    model, _ = load_model(config.model_path, "mnist", build_model, device)
    model.prior = prior.load(config.model_path, model, temperature=0.8)
    torch.manual_seed(config.seed)
    ends = [prior.draw_given(model, {"text": torch.tensor([digit], device=device)}, COLUMNS) for digit in range(10)]
    pairs = zip(ends, [*ends[1:], ends[0]], strict=True)
    z = torch.stack([torch.lerp(a, b, i / FRAMES) for a, b in pairs for i in range(FRAMES)])
    frames = [
        Image.fromarray(as_bytes(grid(means.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3), COLUMNS)))
        for means in model.likelihood("image").mean(z)
    ]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=120, loop=0, quality=60)
    return buffer.getvalue()


def main() -> None:
    config = cli.parse(__doc__, Config)
    write_atomically(config.out_dir / "mnist_walk.webp", walk(config))
    write_atomically(config.out_dir / "strip.png", strip())


if __name__ == "__main__":
    cli.run(main)
