"""Draw the watermark, watermark.png: the letters MVAE along the diagonal, translucent, white with a dark rim.

    python watermark.py [FILE]

The same bytes each time, for one version of OpenCV.
"""

from pathlib import Path

import cv2
import numpy as np

from mvae.files import write_atomically
from mvae.scripts import flags, running, types

SIZE = 64
FINER = 16
"""The letters are drawn this many times larger, then averaged: that softens their edges."""

# Each letter's strokes as points x, y of a unit square, y downwards.
LETTERS: tuple[list[list[tuple[float, float]]], ...] = (
    [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
    [[(0, 0), (0.5, 1), (1, 0)]],
    [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.65), (0.8, 0.65)]],
    [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
)
WIDTH, HEIGHT, SPACING = 12, 18, 17.5
WHITE, RIM = (2.6, 0.5), (4.6, 0.25)
"""The width in pixels and the opacity of the white strokes, and of the dark ones beneath, which rim them."""


def strokes() -> list[np.ndarray]:
    """The letters' strokes, each (points, 2) in pixels, rising along the diagonal and centred."""
    cos = sin = np.sqrt(0.5)
    rotation = np.array([[cos, -sin], [sin, cos]])
    result = []
    for i, letter in enumerate(LETTERS):
        for points in letter:
            flat = (np.array(points) - 0.5) * (WIDTH, HEIGHT) + ((i - (len(LETTERS) - 1) / 2) * SPACING, 0)
            result.append(flat @ rotation + SIZE / 2)
    return result


def coverage(width: float) -> np.ndarray:
    """(64, 64), the part of each pixel in [0, 1] that strokes of this width in pixels cover."""
    canvas = np.zeros((SIZE * FINER, SIZE * FINER), dtype=np.uint8)
    lines = [(line * FINER).round().astype(np.int32) for line in strokes()]
    cv2.polylines(canvas, lines, isClosed=False, color=255, thickness=round(width * FINER))
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA) / 255


def watermark() -> np.ndarray:
    """The watermark, uint8 (64, 64, 4): red, green, blue and opacity, not premultiplied."""
    inner, outer = coverage(WHITE[0]), coverage(RIM[0])
    white, rim = WHITE[1] * inner, RIM[1] * np.maximum(outer - inner, 0)
    opacity = white + rim
    grey = np.divide(white, opacity, out=np.ones_like(white), where=opacity > 0)
    return (np.stack([grey, grey, grey, opacity], axis=2) * 255).round().astype(np.uint8)


def main() -> None:
    parser = flags.Parser(description="Draw the watermark.")
    default = Path(__file__).with_name("watermark.png")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=types.output, default=default, help="default: beside this file"
    )
    path = parser.parse_args().file
    _, encoded = cv2.imencode(".png", cv2.cvtColor(watermark(), cv2.COLOR_RGBA2BGRA))
    write_atomically(path, encoded.tobytes())


if __name__ == "__main__":
    running.run(main)
