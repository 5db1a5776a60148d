"""Train the MVAE on CelebA faces and their attributes, one vector of 18; the pictures are decoded once.

The loss is the negative sum of ELBO(image, attrs), ELBO(image) and ELBO(attrs), in nats per example.
"""

import torch

from mvae import celeba, cli
from mvae.objective import Objective
from mvae.training import fit

import datasets
from model import build_model


def main() -> None:
    parser = cli.training_parser(
        __doc__,
        modalities=datasets.MODALITIES,
        lambdas={"image": 1.0, "attrs": 10.0},
        n_latents=100,
        batch_size=100,
        epochs=100,
        annealing_epochs=20,
        lr=1e-4,
    )
    celeba.add_flags(parser)
    args = parser.parse_args()
    options = cli.options(args)
    train, validation = datasets.training_data(
        args.data_dir, args.cache_dir, limit=args.limit, allow_missing=args.allow_missing, workers=args.workers
    )
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={"image": args.lambda_image, "attrs": args.lambda_attrs},
        reconstruct=cli.reconstruct(args),
    )
    fit(objective, train, validation, options, experiment="celeba", settings=cli.settings(args))


if __name__ == "__main__":
    cli.run(main)
