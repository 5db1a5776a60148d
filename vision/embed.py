"""Write the posterior's mean and log-variance of faces of a split, or in files of your own, as one .npz file.

A map that --plot draws has no colours: there are no labels.
"""

from mvae.scripts import flags, running

import datasets


def main() -> None:
    parser = flags.embedding_parser(__doc__, datasets.CONTROLS)
    datasets.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    from mvae.scripts import embedding

    from model import build_model

    embedding.embed(args, "vision", build_model, datasets.CONTROLS, datasets.examples)


if __name__ == "__main__":
    running.run(main)
