"""Train the MVAE on MultiMNIST canvases and their texts; the canvases are made from MNIST if there are none.

The loss is the negative sum of ELBO(image, text), ELBO(image) and ELBO(text), in nats per example.
"""

import torch

from mvae import cli
from mvae.objective import Objective
from mvae.training import fit

import datasets
from model import build_model


def main() -> None:
    parser = cli.training_parser(
        __doc__,
        modalities=datasets.MODALITIES,
        lambdas={"image": 1.0, "text": 10.0},
        n_latents=100,
        batch_size=100,
        epochs=500,
        annealing_epochs=200,
        lr=1e-3,
        n_val=5000,
    )
    datasets.add_canvas_dir(parser)
    args = parser.parse_args()
    options = cli.options(args)
    recipe = datasets.prepare(args.data_dir, args.canvas_dir)
    train, validation = datasets.training_data(args.canvas_dir, n_val=args.n_val, limit=args.limit)
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={"image": args.lambda_image, "text": args.lambda_text},
        reconstruct=cli.reconstruct(args),
    )
    settings = {**cli.settings(args), "canvases": recipe}
    fit(objective, train, validation, options, experiment="multimnist", settings=settings)


if __name__ == "__main__":
    cli.run(main)
