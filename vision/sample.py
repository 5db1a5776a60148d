"""Draw the six pictures of faces from the model, conditioned on nothing, or any of one face's six.

Writes a grid of the means of each (image.png, gray.png, ...) and contact_sheet.png: what was given, next to the first
samples of all six.
"""

from dataclasses import dataclass
from pathlib import Path

from mvae import UsageError, cli
from mvae.run.grids import Sheet
from mvae.tools.sampling import Condition, Sampling, sample

from torch import Tensor

from datasets import CONTROLS, MODALITIES, NAME, SIZE, examples
from model import build_model

N_ROWS = 8  # of the contact sheet


@dataclass(kw_only=True)
class Config(Sampling):
    # Conditions
    condition_file: tuple[Path, ...] = ()  # pictures of any size, each with a --condition-type
    condition_type: tuple[str, ...] = ()  # modality of each file, in the same order; two files of one are two rows

    # Output
    out_dir: Path = Path("samples")  # folder to write to

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.condition_file) != len(self.condition_type) or not set(self.condition_type) <= set(MODALITIES):
            raise UsageError(
                f"each condition_file needs a condition_type of {', '.join(MODALITIES)}; "
                f"got {len(self.condition_file)} files and types {', '.join(self.condition_type) or 'none'}"
            )


def contact_sheet(rows: list[Condition], drawn: dict[str, Tensor]) -> Sheet:
    """Draw what each row is given next to its first samples of all six; `drawn` are (rows, n, channels, 64, 64)."""
    given = [row.pictures(CONTROLS) for row in rows]
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
    config = cli.parse(__doc__, Config)
    given: dict[str, list[Path]] = {}
    for file, name in zip(config.condition_file, config.condition_type, strict=True):
        given.setdefault(name, []).append(file)
    job, drawn = sample(config, NAME, build_model, CONTROLS, examples, given=given, stem="")
    contact_sheet(job.rows, drawn).save(config.out_dir / "contact_sheet.png", job.about)
    print(f"wrote contact_sheet.png in {config.out_dir}")


if __name__ == "__main__":
    cli.run(main)
