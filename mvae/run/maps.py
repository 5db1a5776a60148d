"""Maps of latents: their projections to two dimensions, and a picture of them."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import UsageError

Projection = Callable[[np.ndarray, int], np.ndarray]
"""From points (n, latents) and a seed to points (n, 2)."""

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip


def pca(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """The two principal components of points (n, latents), (n, 2); nothing is drawn by `seed`.

    An axis points to where its largest weight is positive, so that maps of similar points look alike.
    """
    centred = points - points.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    found = centred @ (axes * signs[:, None]).T
    return np.pad(found, [(0, 0), (0, 2 - found.shape[1])])


def projection(name: str) -> Projection:
    """The projection "pca", "tsne" (scikit-learn's) or "umap" (umap-learn's).

    Raises UsageError if its package isn't installed.
    """
    if name == "pca":
        return pca
    package = {"tsne": "scikit-learn", "umap": "umap-learn"}[name]
    try:
        if name == "umap":
            from umap import UMAP

            return lambda points, seed: UMAP(random_state=seed % 2**32).fit_transform(points)
        from sklearn.manifold import TSNE
    except ImportError:
        raise UsageError(f"`map` {name} needs {package}: pip install {package}") from None

    def tsne(points: np.ndarray, seed: int) -> np.ndarray:
        return TSNE(random_state=seed % 2**32, perplexity=min(30, (len(points) - 1) / 3)).fit_transform(points)

    return tsne


def draw(points: np.ndarray, classes: Sequence[int], names: Sequence[str], title: str, size: int = 800) -> np.ndarray:
    """A picture of points (n, 2) in the colours of their classes, below them the classes' names.

    It is uint8 (height, width, 3), `size` pixels wide.
    """
    scale = 2  # it is drawn larger, and then reduced, so that the dots are round
    side, line, dot = size * scale, 18 * scale, max(2, size // 266) * scale
    font = ImageFont.load_default(12 * scale)
    entries, x, y = [], line, side
    for i, name in enumerate(names):
        width = int(font.getlength(name)) + 2 * line
        if x + width > side:
            x, y = line, y + line
        entries.append((x, y, COLOURS[i % len(COLOURS)], name))
        x += width
    image = Image.new("RGB", (side, y + line * bool(names) + dot), "white")
    pen = ImageDraw.Draw(image)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 2 * line
    span = max(float((high - low).max()), 1e-12)
    places = (points - (low + high) / 2) / span * (side - 2 * margin) + side / 2
    for (px, py), label in zip(places.tolist(), classes, strict=True):
        pen.ellipse((px - dot, side - py - dot, px + dot, side - py + dot), fill=COLOURS[label % len(COLOURS)])
    pen.text((line, dot), title, fill="black", font=font)
    for x, y, colour, name in entries:
        pen.ellipse((x, y + dot, x + 3 * dot, y + 4 * dot), fill=colour)
        pen.text((x + 4 * dot, y), name, fill="black", font=font)
    return np.asarray(image.reduce(scale))
