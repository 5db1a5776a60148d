"""Synthetic digits: pen strokes in several forms a class, each bent, slanted, scaled, turned and shifted at random, and
drawn with a random pen."""

import cv2
import numpy as np

# The pen's path for each class, in several forms: points "x,y" with y downwards; a digit is 100 units high. A smooth
# curve goes through the points of a stroke, closed if the last point is the first; "|" lifts the pen or turns a corner.
FORMS = {
    0: (
        "30,0 12,12 3,35 2,62 12,90 30,100 48,90 58,62 57,35 48,12 30,0",
        "38,0 18,14 6,45 8,82 22,100 40,90 54,55 54,18 38,0",
        "40,0 12,15 0,50 12,85 40,100 68,85 80,50 68,15 40,0",
        "48,10 30,0 12,14 3,50 12,86 32,100 52,86 60,50 50,18 26,3",
    ),
    1: (
        "0,0 0,100",
        "18,0 0,100",
        "0,22 22,0 | 22,0 22,100",
        "5,20 28,0 | 28,0 28,100 | 5,100 52,100",
    ),
    2: (
        "5,25 12,8 30,0 50,8 55,28 42,55 20,80 3,98 | 3,98 60,98",
        "5,20 20,2 42,4 50,24 40,52 22,82 8,96 1,87 12,78 28,86 45,96 62,90",
        "4,15 25,0 48,10 48,35 30,65 5,95 | 5,95 30,91 62,100",
        "2,12 30,0 58,14 50,44 5,96 | 5,96 70,92",
    ),
    3: (
        "5,12 28,0 50,10 50,32 22,46 | 22,46 50,55 57,76 42,95 20,100 2,88",
        "5,2 52,0 | 52,0 25,40 | 25,40 50,50 56,75 40,96 18,100 0,88",
        "5,12 30,0 50,14 45,35 25,47 48,55 57,75 42,96 20,100 0,90",
        "2,6 34,0 54,18 40,40 20,46 | 20,46 44,50 52,68 36,90 0,100",
    ),
    4: (
        "8,0 2,52 | 2,52 60,50 | 50,5 45,100",
        "42,0 0,65 | 0,65 60,65 | 42,0 42,100",
        "8,0 2,35 12,54 35,52 52,42 | 57,0 51,50 46,100",
        "14,4 0,56 | 0,56 66,46 | 46,20 34,100",
    ),
    5: (
        "55,0 12,0 | 12,0 8,42 | 8,42 32,36 54,50 56,76 38,98 5,94",
        "58,2 32,2 14,10 14,34 36,45 50,64 44,90 22,100 0,90",
        "15,6 10,45 | 10,45 35,42 50,60 45,88 22,100 0,92 | 15,6 66,0",
        "62,0 24,6 | 24,6 14,42 | 14,42 40,46 50,66 36,90 0,100",
    ),
    6: (
        "45,0 20,25 5,58 8,88 28,100 48,90 52,70 38,56 20,62 7,80",
        "32,0 12,40 3,72 12,96 32,100 48,84 42,64 24,62 6,78",
        "54,8 38,0 14,25 2,62 14,94 34,100 52,84 48,60 28,52 6,68",
        "60,0 26,30 4,72 14,97 36,94 54,74 44,60 22,72 10,92",
    ),
    7: (
        "0,3 55,3 | 55,3 20,100",
        "0,3 55,3 | 55,3 22,100 | 14,52 58,48",
        "2,12 10,2 30,5 56,2 | 56,2 38,35 28,65 25,100",
        "2,20 3,2 | 3,2 56,2 | 56,2 40,40 30,100",
    ),
    8: (
        "52,14 30,0 8,14 14,36 44,58 54,82 30,100 4,82 14,60 44,38 52,14",
        "28,0 10,8 8,32 28,46 48,32 46,8 28,0 | 28,46 6,58 4,86 28,100 52,86 50,58 28,46",
        "52,10 34,0 16,14 22,38 38,62 34,92 18,100 6,84 18,62 44,40 56,16",
        "60,4 34,2 14,18 26,40 46,60 40,90 18,98 6,78 26,54 54,30 60,4",
    ),
    9: (
        "50,12 28,0 6,14 6,38 26,48 46,34 50,12 | 50,12 46,100",
        "50,15 30,0 8,12 4,36 22,50 42,38 50,15 | 50,15 52,50 44,85 14,100",
        "50,14 35,0 12,8 4,30 18,44 38,34 50,14 | 50,14 40,55 30,100",
        "54,10 32,2 8,22 10,46 34,44 54,10 | 54,10 34,60 22,100",
    ),
}


def pen_path(form: str, step: float = 4.0) -> list[np.ndarray]:
    """Return the strokes of a form in `FORMS`, each (n_points, 2) float64 of (x, y).

    A stroke is a Catmull-Rom curve with a point every `step` units of its length, so that the mean of the points is the
    centre of the ink.
    """
    strokes = []
    for stroke in form.split("|"):
        knots = np.array([point.split(",") for point in stroke.split()], dtype=np.float64)
        closed = np.array_equal(knots[0], knots[-1])
        before, after = (knots[-2], knots[1]) if closed else (knots[0], knots[-1])
        p0, p1, p2, p3 = (np.vstack([before, knots, after])[i : len(knots) - 1 + i, None] for i in range(4))
        t = np.linspace(0, 1, 16)[:, None]
        curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        curve = curve.reshape(-1, 2)
        length = np.concatenate([[0], np.hypot(*np.diff(curve, axis=0).T).cumsum()])
        at = np.linspace(0, length[-1], max(2, round(length[-1] / step)))
        strokes.append(np.stack([np.interp(at, length, curve[:, axis]) for axis in range(2)], axis=1))
    return strokes


def place(points: np.ndarray, thickness: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend and place n copies of a form's `points`, (n_points, 2) in its units, for pens of `thickness`, (n,) pixels.

    As in MNIST, a digit fits a box of 20x20 pixels, and the centre of its ink is the centre of the image; here with a
    small shift that keeps it off the border. Returns (n, n_points, 2) float64 of (x, y) in pixels.
    """
    n = len(thickness)
    u, v = (points - (points.min(axis=0) + points.max(axis=0)) / 2).T / 50  # v in [-1, 1], u about [-0.6, 0.6]
    # smooth functions of the position, so that strokes that meet still meet
    basis = np.stack([u * v, u**2, v**2, np.sin(np.pi * u) / 2, np.sin(np.pi * v) / 2])
    bent = np.stack([u, v], axis=1) + np.einsum("nkc,kp->npc", rng.normal(0, 0.11, (n, len(basis), 2)), basis)

    width = np.exp(rng.normal(0.15, 0.15, n))
    slant = rng.normal(0.12, 0.25, n).clip(-0.4, 0.7)
    angle = rng.normal(0, 0.09, n)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = bent[..., 0] * width[:, None] - bent[..., 1] * slant[:, None], bent[..., 1]
    drawn = np.stack([x * cos[:, None] - y * sin[:, None], x * sin[:, None] + y * cos[:, None]], axis=2)

    extent = np.ptp(drawn, axis=1).max(axis=1)
    drawn *= ((20 - thickness) * rng.uniform(0.86, 1, n) / extent)[:, None, None]
    margin = 1.5 + thickness[:, None] / 2
    centre = 14 - drawn.mean(axis=1) + rng.normal(0, 0.5, (n, 2))
    return drawn + centre.clip(margin - drawn.min(axis=1), 28 - margin - drawn.max(axis=1))[:, None]


def digits(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw n digits: images (n, 28, 28) uint8, white (255) on black, and labels (n,) uint8 in random order.

    The counts of the ten labels differ by at most one.
    """
    zoom, fraction_bits = 4, 4  # drawn at four times the size, for grey edges
    labels = rng.permutation(np.arange(n) % 10).astype(np.uint8)
    style = rng.random(n)  # chooses the form
    pen = (rng.normal(2.15, 0.5, n).clip(1.25, 3.75) * zoom).round().astype(int)  # in pixels of the zoomed canvas
    blur = rng.uniform(0.3, 0.55, n)
    ink = rng.uniform(1.1, 1.5, n)  # above 1 the middle of a stroke saturates, as in MNIST
    faint = np.full((28, 28), 16, dtype=np.uint8)  # subtracted, so that the background is black
    images = np.empty((n, 28, 28), dtype=np.uint8)
    for digit, paths in FORMS.items():
        for form, path in enumerate(paths):
            strokes = pen_path(path)
            ends = np.cumsum([len(stroke) for stroke in strokes])[:-1]
            members = np.flatnonzero((labels == digit) & ((style * len(paths)).astype(int) == form))
            placed = place(np.concatenate(strokes), pen[members] / zoom, rng)
            # OpenCV takes coordinates of pixel centres, in fixed point
            fixed = ((placed * zoom - 0.5) * 2**fraction_bits).round().astype(np.int32)
            for i, points in zip(members, fixed, strict=True):
                canvas = np.zeros((28 * zoom, 28 * zoom), dtype=np.uint8)
                cv2.polylines(canvas, np.split(points, ends), False, 255, int(pen[i]), cv2.LINE_8, fraction_bits)
                small = cv2.resize(canvas, (28, 28), interpolation=cv2.INTER_AREA)
                soft = cv2.subtract(cv2.GaussianBlur(small, (3, 3), blur[i]), faint)
                images[i] = cv2.convertScaleAbs(soft, alpha=ink[i])
    return images, labels
