"""Train the MVAE on CelebA faces, decoded once into --cache-dir, and a vector of 18 attributes.

It maximises ELBO(image, attrs) + ELBO(image) + ELBO(attrs).
"""

from dataclasses import dataclass, replace
from typing import Literal

from mvae import Data, Objective, Run, Term, cli
from mvae.data import augment, supervision
from mvae.run import checkpoint, metrics, schedules
from mvae.run.config import TwoStages

import torch  # after mvae, which sets how OpenMP's threads wait

from datasets import NAME, Source, training_data
from model import build_model

IMAGE, ATTRS, BOTH = ("image",), ("attrs",), ("image", "attrs")
ALSO = {"given": (), "all": BOTH, "image": IMAGE, "attrs": ATTRS}


@dataclass(kw_only=True)
class Config(TwoStages, Source):
    # CelebA
    lambda_image: float = 1  # weight of log p(image | z)
    lambda_attrs: float = 10  # weight of log p(attrs | z)
    reconstruct: Literal["given", "all", "image", "attrs"] = "given"  # extra reconstruction targets of each term


PAPER = Config(n_latents=100, batch_size=100, epochs=100, annealing_epochs=20, lr=1e-4)
SHORT = replace(PAPER, beta_hold=1, lr=1e-3, lr_schedule="late", warmup_epochs=0.2, weight_decay=0.05)
PRESETS = {
    "paper": PAPER,
    "fast": replace(SHORT, reconstruct="all", epochs=20, annealing_epochs=7),
    "weak": replace(SHORT, reconstruct="attrs", images_first=10, epochs=4, annealing_epochs=4),
}


def fit(config: Config, objective: Objective, train: Data, validation: Data, measure: dict, before: int = 0) -> None:
    """Train for `config.epochs`. before: epochs of an earlier stage; the schedule of β continues after them."""
    optimizer = torch.optim.AdamW(objective.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    beta = schedules.held(config.beta_hold, schedules.linear(config.annealing_epochs))
    rate = schedules.warmed_up(config.warmup_epochs, schedules.named(config.lr_schedule, config.epochs))
    with Run(NAME, objective, optimizer, config) as run:
        for _ in run.epochs(config.epochs):
            for batch, present in run.batches(train, config.batch_size, config.pairs):
                run.set(lr=config.lr * rate(run.t), beta=beta(run.t + before))
                loss, parts = run.objective(batch, run.beta, present=present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, measure)


def main() -> None:
    config = cli.parse(__doc__, PRESETS)
    train, validation = training_data(config, limit=config.limit)
    train, validation = supervision.share_pairs(
        train, validation, config.paired, BOTH, unpaired=config.unpaired, seed=config.seed
    )
    torch.manual_seed(config.seed)
    model = checkpoint.initialised(build_model(config.n_latents), config.init, NAME)
    λ = {"image": config.lambda_image, "attrs": config.lambda_attrs}

    if config.images_first:
        images = Objective(
            model, [Term(IMAGE, IMAGE)], weights={"image": λ["image"]}, iw_samples=config.iw_samples, iw="image"
        )
        first = config.first_stage(NAME)
        fit(first, images, train.only("image"), validation.only("image"), {})

    also = ALSO[config.reconstruct]
    terms = [Term(BOTH, BOTH + also), Term(IMAGE, IMAGE + also), Term(ATTRS, ATTRS + also)]
    objective = Objective(model, terms, weights=λ, iw_samples=config.iw_samples, iw="image")
    measure = {"attribute_accuracy": metrics.attribute_accuracy(ATTRS)}
    for i, stage in enumerate(config.stages_with_labels()):
        labelled = supervision.self_labelled(
            model, train, ATTRS, share=config.self_labels, by=config.self_labels_by, again=i > 0
        )
        labelled = augment.shifted(labelled, "image", config.shift)
        fit(stage, objective, labelled, validation, measure, before=config.images_first + i * config.epochs)


if __name__ == "__main__":
    cli.run(main)
