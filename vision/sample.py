"""Draw the six pictures of faces from the model, given nothing, or any of one face's six.

Writes a grid of each one's means (image.png, gray.png, ...) and contact_sheet.png: what is given beside the first
samples of all six.
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from mvae.datasets.picture_cache import load_picture
from mvae.errors import UsageError
from mvae.files import write_atomically
from mvae.scripts import flags

from datasets import MODALITIES, MODES, SIZE

if TYPE_CHECKING:
    from torch import Tensor

N_ROWS = 8  # of the contact sheet
CELL, HEADER = SIZE + 6, 32  # of the contact sheet, in pixels


def add_conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--condition-file",
        type=Path,
        action="append",
        metavar="FILE",
        help="a picture of any size and mode to be given; may be repeated, each with a --condition-type",
    )
    parser.add_argument(
        "--condition-type",
        action="append",
        choices=MODALITIES,
        help="what the file is, the first type for the first file, and so on; a mask is black on white, as of setup.py",
    )


def conditions(files: list[Path], types: list[str]) -> dict[str, "Tensor"]:
    """The pictures given, by modality, each (1, channels, 64, 64) in [0, 1], as the training data's are.

    Raises UsageError unless each file has a type and each type one file; UserError if a file can't be read.
    """
    if len(files) != len(types):
        raise UsageError(
            f"each --condition-file needs a --condition-type: there are {len(files)} files and {len(types)} types"
        )
    for name in types:
        if types.count(name) > 1:
            raise UsageError(f"--condition-type {name} is there {types.count(name)} times: each type may be given once")
    given = {}
    for path, name in zip(files, types, strict=True):
        picture = load_picture(path, MODES[name], SIZE)
        given[name] = 1 - picture if name == "mask" else picture
    return given


def contact_sheet(given: dict[str, "Tensor"], drawn: dict[str, "Tensor"]) -> Image.Image:
    """A column of pictures for each modality that is given or drawn, labelled; `drawn` are (n, channels, 64, 64)."""
    from mvae.pictures import to_image

    columns = [(f"given\n{name}", picture) for name, picture in given.items()]
    columns += [(f"\n{name}", some[:N_ROWS]) for name, some in drawn.items()]
    n_rows = max(len(some) for _, some in columns)
    sheet = Image.new("RGB", (len(columns) * CELL, HEADER + n_rows * CELL), "white")
    for i, (label, some) in enumerate(columns):
        left = i * CELL + (CELL - SIZE) // 2
        ImageDraw.Draw(sheet).multiline_text((left, 2), label, fill="black", spacing=2)
        for row, picture in enumerate(some):
            sheet.paste(to_image(picture), (left, HEADER + row * CELL))
    return sheet


def main() -> None:
    parser = flags.sampling_parser(__doc__)
    parser.set_defaults(out_dir=Path("./samples"))
    add_conditions(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint, pictures

    from model import build_model

    torch.set_grad_enabled(False)
    given = conditions(args.condition_file or [], args.condition_type or [])
    device = flags.device(args)
    model, _ = checkpoint.load_model(args.model_path, "vision", build_model, device)
    torch.manual_seed(args.seed)
    z = model.draw({name: picture.to(device) for name, picture in given.items()}, args.n_samples, device)
    drawn = {name: model.likelihood(name).mean(z) for name in MODALITIES}
    for name, some in drawn.items():
        pictures.save_grid(args.out_dir / f"{name}.png", some)
    buffer = io.BytesIO()
    contact_sheet(given, drawn).save(buffer, format="PNG", optimize=True)
    write_atomically(args.out_dir / "contact_sheet.png", buffer.getvalue())
    print(f"wrote {', '.join(f'{name}.png' for name in MODALITIES)} and contact_sheet.png in {args.out_dir}")


if __name__ == "__main__":
    flags.run(main)
