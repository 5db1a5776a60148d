"""Draw canvases and texts from the model, conditioned on nothing, a canvas, a text, or both.

Writes sample_image.png, a grid of the canvases' means, and sample_text.txt, a line for each in the same order: the text
decoded greedily, or drawn with --draw. The line of an empty canvas is empty.
"""

from dataclasses import dataclass

from mvae import cli
from mvae.tools.sampling import Sampling, sample

from datasets import CONTROLS, NAME, Source, examples
from model import build_model


@dataclass(kw_only=True)
class Config(Sampling, Source):
    # Conditions
    condition_on_image: list[str] | None = None  # picture file, or a text to find a held-out picture; each is a row
    condition_on_text: list[str] | None = None  # texts of up to four digits, separated by commas; each is a row


def main() -> None:
    sample(cli.parse(__doc__, Config), NAME, build_model, CONTROLS, examples)


if __name__ == "__main__":
    cli.run(main)
