"""Synthetic faces: frontal, in the aligned frame of CelebA's images, painted in layers from the hair behind the head to
the glasses in front. What the attributes leave open (form, skin, light, gaze, clothes, background) is random."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

HEIGHT, WIDTH = 218, 178
CENTRE = (88.5, 111)  # (x, y) in pixels of the middle between the eyes, the origin of all points below; y downwards

DRAWN = (
    "Bald",
    "Bangs",
    "Black_Hair",
    "Blond_Hair",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Eyeglasses",
    "Gray_Hair",
    "Heavy_Makeup",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Pale_Skin",
    "Receding_Hairline",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Hat",
)
"""The attributes that a synthetic face shows."""


def parse(points: str) -> np.ndarray:
    """Return "x,y x,y ..." as (n_points, 2) float64."""
    return np.array([point.split(",") for point in points.split()], dtype=np.float64)


# The features of an average face, in the order of iBUG's 68 points; the right half of the image mirrors the left.
BROW = parse("-33,-13.5 -28.5,-18 -22.5,-19.5 -16,-18.5 -10,-16")
BRIDGE = parse("0,-2 0,6 0,14 0,22")
NOSTRILS = parse("-8.5,27.5 -4.5,29 0,30 4.5,29 8.5,27.5")
EYE = parse("-27,0.5 -22.5,-3.4 -16.5,-3.4 -12,1 -16.5,3.4 -22.5,3.4")
MOUTH = parse(
    "-16.5,41 -10.5,38.5 -4,37 0,38 4,37 10.5,38.5 16.5,41 10,46 4.5,48.5 0,49 -4.5,48.5 -10,46 "
    "-14,41 -5,41 0,41.5 5,41 14,41 5,41.8 0,42.3 -5,41.8"
)
SMILE = parse(  # the shift of the mouth's points by a smile
    "-4.5,-3 -2,-0.5 -0.5,0.8 0,1 0.5,0.8 2,-0.5 4.5,-3 3,0 1,1 0,1 -1,1 -3,0 "
    "-4.5,-3 -1.5,1.2 0,1.8 1.5,1.2 4.5,-3 1.5,1.4 0,2 -1.5,1.4"
)
OPENING = parse(  # and by opening it
    "0.5,1 0,0 0,-0.5 0,-0.5 0,-0.5 0,0 -0.5,1 0,5 0,7 0,7.5 0,7 0,5 0.5,1 0,-0.5 0,-0.5 0,-0.5 -0.5,1 0,7 0,7.5 0,7"
)

# Indices of the person's right and left eye, and of the brows, each from its outer end.
EYES = np.array([(36, 37, 38, 39, 40, 41), (45, 44, 43, 42, 47, 46)])
BROWS = np.array([(17, 18, 19, 20, 21), (26, 25, 24, 23, 22)])

OCTAGON = np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
ARCH = -np.stack([np.cos(np.arange(9) * np.pi / 8), np.sin(np.arange(9) * np.pi / 8)], axis=1)

# Colours are red, green and blue in [0, 255].
SKIN = np.array([(234, 192, 162), (226, 178, 146), (196, 142, 106), (148, 98, 70), (98, 63, 46)], dtype=np.float32)
PALE = np.array((240, 222, 213), dtype=np.float32)
HAIR = {
    "Black_Hair": (24, 20, 20),
    "Blond_Hair": (222, 188, 116),
    "Brown_Hair": (98, 62, 36),
    "Gray_Hair": (158, 158, 160),
    "other": (158, 58, 24),
}
IRIS = ((70, 44, 26), (92, 66, 36), (86, 120, 160), (84, 112, 74), (56, 36, 24))
LIPS = ((178, 20, 48), (206, 44, 86), (140, 16, 60), (212, 60, 54))
FRAME = ((18, 16, 18), (70, 40, 20), (130, 20, 30), (60, 62, 70), (16, 28, 60))
SHADOW = ((86, 60, 120), (54, 74, 120), (110, 66, 50), (64, 60, 64), (60, 104, 96))


def attributes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the attributes of n faces, (n, 18) bool in the order of `DRAWN`.

    They are correlated roughly as in people. Each occurs in at least 4 % of the faces, and none hides another.
    """

    def chance(if_male: float, otherwise: float) -> np.ndarray:
        return rng.random(n) < np.where(male, if_male, otherwise)

    male = rng.random(n) < 0.45
    bald = chance(0.14, 0.01)
    hat = chance(0.12, 0.08) & ~bald
    hair = ~bald & ~hat  # visible in front
    form = rng.random(n)
    colour = rng.choice(len(HAIR), n, p=[0.3, 0.22, 0.26, 0.13, 0.09])
    receding = chance(0.28, 0.02) & hair
    smiling = chance(0.42, 0.55)
    drawn = {
        "Bald": bald,
        "Bangs": chance(0.14, 0.32) & hair & ~receding,
        **{name: (colour == i) & ~bald for i, name in enumerate(HAIR) if name in DRAWN},
        "Bushy_Eyebrows": chance(0.32, 0.08),
        "Eyeglasses": chance(0.18, 0.1),
        "Heavy_Makeup": chance(0.01, 0.6),
        "Male": male,
        "Mouth_Slightly_Open": rng.random(n) < np.where(smiling, 0.65, 0.25),
        "Mustache": chance(0.22, 0),
        "Pale_Skin": chance(0.07, 0.1),
        "Receding_Hairline": receding,
        "Smiling": smiling,
        "Straight_Hair": (form < 0.35) & hair,
        "Wavy_Hair": (form > 0.6) & hair,
        "Wearing_Hat": hat,
    }
    return np.stack([drawn[name] for name in DRAWN], axis=1)


def mirror(points: np.ndarray) -> np.ndarray:
    """Return points (n_points, 2) mirrored to the other side of the face."""
    return points * (-1, 1)


def features(has: Mapping[str, bool], rng: np.random.Generator) -> np.ndarray:
    """Return the 68 points of a random face with these attributes, relative to CENTRE: (68, 2) float64."""
    male = has["Male"]
    # The jaw is half of a superellipse; a higher exponent makes it squarer.
    angle = np.linspace(0, np.pi, 17)
    half_width, depth = rng.normal(43.5 if male else 41.5, 1.6), rng.normal(76 if male else 72, 2)
    exponent = rng.normal(2.45 if male else 1.95, 0.1)
    jaw = np.stack([-np.cos(angle), np.sin(angle)], axis=1)
    jaw = np.sign(jaw) * np.abs(jaw) ** (2 / exponent) * (half_width, depth) - (0, 4)

    brow = moved(BROW, 0, rng.normal(1.5 if male else -1, 1))
    brow[1:4, 1] -= np.array([0.6, 1, 0.6]) * rng.normal(0 if male else 1.5, 0.8)
    eye = EYE.copy()
    eye[[1, 2, 4, 5], 1] *= rng.normal(0.9 if male else 1.1, 0.1) - 0.12 * has["Smiling"]
    nostrils = NOSTRILS * (rng.normal(1.08 if male else 0.92, 0.08), 1)
    nose = np.concatenate([BRIDGE, nostrils]) * (1, rng.normal(1, 0.05))

    smile = rng.uniform(0.8, 1.3) if has["Smiling"] else rng.uniform(-0.35, 0.1)
    opening = rng.uniform(0.65, 1.2) if has["Mouth_Slightly_Open"] else 0
    mouth = MOUTH * (rng.normal(1, 0.05), 1) + smile * SMILE + opening * OPENING
    fullness = rng.normal(0.85 if male else 1.2, 0.12)
    mouth[:12, 1] += (fullness - 1) * (mouth[:12, 1] - mouth[[12, 13, 13, 14, 15, 15, 16, 17, 17, 18, 19, 19], 1])
    mouth[:, 1] += rng.normal(0, 1)
    points = np.concatenate([jaw, brow, mirror(brow)[::-1], nose, eye, mirror(eye)[[3, 2, 1, 0, 5, 4]], mouth])
    yaw = rng.normal(0, 1.5)  # in pixels; the nose, in front, moves farther
    points[17:, 0] += yaw
    points[28:36, 0] += 0.5 * yaw
    return points


@functools.cache
def spline(n: int, closed: bool) -> np.ndarray:
    """Return the weights of n knots in the points of a Catmull-Rom curve through them: (n_points, n) float64."""
    knots = np.eye(n)
    knots = knots[[-1, *range(n), 0, 1]] if closed else knots[[0, *range(n), -1]]
    p0, p1, p2, p3 = (knots[i : len(knots) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, 6, endpoint=False)[:, None]
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, n), knots[-2:-1]])


@functools.cache
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the pixels relative to CENTRE, (1, WIDTH) and (HEIGHT, 1) float32."""
    x = np.arange(WIDTH, dtype=np.float32)[None] - CENTRE[0]
    return x, np.arange(HEIGHT, dtype=np.float32)[:, None] - CENTRE[1]


@functools.cache
def grain() -> np.ndarray:
    """Return white noise of mean 128 and standard deviation 32, which all faces crop: (2 HEIGHT, 2 WIDTH) uint8."""
    noise = np.random.default_rng(0).standard_normal((2 * HEIGHT, 2 * WIDTH), dtype=np.float32)
    return (128 + 32 * noise).clip(0, 255).astype(np.uint8)


def some_grain(rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of the grain, (HEIGHT, WIDTH) uint8."""
    top, left = rng.integers((HEIGHT, WIDTH))
    return grain()[top : top + HEIGHT, left : left + WIDTH]


def ellipse(centre: np.ndarray | tuple[float, float], half_width: float, half_height: float) -> np.ndarray:
    """Return eight points around an ellipse, (8, 2)."""
    return OCTAGON * (half_width, half_height) + centre


def moved(points: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return a point (2,) or points (n_points, 2) moved to the right by x and down by y."""
    return points + np.array((x, y))


def arch(half_width: float, top: float, bottom: float) -> np.ndarray:
    """Return the upper half of an ellipse, from left to right: (9, 2)."""
    return moved(ARCH * (half_width, bottom - top), 0, bottom)


def mix(a: np.ndarray, b: np.ndarray | tuple[float, ...], share: float) -> np.ndarray:
    """Return a colour or point between a and b."""
    return a + (np.asarray(b) - a) * share


@dataclass(frozen=True, kw_only=True)
class Face:
    """A face being painted. Colours are (3,), points (n_points, 2) relative to CENTRE, before the face is turned."""

    has: Mapping[str, bool]
    rng: np.random.Generator
    points: np.ndarray
    """The 68 points of the features."""
    shift: np.ndarray
    """The middle between the eyes, (x, y) in the image."""
    turn: np.ndarray
    """The matrix (2, 2) that turns and scales the face."""
    light: float
    """The direction of the light, from the left (-1) to the right (1)."""
    skin: np.ndarray
    hair: np.ndarray
    length: float
    """The lower end of the hair, as y."""
    volume: float
    """The thickness of the hair around the head, in pixels."""
    canvas: np.ndarray
    """(HEIGHT, WIDTH, 3) uint8."""
    shade: np.ndarray
    """The factor of the skin's colour, times 128: (HEIGHT / 2, WIDTH / 2, 3) uint8."""

    @property
    def half_width(self) -> float:
        """Half of the head's width."""
        return float(self.points[16, 0])

    def place(self, points: np.ndarray) -> np.ndarray:
        """Return points as (x, y) in the image."""
        return points @ self.turn + self.shift

    def paint(
        self,
        points: np.ndarray,
        colour: np.ndarray | Sequence[float],
        width: int = 0,
        *,
        smooth: bool = True,
        image: np.ndarray | None = None,
    ) -> None:
        """Fill the outline through `points`, or with a `width` in pixels draw the line through them.

        Paints on the canvas, or on another image of any size.
        """
        image = self.canvas if image is None else image
        fraction_bits = 4
        units = 2**fraction_bits * image.shape[1] / WIDTH  # OpenCV takes coordinates of pixel centres, in fixed point
        placed = self.place(spline(len(points), not width) @ points if smooth else points)
        fixed = [np.rint(placed * units + (units - 2**fraction_bits) / 2).astype(np.int32)]
        ink = colour.tolist() if isinstance(colour, np.ndarray) else colour
        if width:
            cv2.polylines(image, fixed, False, ink, width, cv2.LINE_AA, fraction_bits)
        else:
            cv2.fillPoly(image, fixed, ink, cv2.LINE_AA, fraction_bits)

    def cover(self, outlines: Sequence[np.ndarray], texture: np.ndarray) -> None:
        """Fill the outlines with the texture (HEIGHT, WIDTH, 3) uint8, with slightly soft edges."""
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for points in outlines:
            self.paint(points, (255,), image=mask)
        x, y, width, height = cv2.boundingRect(mask)
        region = (slice(y, y + height), slice(x, x + width))
        share = cv2.blur(mask[region], (3, 3)).astype(np.float32)
        self.canvas[region] = cv2.blendLinear(texture[region], self.canvas[region], share, 255 - share)

    def darken(self, points: np.ndarray, factor: float | Sequence[float], width: int = 0) -> None:
        """Multiply the skin's colour by `factor`, which may be above 1, inside an outline or along a line."""
        red, green, blue = (factor, factor, factor) if isinstance(factor, float) else factor
        self.paint(points, (128 * red, 128 * green, 128 * blue), width, image=self.shade)


def background(rng: np.random.Generator) -> np.ndarray:
    """Return a few blurred colours, (HEIGHT, WIDTH, 3) uint8."""
    colours = rng.uniform(10, 240) + rng.normal(0, 22, 3) + rng.normal(0, rng.uniform(5, 45), (4, 3, 1))
    colours = colours + rng.normal(0, 10, (4, 3, 3))
    small = cv2.resize(colours.clip(0, 255).astype(np.uint8), (WIDTH // 4, HEIGHT // 4), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(small, (WIDTH, HEIGHT))


def strands(face: Face) -> np.ndarray:
    """Return a texture of hair with strands and gloss, (HEIGHT, WIDTH, 3) uint8.

    Strands hang down from the top of the head, straight or in waves; other hair is matt.
    """
    x, y = grid()
    rng = face.rng
    wavy, straight = face.has["Wavy_Hair"], face.has["Straight_Hair"]
    if wavy or straight:
        across = x / (1 + np.maximum(0, -20 - y) / 60)
        if wavy:
            across = across + 4 * np.sin(y * (2 * np.pi / rng.uniform(22, 30)) + rng.uniform(0, 2 * np.pi))
        noise = rng.standard_normal((1, 512), dtype=np.float32)
        noise = cv2.GaussianBlur(noise, (0, 0), 2) + cv2.GaussianBlur(noise, (0, 0), 8)
        shade = 0.4 * noise[0, (across * 2 + 256).astype(np.intp) & 511]
    else:
        shade = (cv2.blur(some_grain(rng), (2, 2)) - np.float32(128)) * np.float32(0.15 / 32)
    gloss = (y + 46) / 8 - np.abs(x) / 24
    shade += (0.4 if straight else 0.15) / (1 + gloss * gloss) + (face.light / 400) * x
    brightness = np.arange(256)[:, None] / 128
    palette = (face.hair * brightness + 20 * (brightness - 1)).clip(0, 255).astype(np.uint8)
    return cv2.applyColorMap(((shade + 1) * 120).clip(0, 255).astype(np.uint8), palette[:, None])


def hairline(face: Face) -> np.ndarray:
    """Return the edge of the hair above the forehead, from right to left: (15, 2)."""
    rng = face.rng
    x = np.linspace(1, -1, 15) * (face.half_width + 0.5)
    along = np.abs(np.linspace(1, -1, 15))
    if face.has["Bangs"]:
        y = rng.uniform(-23, -19) + rng.normal(0, 0.06) * x + rng.normal(0, 1, 15) + 8 * along**4
    elif face.has["Receding_Hairline"]:
        y = 2 - rng.uniform(54, 57) * (1 - along**9) + rng.uniform(4, 11) * np.exp(-((x / 10) ** 2))
    else:
        parting = rng.uniform(-22, 22)
        y = 2 - rng.uniform(36, 41) * (1 - along**3.2) - 6 * np.exp(-(((x - parting) / 7) ** 2))
    if face.has["Wavy_Hair"]:
        y += 2 * np.sin(x / 3.5)
    return np.stack([x, y], axis=1)


def locks(face: Face) -> np.ndarray:
    """Return the outer edge of the hair on the right, from the ear down: (n, 2)."""
    down = np.linspace(4, face.length, 4 + int(face.length / 9))
    out = face.volume - 0.0005 * (down - 30) ** 2
    if face.has["Wavy_Hair"]:
        out += 3.5 * np.sin(down * 0.27 + face.rng.uniform(0, 6)) + down / 25
    return np.stack([face.half_width + out, down], axis=1)


def paint_hair_behind(face: Face, hair: np.ndarray, side: np.ndarray) -> None:
    """Paint the hair at the sides and behind the neck."""
    top = arch(face.half_width + face.volume, -62 - face.volume, 0)
    end = np.array([(face.half_width - 3, face.length + 4), (face.half_width * 0.6, face.length + 3)])
    side = np.concatenate([side, end])
    face.cover([np.concatenate([top, side, mirror(side)[::-1]])], cv2.convertScaleAbs(hair, alpha=0.75))


def paint_neck(face: Face) -> None:
    rng = face.rng
    half_width = rng.normal(29 if face.has["Male"] else 21, 1.5)
    side = np.array([(half_width - 1, 20), (half_width, 75), (half_width + 5, 92), (half_width + 30, 112)])
    face.paint(np.concatenate([side, mirror(side)[::-1]]), face.skin * 0.8)
    face.paint(moved(face.points[5:12] * (0.85, 1), 0, 6), face.skin * 0.62)
    cloth = rng.uniform(10, 220) + rng.normal(0, 30, 3)
    collar, shoulder = rng.uniform(86, 95), rng.uniform(92, 106)
    neckline = [(0, collar + rng.uniform(2, 24)), (half_width + 1, collar), (75, shoulder), (120, shoulder + 12)]
    outline = np.array([*neckline, (120, 140)])
    face.paint(np.concatenate([outline, mirror(outline)[:0:-1]]), cloth, smooth=False)
    face.paint(np.concatenate([mirror(outline)[1:2], outline[:2]]), cloth * 0.6, 2, smooth=False)


def shade_head(face: Face, edge: np.ndarray | None) -> None:
    """Shade the skin; the `edge` of the hair or the hat casts a shadow on the forehead."""
    has, points = face.has, face.points
    x, y = (axis[::2, ::2] for axis in grid())
    x, y = x - np.float32(face.shift[0] - CENTRE[0]), y - np.float32(face.shift[1] - CENTRE[1])
    distance = np.minimum((x / face.half_width) ** 2 + ((y - 8) / 74) ** 2, 1.3)
    brightness = 1.08 - 0.32 * distance * np.sqrt(distance) + 0.16 * face.light / face.half_width * x
    face.shade[:] = (128 * brightness)[..., None]
    face.darken(ellipse((0, -34), 20, 7), 1.2 if has["Bald"] else 1.12)
    if has["Bald"]:
        face.darken(ellipse((12 * face.light, -50), 10, 4), 1.5)
    if edge is not None:
        face.darken(edge, 0.6, 3)
    if has["Gray_Hair"]:
        for height in (-30, -24):
            face.darken(np.array([(-18, height + 1), (0, height - 1), (18, height + 1)]), 0.75, 1)
    if has["Male"]:
        stubble = face.rng.uniform(0, 0.25)
        beard = np.concatenate([points[2:15] * 0.98, moved(points[2:15] * 0.62, 0, 20)[::-1]])
        face.darken(beard, (1 - stubble, 1 - 0.85 * stubble, 1 - 0.75 * stubble))
    rosy = (1.06, 0.8, 0.84) if has["Heavy_Makeup"] else (1.05, 0.95, 0.94)
    for side, eye in zip((-1, 1), points[EYES], strict=True):
        lit = 1 + 0.2 * face.light * side
        face.darken(ellipse((26 * side, 26), 9, 7), rosy)
        face.darken(ellipse((24 * side, 17), 8, 4), 1.12 * lit)
        face.darken(ellipse(moved(eye.mean(axis=0), 0, -2), 13, 7), 0.72)
        face.darken(np.array([(8, -12), (6, 0), (8, 14), (11, 22)]) * (side, 1), 0.85 * lit, 2)
        face.darken(np.array([(13, 27), (20, 34), (24, 43)]) * (side, 1), 0.65 if has["Smiling"] else 0.85, 1)
        if has["Eyeglasses"]:
            face.darken(moved(eye[[0, 5, 4, 3]], 0, 11), 0.75, 1)
    face.darken(points[27:31], 1.18, 2)
    face.darken(ellipse(points[30], 4, 3), 1.3)
    face.darken(moved(points[31:36], 0, 1.5), 0.5, 2)
    face.darken(ellipse(moved(points[57], 0, 5), 10, 2.5), 0.6)
    face.darken(ellipse(moved(points[8], 0, -10), 9, 5), 1.12)


def paint_head(face: Face) -> None:
    """Paint ears and skin."""
    if face.length < 20:
        for side in (-1, 1):
            face.paint(ellipse((side * (face.half_width + 1), 12), 6, 12), face.skin * 0.82)
            face.paint(ellipse((side * (face.half_width + 2), 13), 2.5, 7), face.skin * 0.6)
    shaded = cv2.transform(cv2.GaussianBlur(face.shade, (7, 7), 1.5), np.diag(face.skin / 128))
    jaw = face.points[:17]
    head = np.concatenate([jaw, arch(face.half_width, -62, jaw[0, 1])[-2:0:-1]])
    face.cover([head], cv2.resize(shaded, (WIDTH, HEIGHT)))


def paint_nose(face: Face) -> None:
    points = face.points
    for side, nostril in ((-1, points[32]), (1, points[34])):
        wing = moved(np.array([(11, 20), (12.5, 25), (9, 28)]) * (side, 1), points[30, 0], 0)
        face.paint(wing, face.skin * 0.68, 1)
        face.paint(ellipse(moved(nostril, 0, -1.2), 2.6, 1.3), face.skin * 0.25)


def paint_eyes(face: Face) -> None:
    """Paint eyes and brows."""
    rng, has, skin = face.rng, face.has, face.skin
    made_up, bushy, male = has["Heavy_Makeup"], has["Bushy_Eyebrows"], has["Male"]
    iris = np.array(IRIS[rng.integers(len(IRIS))]) * rng.normal(1, 0.1)
    gaze = rng.normal((0, -0.3), (1.3, 0.4))
    shadow = mix(skin * 0.7, SHADOW[rng.integers(len(SHADOW))], 0.65)
    thickness = rng.uniform(4.2, 5.6) if bushy else rng.uniform(2, 2.9) if male else rng.uniform(1.2, 2)
    taper = np.array([(0, 0.25), (0, 0.75), (0, 0.95), (0, 1), (0, 0.8)]) * thickness  # from the outer end to the inner
    brow_colour = mix(skin * 0.7, face.hair * 0.55, 0.9 if bushy else 0.8)
    white = np.array((238, 234, 230)) * min(1, 0.75 + skin[0] / 900)
    for side, eye, brow in zip((-1, 1), face.points[EYES], face.points[BROWS], strict=True):
        upper, lower = eye[:4], eye[[0, 5, 4, 3]]
        if made_up:
            face.paint(np.concatenate([upper, mix(upper[2:0:-1], brow[3:1:-1], 0.6)]), shadow)
        else:
            face.paint(moved(upper, 0, -2.6), skin * 0.62, 1)
        face.paint(eye, white)
        pupil = eye.mean(axis=0) + gaze
        low, high = eye[1:3, 1].mean(), eye[4:6, 1].mean()
        for half_width, colour in ((4.4, iris * 0.6), (3.6, iris), (1.9, (8, 6, 6))):
            face.paint(ellipse(pupil, half_width, half_width).clip((-99, low), (99, high)), colour)
        face.paint(ellipse(moved(pupil, 1.4 * face.light, -1.2), 0.9, 0.9), (250, 250, 250))
        face.paint(upper, (18, 12, 12), 3 if made_up else 2)
        face.paint(lower, mix(skin * 0.6, (30, 16, 14), 0.9 if made_up else 0.3), 1)
        if made_up:
            face.paint(np.array([upper[0], moved(upper[0], side * 3.5, -2.5)]), (18, 12, 12), 2)
        face.paint(moved(lower, 0, 4), skin * (0.65 if has["Gray_Hair"] else 0.8), 1)
        face.paint(np.concatenate([brow - taper, (brow + taper * 0.6)[::-1]]), brow_colour)
        if bushy:
            for root in np.repeat(brow, 2, axis=0) + rng.uniform(-3, 3, (10, 2)):
                hair = np.stack([moved(root, 0, 2), moved(root, side * 2, -thickness - 1)])
                face.paint(hair, brow_colour * 0.7, 1, smooth=False)


def paint_mouth(face: Face) -> None:
    """Paint lips and teeth, and the moustache over them."""
    rng, has, skin = face.rng, face.has, face.skin
    mouth = face.points[48:68]
    outer, upper, lower = mouth[:12], mouth[12:17], mouth[[12, 19, 18, 17, 16]]
    if has["Heavy_Makeup"]:
        lips = np.array(LIPS[rng.integers(len(LIPS))]) * rng.normal(1, 0.06)
    else:
        lips = skin * ((0.84, 0.66, 0.64) if has["Male"] else (0.9, 0.62, 0.62))
    face.paint(outer, lips)
    face.paint(np.concatenate([outer[:7], upper[::-1]]), lips * 0.85)
    face.paint(mix(lower[1:4], outer[10:7:-1], 0.5), mix(lips, (255, 230, 225), 0.3), 1)
    if has["Mouth_Slightly_Open"]:
        face.paint(np.concatenate([upper, lower[3:0:-1]]), (46, 14, 16))
        share = rng.uniform(0.45, 0.8) if has["Smiling"] else rng.uniform(0.1, 0.4)
        upper = mix(upper, upper.mean(axis=0), 0.08)
        face.paint(np.concatenate([upper, mix(upper, lower, share)[3:0:-1]]), (240, 234, 224))
    else:
        face.paint((upper + lower) / 2, lips * 0.4, 1)
    for corner in outer[[0, 6]]:
        face.paint(ellipse(corner, 1.3, 1.3), skin * 0.5)
    if has["Mustache"]:
        nose, lip = face.points[33, 1] + 1, outer[2:5, 1].mean() + rng.uniform(0, 1)
        wide, droop = rng.uniform(16, 22), rng.uniform(-3, 8)
        half = np.array(
            [(0, nose + 2), (6, nose + 1), (13, nose + 4), (wide, lip + droop), (13, lip + 2.5), (5, lip + 1)]
        )
        colour, middle = face.hair * 0.6, outer[3] * (1, 0)
        face.paint(middle + np.concatenate([half, [(0, lip - 1)], mirror(half)[:0:-1]]), colour)
        for x in np.linspace(3 - wide, wide - 3, 11):
            hair = np.array([(x * 0.85, nose + 2.5 + abs(x) / 6), (x * 1.05, lip + 1)])
            face.paint(middle + hair, colour * rng.uniform(0.5, 1.5), 1, smooth=False)


def paint_hair_before(face: Face, hair: np.ndarray, side: np.ndarray, edge: np.ndarray) -> None:
    """Paint the locks at the sides of the face and, without a hat, the hair above it down to the `edge`."""
    outlines = []
    if face.length > 30:
        near = side - (face.volume + face.rng.uniform(0, 5), 0) - np.array((3, 0)) * np.sin(side[:, 1:] / 30)
        far = moved(side, 0, 1)
        lock = np.concatenate([near, [(side[-1, 0] - 6, face.length + 5)], far[::-1], [(face.half_width, -30)]])
        outlines += [lock, mirror(lock)]
    if not face.has["Wearing_Hat"]:
        top = arch(face.half_width + face.volume, -62 - face.volume, 4)
        if face.has["Wavy_Hair"]:
            top[1:-1] *= 1 + 0.025 * (-1) ** np.arange(7)[:, None]
        outlines.append(np.concatenate([top, edge]))
    if outlines:
        face.cover(outlines, hair)


def paint_hat(face: Face, low: float) -> None:
    """Paint a woolly hat, a cap with a peak, or a hat with a brim; `low` is its lower edge, as y."""
    rng, half_width = face.rng, face.half_width + 5
    colour = rng.uniform(10, 230) + rng.normal(0, 45, 3)
    band = (colour + rng.choice([-60, 60], 3)).clip(5, 250)
    kind = rng.choice(["woolly", "cap", "brimmed"])
    x, _ = grid()
    ribs = 0.12 * np.sin(1.3 * x) if kind == "woolly" else 0
    shade = (1.05 - 0.35 * (x / 50) ** 2 + 0.15 * face.light * x / 50 + ribs)[..., None]
    fabric = np.broadcast_to((shade * colour).clip(0, 255).astype(np.uint8), face.canvas.shape)
    crown = arch(half_width, rng.uniform(-86, -76), low)
    if kind == "brimmed":
        crown[1:-1, 1] = np.minimum(crown[1:-1, 1], crown[4, 1] + 14)
        crown[4, 1] += 4
    face.cover([np.concatenate([crown, [(20, low + 1), (-20, low + 1)]])], fabric)
    if kind == "woolly":
        face.paint(arch(half_width, low - 5, low - 1), band, 13)
    elif kind == "cap":
        face.paint(ellipse((0, low - 24), 8, 7), band)
        face.paint(np.array([(-half_width, low + 2), (0, low - 8), (half_width, low + 2), (0, low + 9)]), band * 0.8)
    else:
        face.paint(arch(half_width - 2, low - 9, low - 6), band, 9)
        face.paint(ellipse((0, low), half_width + rng.uniform(20, 34), 7), colour * 0.8)


def paint_glasses(face: Face) -> None:
    rng = face.rng
    frame = np.array(FRAME[rng.integers(len(FRAME))])
    width = int(rng.integers(2, 5))
    size, power = rng.uniform((14.5, 10.5), (17.5, 13.5)), rng.uniform(2, 3.6)
    unit = np.sign(OCTAGON) * np.abs(OCTAGON) ** (2 / power)
    dark = rng.random() < 0.2
    centres = face.points[EYES].mean(axis=1) * (1.03, 1)
    for side, centre in zip((-1, 1), centres, strict=True):
        lens = moved(centre + size * unit, 0, 1.5)
        if dark:
            face.paint(lens, (26, 24, 28))
        face.paint(centre + size * ((-0.6, 0), (-0.2, -0.6)), (190, 200, 210) if not dark else (110, 115, 125), 1)
        face.paint(lens[[*range(8), 0]], frame, width)
        arm = np.array([moved(centre, side * size[0], -3), (side * (face.half_width + 1), -4)])
        face.paint(arm, frame, width, smooth=False)
    bridge = np.stack(
        [moved(centres[0], size[0], -1), moved(centres.mean(axis=0), 0, -3.5), moved(centres[1], -size[0], -1)]
    )
    face.paint(bridge, frame, width)


def photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the canvas slightly over- or underexposed, slightly out of focus, with grain: (HEIGHT, WIDTH, 3) uint8."""
    soft = cv2.GaussianBlur(canvas, (3, 3), rng.uniform(0.4, 0.7))
    noise, share = cv2.cvtColor(some_grain(rng), cv2.COLOR_GRAY2RGB), rng.uniform(1, 4) / 32
    return cv2.addWeighted(soft, rng.normal(1, 0.06), noise, share, -128 * share)


def draw(has: Mapping[str, bool], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a face with these attributes, a bool for each of `DRAWN`.

    Returns the image, (HEIGHT, WIDTH, 3) uint8 RGB, and its 68 points in iBUG's order, (68, 2) int64 of (x, y) in
    pixels: jaw, right brow, left brow, nose, right eye, left eye, mouth (the person's right and left).
    """
    angle, scale = rng.normal(0, 0.035), rng.normal(1, 0.02)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    colour = next((name for name in HAIR if has.get(name)), "Brown_Hair" if has["Bald"] else "other")
    tone = rng.uniform(0, 1.7 if colour in ("Blond_Hair", "other") else 3.99)
    skin = PALE if has["Pale_Skin"] else mix(SKIN[int(tone)], SKIN[int(tone) + 1], tone % 1)
    formed = has["Straight_Hair"] or has["Wavy_Hair"]
    if has["Bald"]:
        length = 0.0
    elif has["Male"]:
        length = rng.uniform(35, 75) if formed and rng.random() < 0.4 else rng.uniform(6, 15)
    else:
        length = rng.uniform(60, 115) if formed or rng.random() < 0.8 else rng.uniform(6, 60)
    face = Face(
        has=has,
        rng=rng,
        points=features(has, rng),
        shift=CENTRE + rng.normal(0, 1.2, 2),
        turn=np.array([[cos, sin], [-sin, cos]]),
        light=rng.uniform(-1, 1),
        skin=(skin * rng.normal(1, 0.02)).clip(0, 255),
        hair=np.array(HAIR[colour]) * rng.normal(1, 0.08),
        length=length,
        volume=rng.uniform(4, 8) + 3 * (length > 20) + 4 * has["Wavy_Hair"],
        canvas=background(rng),
        shade=np.empty((HEIGHT // 2, WIDTH // 2, 3), dtype=np.uint8),
    )
    low = rng.uniform(-32, -27)
    edge = arch(face.half_width, low, low + 8)[::-1] if has["Wearing_Hat"] else hairline(face)
    if has["Bald"]:
        paint_neck(face)
    else:
        hair, side = strands(face), locks(face)
        paint_hair_behind(face, hair, side)
        paint_neck(face)
    shade_head(face, None if has["Bald"] else edge)
    paint_head(face)
    paint_nose(face)
    paint_eyes(face)
    paint_mouth(face)
    if not has["Bald"]:
        paint_hair_before(face, hair, side, edge)
    if has["Wearing_Hat"]:
        paint_hat(face, low)
    if has["Eyeglasses"]:
        paint_glasses(face)
    return photograph(face.canvas, rng), face.place(face.points).round().astype(np.int64)


def faces(attributes: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw a face for each row of attributes, (n, 18) bool in the order of `DRAWN`; yield image and points (`draw`)."""
    for row in attributes:
        yield draw(dict(zip(DRAWN, row.tolist(), strict=True)), rng)
