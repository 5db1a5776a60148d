"""Train the MVAE on faces and five pictures derived from each; they are decoded once.

The loss is the negative sum of the ELBO of all six, the ELBO of each one alone, and the ELBOs of --approx-m random
subsets, in nats per example. By default every term scores all six, so that each picture learns to give the others;
the paper's terms score what they are given (--reconstruct given).
"""

from mvae.scripts import running, stages, training

import datasets
from datasets import MODALITIES

PRESETS = {
    "fast": {
        "reconstruct": ["image", "edge", "mask"],
        "epochs": 8,
        "beta_hold": 0.5,
        "annealing_epochs": 3,
        "lr": 1e-3,
        "lr_schedule": "late",
        "warmup_epochs": 0.2,
    }
}
"""Defaults for --preset, in place of the paper's, which are below."""


def main() -> None:
    parser = training.parser(
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
        presets=PRESETS,
        missing={"missing": "the probability that a picture of an example is missing"},
    )
    datasets.add_flags(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import Objective, fit
    from mvae.supervision import drop

    from model import build_model

    options = training.options(args)
    train, validation = datasets.training_data(
        datasets.folders(args), args.data_dir, args.cache_dir, limit=args.limit, workers=args.workers
    )
    train, validation = training.supervised(args, train, validation, MODALITIES)
    train = drop(train, args.missing, MODALITIES, seed=args.seed) if args.missing else train
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={name: getattr(args, f"lambda_{name}") for name in MODALITIES},
        iw_samples=args.iw_samples,
        reconstruct=training.reconstruct(args),
    )
    train = stages.images_first(args, objective.model, train, validation, options, experiment="vision", labels=[])
    fit(
        objective,
        torch.optim.AdamW(objective.parameters(), args.lr, weight_decay=args.weight_decay, fused=True),
        train,
        validation,
        options,
        beta=training.beta_schedule(args),
        lr=training.lr_schedule(args),
        experiment="vision",
        settings=training.settings(args),
    )


if __name__ == "__main__":
    running.run(main)
