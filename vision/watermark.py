"""Draw watermark.png: the letters MVAE along the diagonal, translucent, white with a dark rim.

The bytes are the same each time, for one version of OpenCV.
"""

from pathlib import Path

from mvae import cli
from mvae.files import write_atomically

import cv2
import numpy as np

SIZE = 64
FINER = 16
"""The letters are drawn this many times larger and averaged down, which softens their edges."""

# Each letter's strokes as points (x, y) of a unit square, y downwards.
LETTERS: tuple[list[list[tuple[float, float]]], ...] = (
    [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
    [[(0, 0), (0.5, 1), (1, 0)]],
    [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.65), (0.8, 0.65)]],
    [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
)
WIDTH, HEIGHT, SPACING = 12, 18, 17.5
WHITE, RIM = (2.6, 0.5), (4.6, 0.25)
"""The width in pixels and the opacity of the white strokes, and of the dark ones beneath them."""


def strokes() -> list[np.ndarray]:
    """Return the letters' strokes, each (points, 2) in pixels, rising along the diagonal and centred."""
    cos = sin = np.sqrt(0.5)
    rotation = np.array([[cos, -sin], [sin, cos]])
    result = []
    for i, letter in enumerate(LETTERS):
        for points in letter:
            flat = (np.array(points) - 0.5) * (WIDTH, HEIGHT) + ((i - (len(LETTERS) - 1) / 2) * SPACING, 0)
            result.append(flat @ rotation + SIZE / 2)
    return result


def coverage(width: float) -> np.ndarray:
    """Return the fraction of each pixel that strokes of this width in pixels cover, (64, 64)."""
    canvas = np.zeros((SIZE * FINER, SIZE * FINER), dtype=np.uint8)
    lines = [(line * FINER).round().astype(np.int32) for line in strokes()]
    cv2.polylines(canvas, lines, isClosed=False, color=255, thickness=round(width * FINER))
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA) / 255


def watermark() -> np.ndarray:
    """Return the watermark, uint8 (64, 64, 4): red, green, blue and opacity, not premultiplied."""
    inner, outer = coverage(WHITE[0]), coverage(RIM[0])
    white, rim = WHITE[1] * inner, RIM[1] * np.maximum(outer - inner, 0)
    opacity = white + rim
    grey = np.divide(white, opacity, out=np.ones_like(white), where=opacity > 0)
    return (np.stack([grey, grey, grey, opacity], axis=2) * 255).round().astype(np.uint8)


def main() -> None:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(watermark(), cv2.COLOR_RGBA2BGRA))
    write_atomically(Path(__file__).with_name("watermark.png"), encoded.tobytes())


if __name__ == "__main__":
    cli.run(main)
