"""Write the posterior's mean and log-variance of faces of a split, or in files of your own, as one .npz file.

The file has the examples' attributes, too; --plot draws a map, and colours it by them.
"""

from mvae.scripts import faces, flags, running

import datasets


def main() -> None:
    parser = flags.embedding_parser(__doc__, datasets.CONTROLS)
    faces.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import embedding

    from model import build_model

    embedding.embed(args, "celeba", build_model, datasets.CONTROLS, datasets.examples)


if __name__ == "__main__":
    running.run(main)
