"""Draw faces and attributes from the model, given nothing, a picture, attributes, or both.

Writes sample_image.png, a grid of the pictures' means, and sample_attrs.txt, a line of each one's more probable
attributes in the same order. The attributes are one vector: those that --condition-on-attrs doesn't name are absent.
"""

from mvae.scripts import faces, flags, running

import datasets


def main() -> None:
    parser = flags.sampling_parser(__doc__, datasets.CONTROLS)
    faces.add_flags(parser)
    flags.add_conditions(parser, datasets.CONTROLS)
    args = parser.parse_args(faces.arguments())

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import sampling

    from model import build_model

    sampling.sample(args, "celeba", build_model, datasets.CONTROLS, datasets.examples)


if __name__ == "__main__":
    running.run(main)
