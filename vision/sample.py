"""Draw the six pictures of faces from the model, conditioned on nothing, or any of one face's six.

Writes a grid of the means of each (image.png, gray.png, ...) and contact_sheet.png, with the first samples of all six
next to what was given.
"""

from dataclasses import dataclass
from pathlib import Path

from mvae import UsageError, cli
from mvae.tools.controls import Value
from mvae.tools.sampling import Sampling, sample

from datasets import CONTROLS, MODALITIES, NAME, examples
from model import build_model


@dataclass(kw_only=True)
class Config(Sampling):
    # Conditions
    condition_file: list[Path] | None = None  # pictures of any size, each with a --condition-type
    condition_type: list[str] | None = None  # modality of each file, in the same order; two files of one are two rows

    # Output
    out_dir: Path = Path("samples")  # folder to write to

    def __post_init__(self) -> None:
        super().__post_init__()
        files, types = self.condition_file or [], self.condition_type or []
        if len(files) != len(types) or not set(types) <= set(MODALITIES):
            raise UsageError(
                f"each condition_file needs a condition_type of {', '.join(MODALITIES)}; "
                f"got {len(files)} files and types {', '.join(types) or 'none'}"
            )


def main() -> None:
    config = cli.parse(__doc__, Config)
    given: dict[str, list[Value]] = {}
    for file, name in zip(config.condition_file or [], config.condition_type or [], strict=True):
        given.setdefault(name, []).extend(CONTROLS[name].read(file))
    sample(config, NAME, build_model, CONTROLS, examples, given=given, stem="")


if __name__ == "__main__":
    cli.run(main)
