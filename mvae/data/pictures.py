"""Picture files of any mode, depth and size as pixels: upright, 8 bits per channel, resized and cropped."""

import io
import warnings
from pathlib import Path
from typing import Literal, cast

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError
from ..files import check_readable

MOST_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PIL's others run more code

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Mode = Literal["RGB", "L"]


def is_named_as_picture(name: str, extensions: tuple[str, ...] = EXTENSIONS) -> bool:
    """Return whether a file in a folder of pictures is meant as one, by its name; not .DS_Store, ._1.jpg, Thumbs.db."""
    return name.lower().endswith(extensions) and not name.startswith(".")


def load_picture(path: Path, mode: Mode, size: int) -> Tensor:
    """Read a picture file as (1, channels, size, size) in [0, 1], processed as training pictures are.

    Raises UserError if it can't be read or isn't a picture.
    """
    check_readable(path)
    try:
        return picture(path.read_bytes(), mode, size)
    except Exception as error:
        raise UserError(f"can't read {path}: {fault(error)}") from None


def fault(error: Exception) -> str:
    """Return what is wrong with a picture file, from what reading it raised: PIL's errors are of many kinds."""
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MOST_PIXELS:,} pixels"
    reason = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:200]})"
    return getattr(error, "strerror", None) or f"damaged or not a picture{reason}"


def picture(content: bytes, mode: Mode, size: int) -> Tensor:
    """Decode a file's content as `load_picture` does. Raises what `pixels` does."""
    decoded = bytearray(pixels(content, mode, size))
    return torch.frombuffer(decoded, dtype=torch.uint8).view(1, len(mode), size, size).float() / 255


def pixels(content: bytes, mode: Mode, size: int) -> bytes:
    """Return a picture file's pixels by channel, row, column, after torchvision's Resize(size) and CenterCrop(size).

    Raises what `open_picture` and `eight_bit` do.
    """
    with open_picture(io.BytesIO(content)) as opened:
        image = eight_bit(opened).convert(mode)
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return b"".join(band.tobytes() for band in image.split())


def open_picture(file: Path | io.BytesIO) -> Image.Image:
    """Open a picture, which isn't decoded yet. Raises PIL's errors, also if it is too large."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        opened = Image.open(file, formats=FORMATS)
    if opened.width * opened.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    return opened


def eight_bit(opened: Image.Image) -> Image.Image:
    """Convert an opened picture to 8 bits per channel, RGB or L.

    Applies the EXIF orientation; transparent pixels become white. 16- or 12-bit grey and floats in [0, 1] are scaled.
    Raises ValueError for numbers in another range, and PIL's errors.
    """
    image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":
        bits = getattr(opened, "tag_v2", {}).get(258, (16,))[0]  # a TIFF's BitsPerSample; other formats have 16
        white = 1 if image.mode == "F" else 2**bits - 1
        low, high = cast(tuple[float, float], image.getextrema())
        if not 0 <= low <= high <= white <= 65535:
            raise ValueError(f"pixels must be of 8 or 16 bits, or floats in [0, 1]; found {low:g} to {high:g}")
        image = image.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
