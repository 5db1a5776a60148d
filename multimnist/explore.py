"""Open a page on a trained model: give it what you like, and see what it draws and believes.

It is served on this machine alone. It needs Dash: pip install -r requirements-explore.txt
"""

from mvae.scripts import flags, running


def main() -> None:
    args = flags.exploring_parser(__doc__).parse_args()
    from mvae.scripts.exploring import explore

    import datasets
    from model import build_model

    explore(args, "multimnist", build_model, datasets.CONTROLS)


if __name__ == "__main__":
    running.run(main)
