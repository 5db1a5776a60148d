"""Draw pictures and labels from the model, given nothing, a picture of a digit, a label, or both.

Writes sample_image.png, a grid of the pictures' means, and sample_text.txt, the most probable label of each, in the
same order.
"""

from mvae.scripts import flags, running

import datasets


def main() -> None:
    parser = flags.sampling_parser(__doc__, datasets.CONTROLS)
    flags.add_conditions(parser, datasets.CONTROLS)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import sampling

    from model import build_model

    sampling.sample(args, "mnist", build_model, datasets.CONTROLS, datasets.examples)


if __name__ == "__main__":
    running.run(main)
