"""Train the MVAE on CelebA faces and their attributes, one vector of 18; the pictures are decoded once.

The loss is the negative sum of ELBO(image, attrs), ELBO(image) and ELBO(attrs), in nats per example.
"""

from mvae.scripts import faces, running, stages, training

import datasets

PRESETS = {
    "fast": {
        "reconstruct": ["all"],
        "epochs": 20,
        "beta_hold": 1.0,
        "annealing_epochs": 7,
        "lr": 1e-3,
        "lr_schedule": "late",
        "warmup_epochs": 0.2,
        "weight_decay": 0.05,
    },
    "weak": {
        "reconstruct": ["attrs"],
        "images_first": 10,
        "beta_hold": 1.0,
        "annealing_epochs": 4,
        "epochs": 4,
        "lr": 1e-3,
        "lr_schedule": "late",
        "warmup_epochs": 0.2,
        "weight_decay": 0.05,
    },
}
"""Defaults for --preset, in place of the paper's, which are below."""


def main() -> None:
    parser = training.parser(
        __doc__,
        modalities=datasets.MODALITIES,
        lambdas={"image": 1.0, "attrs": 10.0},
        n_latents=100,
        batch_size=100,
        epochs=100,
        annealing_epochs=20,
        lr=1e-4,
        presets=PRESETS,
    )
    faces.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import Objective, fit, metrics

    from model import build_model

    options = training.options(args)
    train, validation = datasets.training_data(
        args.data_dir, args.cache_dir, limit=args.limit, allow_missing=args.allow_missing, workers=args.workers
    )
    train, validation = training.supervised(args, train, validation, datasets.MODALITIES)
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={"image": args.lambda_image, "attrs": args.lambda_attrs},
        iw_samples=args.iw_samples,
        reconstruct=training.reconstruct(args),
    )
    train = stages.images_first(
        args, objective.model, train, validation, options, experiment="celeba", labels=["attrs"]
    )
    fit(
        objective,
        torch.optim.AdamW(objective.parameters(), args.lr, weight_decay=args.weight_decay, fused=True),
        train,
        validation,
        options,
        beta=training.beta_schedule(args),
        lr=training.lr_schedule(args),
        metrics={"attribute_accuracy": metrics.attribute_accuracy(["attrs"])},
        experiment="celeba",
        settings=training.settings(args),
    )


if __name__ == "__main__":
    running.run(main)
