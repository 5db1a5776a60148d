"""Train the MVAE on CelebA faces and 18 attributes, each a modality; the pictures are decoded once.

The loss is the negative sum of the ELBO of all, the ELBO of each one alone, and the ELBOs of --approx-m random subsets,
in nats per example.
"""

from mvae.datasets.celeba import ATTRIBUTES
from mvae.scripts import faces, running, stages, training

import datasets

PRESETS = {
    "fast": {
        "reconstruct": ["attrs"],
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
        modalities=("image", "attrs"),
        lambdas={"image": 1.0, "attrs": 10.0},
        n_latents=100,
        batch_size=100,
        epochs=100,
        annealing_epochs=20,
        lr=1e-4,
        approx_m=1,
        presets=PRESETS,
        missing={"attr-missing": "the probability that an attribute of an example is missing"},
    )
    faces.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import Objective, fit, metrics
    from mvae.supervision import drop

    from model import build_model

    options = training.options(args)
    train, validation = datasets.training_data(
        args.data_dir, args.cache_dir, limit=args.limit, allow_missing=args.allow_missing, workers=args.workers
    )
    train, validation = training.supervised(args, train, validation, ("image", *ATTRIBUTES))
    train = drop(train, args.attr_missing, ATTRIBUTES, seed=args.seed) if args.attr_missing else train
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={"image": args.lambda_image, **dict.fromkeys(ATTRIBUTES, args.lambda_attrs)},
        iw_samples=args.iw_samples,
        reconstruct=training.reconstruct(args, groups={"attrs": ATTRIBUTES}),
    )
    train = stages.images_first(
        args, objective.model, train, validation, options, experiment="celeba19", labels=ATTRIBUTES
    )
    fit(
        objective,
        torch.optim.AdamW(objective.parameters(), args.lr, weight_decay=args.weight_decay, fused=True),
        train,
        validation,
        options,
        beta=training.beta_schedule(args),
        lr=training.lr_schedule(args),
        metrics={"attribute_accuracy": metrics.attribute_accuracy(ATTRIBUTES)},
        experiment="celeba19",
        settings=training.settings(args),
    )


if __name__ == "__main__":
    running.run(main)
