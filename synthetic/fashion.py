"""Synthetic garments, shoes and bags: random mixtures of several silhouettes a class, bent and shifted, and cut from
random cloth."""

import math

import cv2
import numpy as np

# The parts of each class of FashionMNIST, in several forms. The points of the forms correspond, so that a mixture of
# forms is a form. Parts are areas of two materials, "body" and "trim", and Bézier curves, "strap" (of trim) and "seam"
# (dark). Points are "x,y" with y downwards; a garment is 100 units high, a shoe 100 units long. All but shoes are
# symmetric about x = 0, and only their right half is listed.
AREAS = ("body", "trim")
SHOES = (5, 7, 9)
GARMENTS = {
    0: (  # T-shirt/top: plain, wide with half sleeves, low-necked, sleeveless
        "body 0,9 8,8 15,1 32,7 47,30 35,38 28,30 27,60 28,99 0,100 | trim 0,34 10,34 10,48 0,48",
        "body 0,5 7,4 12,0 32,6 49,42 37,47 29,32 31,62 33,99 0,100 | trim 0,50 1,50 1,51 0,51",
        "body 0,24 7,14 13,1 29,6 40,26 31,33 26,30 23,58 27,98 0,100 | trim 0,40 1,40 1,41 0,41",
        "body 0,20 9,16 14,1 22,1 24,18 25,26 26,32 24,60 27,98 0,100 | trim 0,50 14,50 14,60 0,60",
    ),
    1: (  # Trouser: slim, straight, wide, with spread legs
        "body 0,1 13,0 16,18 14,55 11,100 4,100 4,60 0,30 | seam 0,3 0,26",
        "body 0,1 14,0 18,22 17,60 17,100 5,100 4,60 0,32 | seam 0,3 0,26",
        "body 0,1 13,0 18,24 19,60 25,100 6,100 4,60 0,34 | seam 0,3 0,28",
        "body 0,1 13,0 18,20 21,58 22,100 12,100 8,60 0,27 | seam 0,3 0,22",
    ),
    2: (  # Pullover: round neck, wide, high collar, V-neck
        "body 0,7 8,5 14,0 32,8 43,45 48,92 38,94 30,40 29,98 0,99 | seam 31,12 30,44 30,88 | trim 0,36 1,36 1,37 0,37",
        "body 0,5 7,4 12,0 34,8 46,45 49,84 37,88 31,42 33,97 0,98 | seam 32,12 31,44 33,80 | "
        "trim 0,34 14,34 14,50 0,50",
        "body 0,0 7,0 10,6 31,12 42,50 46,96 37,98 29,42 28,98 0,99 | seam 30,16 29,44 29,90 | "
        "trim 0,50 1,50 1,51 0,51",
        "body 0,26 6,13 12,0 30,7 41,45 45,94 36,96 28,40 28,99 0,100 | seam 29,12 28,44 28,90 | "
        "trim 0,60 1,60 1,61 0,61",
    ),
    3: (  # Dress: straps, short sleeves, long sleeves, flared skirt
        "body 0,17 6,12 8,0 12,1 14,14 14,22 11,40 14,62 20,99 0,100 | seam 0,40 11,40",
        "body 0,6 6,4 9,0 19,6 26,32 19,36 14,44 16,66 18,99 0,100 | seam 0,44 13,44",
        "body 0,5 6,4 9,0 20,7 32,64 25,66 13,40 17,66 22,99 0,100 | seam 0,42 12,42",
        "body 0,14 6,9 9,0 14,3 16,14 15,22 10,40 20,66 32,98 0,100 | seam 0,40 10,40",
    ),
    4: (  # Coat: long, zipped jacket, wide with lapels, hooded
        "body 0,5 8,1 13,0 30,8 40,45 45,86 36,88 29,44 31,99 1,100 | seam 0,8 0,99 | seam 1,34 10,14 11,3 | "
        "seam 29,14 28,44 29,88",
        "body 0,2 9,0 14,3 33,11 44,50 48,94 39,96 31,44 30,95 1,96 | seam 0,4 0,96 | seam 1,14 9,11 10,5 | "
        "seam 31,16 30,44 30,90",
        "body 0,10 8,3 14,0 34,9 46,48 49,88 38,91 32,46 36,99 2,100 | seam 0,12 0,99 | seam 1,44 13,22 12,3 | "
        "seam 32,14 31,46 33,86",
        "body 0,0 9,0 15,9 32,14 43,50 46,92 37,94 30,46 29,97 1,98 | seam 0,14 0,97 | seam 1,26 13,20 14,8 | "
        "seam 30,18 29,46 29,88",
    ),
    5: (  # Sandal: flat, flat with ankle strap, high heel, wedge
        "body 0,66 2,60 30,60 60,58 96,55 100,58 99,66 80,67 60,67 30,67 | "
        "strap 12,60 22,34 40,60 | strap 26,60 60,26 74,57 | strap 60,58 54,42 30,46",
        "body 0,68 2,62 30,62 60,58 94,56 99,58 98,68 78,69 60,68 30,69 | "
        "strap 8,62 18,34 32,62 | strap 34,62 48,26 62,58 | strap 68,57 84,6 96,57",
        "body 2,92 3,88 26,87 55,62 86,36 95,40 92,93 88,93 85,48 28,92 | "
        "strap 8,88 18,50 34,80 | strap 30,84 58,40 66,54 | strap 60,32 84,-6 93,38",
        "body 1,88 2,78 30,76 60,58 90,46 98,50 97,89 75,89 55,89 30,89 | "
        "strap 8,78 18,36 36,72 | strap 34,74 54,18 64,56 | strap 64,34 86,0 95,46",
    ),
    6: (  # Shirt: long sleeves, half sleeves, blouse, tunic
        "body 0,14 6,8 11,0 31,8 42,46 46,88 37,91 29,42 29,97 0,93 | seam 0,14 0,92 | seam 0,16 9,10 11,2 | "
        "seam 30,14 29,42 29,86",
        "body 0,12 6,7 11,0 31,7 45,36 35,43 28,32 28,62 29,98 0,95 | seam 0,12 0,94 | seam 0,14 9,10 11,2 | "
        "seam 30,12 28,28 28,33",
        "body 0,18 8,9 13,0 29,7 42,38 45,62 34,64 27,38 33,98 0,99 | seam 0,18 0,40 | seam 0,20 9,12 13,2 | "
        "seam 28,14 27,38 29,56",
        "body 0,22 6,10 10,0 27,6 37,42 38,66 30,68 25,40 26,99 0,96 | seam 0,22 0,60 | seam 0,24 7,14 10,2 | "
        "seam 26,12 25,40 25,60",
    ),
    7: (  # Sneaker: low, running shoe, high, slim
        "body 0,68 4,56 20,50 36,38 48,28 56,34 74,38 90,32 98,30 100,50 100,70 50,71 | "
        "trim 0,67 100,67 99,74 50,75 3,75 | seam 26,48 34,54 | seam 32,43 40,50 | seam 38,38 46,46",
        "body 0,64 6,55 24,50 40,40 50,32 57,37 72,40 88,36 96,28 99,46 100,66 50,70 | "
        "trim 0,64 40,68 100,62 99,73 2,73 | seam 30,48 42,57 | seam 36,44 60,60 | seam 44,40 70,62",
        "body 0,76 4,66 18,60 36,46 50,26 58,22 76,22 92,20 98,25 98,52 100,78 50,80 | "
        "trim 0,75 100,75 99,84 50,85 2,85 | seam 30,54 40,60 | seam 37,46 46,54 | seam 42,40 52,47",
        "body 0,66 4,58 24,52 40,44 52,38 58,42 76,46 90,42 98,40 99,54 100,67 50,69 | "
        "trim 0,66 100,66 99,70 50,71 3,71 | seam 30,52 38,57 | seam 36,48 44,54 | seam 42,45 50,51",
    ),
    8: (  # Bag: handbag, clutch, tote, shoulder bag
        "body 0,38 28,38 40,42 45,88 41,94 0,95 | strap 0,5 16,5 18,18 21,39 | seam 0,54 26,52 42,46 | "
        "trim 0,50 4,50 4,60 0,60",
        "body 0,24 44,24 48,28 48,72 45,76 0,76 | strap 0,26 9,26 17,26 20,26 | seam 0,50 26,49 46,30 | "
        "trim 0,46 4,46 4,53 0,53",
        "body 0,30 38,30 41,32 34,96 31,99 0,99 | strap 0,2 12,2 14,14 15,31 | seam 0,34 26,34 39,34 | "
        "trim 0,56 9,56 9,64 0,64",
        "body 0,46 26,46 34,50 36,92 32,96 0,97 | strap 0,2 12,2 20,16 30,48 | seam 0,74 22,72 34,54 | "
        "trim 0,70 3,70 3,76 0,76",
    ),
    9: (  # Ankle boot: plain, pull-on, laced with a thick sole, heeled
        "body 0,90 4,78 22,68 38,56 44,40 44,6 60,4 88,4 89,40 95,64 97,92 50,92 | "
        "trim 0,89 60,90 66,92 97,89 97,98 72,98 64,94 2,94 | seam 50,10 52,30 | seam 40,56 66,64 94,62",
        "body 0,88 6,78 26,70 44,54 50,34 46,2 62,3 92,0 91,40 96,66 98,90 50,91 | "
        "trim 0,88 60,89 66,90 98,88 98,96 70,96 64,92 2,92 | seam 66,6 68,44 | seam 66,44 78,44 80,6",
        "body 0,86 4,70 20,60 36,50 40,34 38,4 56,2 84,2 86,36 92,60 96,88 50,88 | "
        "trim 0,84 60,85 66,86 97,84 97,97 70,97 64,95 1,95 | seam 38,46 54,50 | "
        "seam 40,28 50,30 56,32",
        "body 2,94 8,84 28,74 42,58 48,40 44,6 60,5 86,4 86,36 92,56 93,66 56,80 | "
        "trim 2,93 34,90 58,74 94,60 92,98 82,98 80,76 34,96 | seam 64,8 66,40 | seam 34,70 52,62 90,54",
    ),
}


def garment_parts(kind: int) -> list[tuple[str, np.ndarray]]:
    """Return the parts of a class of `GARMENTS` in drawing order: name, and points (n_forms, n_points, 2) float64."""
    parts = []
    for forms in zip(*(form.split("|") for form in GARMENTS[kind]), strict=True):
        words = [form.split() for form in forms]
        name = words[0][0]
        points = np.array([[point.split(",") for point in form[1:]] for form in words], dtype=np.float64)
        mirrored = points * (-1, 1)
        if kind in SHOES:
            parts.append((name, points))
        elif name in AREAS:
            parts.append((name, np.concatenate([points, mirrored[:, ::-1]], axis=1)))
        else:
            parts += [(name, points), (name, mirrored)]
    return parts


def bezier(points: np.ndarray) -> np.ndarray:
    """Return the Bézier curves of n sets of control points, (n, n_points, 2), each as nine points: (n, 9, 2)."""
    k, t = np.arange(points.shape[1]), np.linspace(0, 1, 9)[:, None]
    weight = [math.comb(k[-1], i) for i in k] * t**k * (1 - t) ** k[::-1]
    return np.einsum("tp,npc->ntc", weight, points)


def fit(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend and stretch n garments a little, each (n_points, 2) in its units, and place them.

    As in FashionMNIST, the longer side nearly fills the image, and the box is centred; here with a small shift.
    Returns (n, n_points, 2) float64 of (x, y) in pixels.
    """
    n = len(points)
    u, v = np.moveaxis(points - (points.min(axis=1, keepdims=True) + points.max(axis=1, keepdims=True)) / 2, 2, 0) / 50
    basis = np.stack([u, v, u * v, u**2, v**2], axis=1)
    drawn = np.stack([u, v], axis=2) + np.einsum("nkc,nkp->npc", rng.normal(0, 0.03, (n, 5, 2)), basis)
    drawn[..., 0] *= np.exp(rng.normal(0, 0.06, (n, 1)))
    drawn *= (rng.uniform(25.5, 27.6, n) / np.ptp(drawn, axis=1).max(axis=1))[:, None, None]
    low, high = drawn.min(axis=1), drawn.max(axis=1)
    centre = 14 - (low + high) / 2 + rng.normal(0, 0.4, (n, 2))
    return drawn + centre.clip(0.2 - low, 27.8 - high)[:, None]


def cloth(patterned: float, rng: np.random.Generator) -> np.ndarray:
    """Return the brightness of a piece of cloth with soft folds and a grain, (28, 28) float64 in [0, 1].

    With probability `patterned` it has horizontal stripes, vertical stripes, both, or a print.
    """
    x, y = np.arange(28), np.arange(28)[:, None]

    def wave(place: np.ndarray, shortest: float, longest: float) -> np.ndarray:
        return np.sin(2 * np.pi * (place / rng.uniform(shortest, longest) + rng.random()))

    brightness = 0.15 + 0.85 * rng.beta(1.4, 0.9) + 0.06 * wave(x + rng.uniform(-0.7, 0.7) * y, 9, 20)
    if rng.random() < patterned:
        across, along, printed = ((1, 0, 0), (0, 1, 0), (0.5, 0.5, 0), (0, 0, 1))[rng.integers(4)]
        blots = cv2.blur(rng.normal(0, 1, (28, 28)), (2, 2))
        pattern = across * wave(y, 3, 8) + along * wave(x, 3, 8) + printed * blots
        brightness = brightness + rng.uniform(0.1, 0.3) * pattern
    return (brightness + rng.normal(0, 0.03, (28, 28))).clip(0.04, 1)


def garments(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw n garments, shoes and bags: images (n, 28, 28) uint8 on black (0), and labels (n,) uint8 in random order.

    Labels are the numbers of FashionMNIST's classes; their ten counts differ by at most one.
    """
    zoom, fraction_bits = 4, 4  # drawn at four times the size, for grey edges
    paint = {"body": (255, 0), "seam": (130, 0), "trim": (0, 255), "strap": (0, 255)}  # amounts of the two materials
    labels = rng.permutation(np.arange(n) % 10).astype(np.uint8)
    images = np.empty((n, 28, 28), dtype=np.uint8)
    for kind, forms in GARMENTS.items():
        members = np.flatnonzero(labels == kind)
        names, points = zip(*garment_parts(kind), strict=True)
        mixture = rng.dirichlet(np.full(len(forms), 0.5), len(members))
        mixed = np.einsum("nf,fpc->npc", mixture, np.concatenate(points, axis=1))
        placed = np.split(fit(mixed, rng), np.cumsum([part.shape[1] for part in points])[:-1], axis=1)
        shapes = [part if name in AREAS else bezier(part) for name, part in zip(names, placed, strict=True)]
        fixed = [((shape * zoom - 0.5) * 2**fraction_bits).round().astype(np.int32) for shape in shapes]
        for i, member in enumerate(members):
            canvas = np.zeros((28 * zoom, 28 * zoom, 2), dtype=np.uint8)
            strap = round(rng.uniform(0.9, 1.8) * zoom)
            for name, shape in zip(names, fixed, strict=True):
                if name in AREAS:
                    cv2.fillPoly(canvas, [shape[i]], paint[name], cv2.LINE_8, fraction_bits)
                else:
                    width = strap if name == "strap" else zoom - 1
                    cv2.polylines(canvas, [shape[i]], False, paint[name], width, cv2.LINE_8, fraction_bits)
            body, trim = np.moveaxis(cv2.resize(canvas, (28, 28), interpolation=cv2.INTER_AREA), 2, 0)
            fabric = cloth(0.1 if kind in SHOES else 0.4, rng)
            images[member] = (body * fabric + trim * rng.uniform(0.15, 1)).round()
    return images, labels
