"""Draw faces and attributes from the model, conditioned on nothing, a picture, attributes, or both.

Writes sample_image.png, a grid of the pictures' means, and sample_attrs.txt, a line with the more probable attributes
of each, in the same order. The attributes are one vector: those that --condition-on-attrs doesn't name are absent.
"""

from dataclasses import dataclass

from mvae import cli
from mvae.tools.sampling import Sampling, sample

from datasets import CONTROLS, NAME, Source, examples
from model import build_model


@dataclass(kw_only=True)
class Config(Sampling, Source):
    # Conditions
    condition_on_image: list[str] | None = None  # picture file, or attributes to find a held-out picture; each is a row
    condition_on_attrs: list[str] | None = None  # attributes of a row, such as Male,-Smiling (a minus: absent)


def main() -> None:
    sample(cli.parse(__doc__, Config), NAME, build_model, CONTROLS, examples)


if __name__ == "__main__":
    cli.run(main)
