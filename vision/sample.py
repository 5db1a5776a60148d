"""Draw the six pictures of faces from the model, given nothing, or any of one face's six.

Writes a grid of each one's means (image.png, gray.png, ...) and contact_sheet.png: what is given beside the first
samples of all six.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvae.errors import UsageError
from mvae.scripts import flags, running, types

import datasets
from datasets import CONTROLS, MODALITIES, SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from mvae.pictures import Sheet
    from mvae.scripts.sampling import Condition

N_ROWS = 8  # of the contact sheet


def add_conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--condition-file",
        type=types.path,
        action="append",
        metavar="FILE",
        help="a picture of any size and mode, with a --condition-type; may be repeated, and two of one type are rows",
    )
    parser.add_argument(
        "--condition-type",
        action="append",
        choices=MODALITIES,
        help="what the file is, the first type for the first file, and so on",
    )


def conditions(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The files given, by modality. Raises UsageError unless each file has a type."""
    files, types = args.condition_file or [], args.condition_type or []
    if len(files) != len(types):
        raise UsageError(
            f"each --condition-file needs a --condition-type: there are {len(files)} files and {len(types)} types"
        )
    given: dict[str, list[Any]] = {}
    for file, name in zip(files, types, strict=True):
        given.setdefault(name, []).append(file)
    return given


def contact_sheet(rows: list["Condition"], drawn: dict[str, "Tensor"]) -> "Sheet":
    """What each row is given, beside its first samples of all six; `drawn` are (rows, n, channels, 64, 64)."""
    from mvae.pictures import Sheet
    from mvae.scripts.sampling import given_pictures

    given = [given_pictures(row, CONTROLS) for row in rows]
    names = [name for name in MODALITIES if any(name in some for some in given)]
    n = min(max(1, N_ROWS // len(rows)), len(next(iter(drawn.values()))[0]))
    sheet = Sheet(
        len(rows) * n,
        len(names) + len(MODALITIES),
        SIZE,
        beside={i * n: (row.said, n) for i, row in enumerate(rows)},
        above=[f"given\n{name}" for name in names] + [f"\n{name}" for name in MODALITIES],
    )
    for i, some in enumerate(given):
        for name, picture in some.items():
            sheet.put(i * n, names.index(name), picture)
        for column, name in enumerate(MODALITIES, len(names)):
            for j in range(n):
                sheet.put(i * n + j, column, drawn[name][i, j])
    return sheet


def main() -> None:
    parser = flags.sampling_parser(__doc__, CONTROLS)
    parser.set_defaults(out_dir=Path("./samples"))
    add_conditions(parser)
    args = parser.parse_args()
    given = conditions(args)

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import sampling

    from model import build_model

    rows, drawn, about = sampling.sample(args, "vision", build_model, CONTROLS, datasets.examples, given=given, stem="")
    contact_sheet(rows, drawn).save(args.out_dir / "contact_sheet.png", about)
    print(f"wrote contact_sheet.png in {args.out_dir}, too")


if __name__ == "__main__":
    running.run(main)
