"""Draw canvases and texts from the model, given nothing, a canvas, a text, or both.

Writes sample_image.png, a grid of the canvases' means, and sample_text.txt, a line for each in the same order: the text
decoded greedily, or drawn with --draw. The empty canvas's line is empty.
"""

from mvae.scripts import flags, running

import datasets


def main() -> None:
    parser = flags.sampling_parser(__doc__, datasets.CONTROLS)
    datasets.add_canvas_dir(parser)
    flags.add_conditions(parser, datasets.CONTROLS)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import sampling

    from model import build_model

    sampling.sample(args, "multimnist", build_model, datasets.CONTROLS, datasets.examples)


if __name__ == "__main__":
    running.run(main)
