"""Train the MVAE on MultiMNIST canvases and their texts; the canvases are made from MNIST if there are none.

The loss is the negative sum of ELBO(image, text), ELBO(image) and ELBO(text), in nats per example.
"""

from mvae.scripts import running, stages, training

import datasets

PRESETS = {
    "fast": {
        "reconstruct": ["text"],
        "epochs": 30,
        "beta_hold": 1.0,
        "annealing_epochs": 11,
        "lr": 2e-3,
        "lr_schedule": "late",
        "warmup_epochs": 0.2,
        "weight_decay": 0.05,
    },
    "weak": {
        "lambda_text": 50.0,
        "reconstruct": ["text"],
        "images_first": 10,
        "beta_hold": 1.0,
        "annealing_epochs": 4,
        "self_labels": 0.95,
        "self_labels_by": "regression",
        "pairs_per_batch": 67,
        "epochs": 4,
        "lr": 2e-3,
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
        lambdas={"image": 1.0, "text": 10.0},
        n_latents=100,
        batch_size=100,
        epochs=500,
        annealing_epochs=200,
        lr=1e-3,
        n_val=5000,
        presets=PRESETS,
    )
    datasets.add_canvas_dir(parser)
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import Objective, fit, metrics

    from model import build_model

    options = training.options(args)
    recipe = datasets.prepare(args.data_dir, args.canvas_dir)
    train, validation = datasets.training_data(args.canvas_dir, n_val=args.n_val, limit=args.limit)
    train, validation = training.supervised(args, train, validation, datasets.MODALITIES)
    torch.manual_seed(args.seed)
    objective = Objective(
        build_model(args.n_latents),
        weights={"image": args.lambda_image, "text": args.lambda_text},
        iw_samples=args.iw_samples,
        reconstruct=training.reconstruct(args),
    )
    train = stages.images_first(
        args, objective.model, train, validation, options, experiment="multimnist", labels=["text"]
    )
    fit(
        objective,
        torch.optim.AdamW(objective.parameters(), args.lr, weight_decay=args.weight_decay, fused=True),
        train,
        validation,
        options,
        beta=training.beta_schedule(args),
        lr=training.lr_schedule(args),
        metrics={"text_accuracy": metrics.label_accuracy("text")},
        experiment="multimnist",
        settings={**training.settings(args), "canvases": recipe},
    )


if __name__ == "__main__":
    running.run(main)
