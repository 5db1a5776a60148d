"""Maps of latents: projections to two dimensions, and their plots."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from ..errors import UsageError

_PAIRS = matplotlib.color_sequences["tab20"]  # dark, light, dark, ...
COLOURS = [matplotlib.colors.to_hex(colour) for colour in _PAIRS[::2] + _PAIRS[1::2]]


def project(points: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Project points (n, latents) to (n, 2) by "pca", "tsne" or "umap". Raises UsageError if that isn't possible."""
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise UsageError("--map umap needs umap-learn: pip install umap-learn") from None
        return UMAP(random_state=seed % 2**32).fit_transform(points)
    if method == "pca":
        return pca(points)
    if len(points) < 4 or points.shape[1] < 2:
        raise UsageError(f"--map tsne needs at least 4 points and 2 latents, got {len(points)} and {points.shape[1]}")
    return TSNE(random_state=seed % 2**32, perplexity=min(30, (len(points) - 1) / 3)).fit_transform(points)


def pca(points: np.ndarray) -> np.ndarray:
    """Project points (n, latents) on their first two principal components; a component that doesn't exist is 0."""
    n = min(2, points.shape[1], len(points) - 1)
    found = PCA(n).fit_transform(points) if n else points[:, :0]
    return np.pad(found, [(0, 0), (0, 2 - n)])


def figure(points: np.ndarray, classes: Sequence[int] | np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Plot points (n, 2) in the colours of their classes, with the names in a legend below: one for each colour."""
    result = Figure(figsize=(8, 8), layout="constrained")
    axes = result.add_subplot(title=title, aspect="equal", adjustable="datalim")
    axes.set_axis_off()
    colours = np.array(COLOURS)[np.asarray(classes) % len(COLOURS)]
    axes.scatter(points[:, 0], points[:, 1], s=8, c=colours, linewidths=0)
    for colour, name in zip(COLOURS, names, strict=False):
        axes.scatter([], [], s=30, c=colour, label=name)
    if names:
        more = f"and {len(names) - len(COLOURS)} more" if len(names) > len(COLOURS) else None
        result.legend(loc="outside lower center", ncols=5, frameon=False, title=more)
    return result
