"""Train the MVAE on faces and five pictures derived from each; they are decoded once.

The loss is the negative sum of the ELBO of all six, the ELBO of each one alone, and the ELBOs of --approx-m random
subsets, in nats per example. By default every term scores all six, so that each picture learns to give the others;
the paper's terms score what they are given (--reconstruct given).
"""

import torch

from mvae import cli
from mvae.objective import Objective
from mvae.training import fit

import datasets
from datasets import MODALITIES
from model import build_model


def main() -> None:
    parser = cli.training_parser(
        __doc__,
        modalities=MODALITIES,
        lambdas=dict.fromkeys(MODALITIES, 1.0),
        n_latents=250,
        batch_size=50,
        epochs=100,
        annealing_epochs=20,
        lr=1e-4,
        approx_m=0,
        reconstruct="all",
    )
    datasets.add_flags(parser)
    args = parser.parse_args()
    options = cli.options(args)
    train, validation = datasets.training_data(
        datasets.folders(args), args.data_dir, args.cache_dir, limit=args.limit, workers=args.workers
    )
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={name: getattr(args, f"lambda_{name}") for name in MODALITIES},
        reconstruct=cli.reconstruct(args),
    )
    fit(objective, train, validation, options, experiment="vision", settings=cli.settings(args))


if __name__ == "__main__":
    cli.run(main)
