"""A picture file of any format, mode, depth and size, as pixels: upright, in 8 bits a channel, resized and cropped.

Torch is imported only where it is needed, so that the processes that decode start fast.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from PIL import Image, ImageOps, TiffImagePlugin

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MOST_PIXELS = 50_000_000  # of a user's picture
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of users' pictures; PIL's others run more code


def load_picture(path: Path, mode: Literal["RGB", "L"], size: int) -> "Tensor":
    """A picture file of any size and mode as (1, channels, size, size) in [0, 1], made as the training data's are.

    First it is turned upright, as a camera says, and what is transparent becomes white. Raises UserError if it can't be
    read or is no picture.
    """
    try:
        return picture(path.read_bytes(), mode, size)
    except OSError as error:  # PIL's error for what is no picture is one, too
        raise UserError(f"can't read {path} as a picture: {error.strerror or 'it is none, or damaged'}") from None
    except Exception as error:  # PIL fails in many ways on a damaged file; each means the same to the user
        reason = f"({str(error)[:200]})" if isinstance(error, ValueError) else ""
        raise UserError(f"can't read {path} as a picture: it is none, or damaged {reason}".rstrip()) from None


def picture(content: bytes, mode: Literal["RGB", "L"], size: int) -> "Tensor":
    """What `load_picture` makes of a file's content. Raises what PIL raises if it is no picture, or ValueError."""
    import torch

    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        if opened.width * opened.height > MOST_PIXELS:  # before a pixel of it is decoded
            raise ValueError(f"{opened.width}x{opened.height} pixels are more than {MOST_PIXELS}")
        content = fitted(eight_bit(opened).convert(mode), size)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(1, len(mode), size, size).float() / 255


def pixels(content: bytes, mode: str, size: int) -> bytes:
    """A picture file's pixels by channel, row, column, after torchvision's Resize(size) and CenterCrop(size)."""
    with Image.open(io.BytesIO(content)) as opened:
        return fitted(eight_bit(opened).convert(mode), size)


def eight_bit(opened: Image.Image) -> Image.Image:
    """An opened picture in 8 bits a channel, RGB or L: upright, as a camera says, and white where it is transparent.

    Grey of 16 or 12 bits is scaled, and so are floats in [0, 1]. Raises ValueError for numbers whose white isn't known,
    and what PIL raises.
    """
    image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":
        bits = opened.tag_v2.get(258, (1,)) if isinstance(opened, TiffImagePlugin.TiffImageFile) else (16,)
        white = 1 if image.mode == "F" else 2 ** bits[0] - 1
        low, high = cast(tuple[float, float], image.getextrema())
        if not 0 <= low <= high <= white <= 65535:
            raise ValueError(f"its pixels go from {low:g} to {high:g}: numbers of 8 or 16 bits are wanted, or 0 to 1")
        image = image.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def fitted(image: Image.Image, size: int) -> bytes:
    """An image's pixels by channel, row, column, after torchvision's Resize(size) and CenterCrop(size)."""
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return b"".join(band.tobytes() for band in image.split())
