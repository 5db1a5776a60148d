"""Train the MVAE on CelebA faces and 18 attributes, each a modality.

It maximises the joint ELBO, the ELBO of each modality alone, and the ELBOs of --approx-m random subsets. The JPEGs are
decoded once, into --cache-dir.
"""

from dataclasses import dataclass, replace
from typing import Literal

from mvae import Data, Objective, Run, Term, cli
from mvae.data import augment, supervision
from mvae.run import checkpoint, metrics, schedules
from mvae.run.config import TwoStages

import torch  # after mvae, which sets how OpenMP's threads wait

from datasets import ATTRIBUTES, MODALITIES, NAME, Source, training_data
from model import build_model

IMAGE = ("image",)
ALSO = {"given": (), "all": MODALITIES, "image": IMAGE, "attrs": ATTRIBUTES}


@dataclass(kw_only=True)
class Config(TwoStages, Source):
    # CelebA-19
    lambda_image: float = 1  # weight of log p(image | z)
    lambda_attrs: float = 10  # weight of each log p(attribute | z)
    approx_m: int = 1  # ELBO terms of random subsets, drawn at each step
    attr_missing: float = 0  # probability that an attribute of an example is missing
    reconstruct: Literal["given", "all", "image", "attrs"] = "given"  # extra reconstruction targets of each term


PAPER = Config(n_latents=100, batch_size=100, epochs=100, annealing_epochs=20, lr=1e-4)
SHORT = replace(
    PAPER, reconstruct="attrs", beta_hold=1, lr=1e-3, lr_schedule="late", warmup_epochs=0.2, weight_decay=0.05
)
PRESETS = {
    "paper": PAPER,
    "fast": replace(SHORT, epochs=20, annealing_epochs=7),
    "weak": replace(SHORT, images_first=10, epochs=4, annealing_epochs=4),
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
                subsets = run.random_subsets(config.approx_m)
                loss, parts = run.objective(batch, run.beta, subsets, present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, measure)


def main() -> None:
    config = cli.parse(__doc__, PRESETS)
    train, validation = training_data(config, limit=config.limit)
    train, validation = supervision.share_pairs(
        train, validation, config.paired, MODALITIES, unpaired=config.unpaired, seed=config.seed
    )
    if config.attr_missing:
        train = supervision.drop(train, config.attr_missing, ATTRIBUTES, seed=config.seed)
    torch.manual_seed(config.seed)
    model = checkpoint.initialised(build_model(config.n_latents), config.init, NAME)
    λ = {"image": config.lambda_image, **dict.fromkeys(ATTRIBUTES, config.lambda_attrs)}

    if config.images_first:
        images = Objective(
            model, [Term(IMAGE, IMAGE)], weights={"image": λ["image"]}, iw_samples=config.iw_samples, iw="image"
        )
        first = replace(config.first_stage(NAME), approx_m=0)  # one modality has no subsets
        fit(first, images, train.only("image"), validation.only("image"), {})

    also = ALSO[config.reconstruct]
    singles = [Term((name,), (name, *also)) for name in MODALITIES]
    terms = [Term(MODALITIES, MODALITIES), *singles]
    objective = Objective(model, terms, weights=λ, iw_samples=config.iw_samples, iw="image", subset_also=also)
    measure = {"attribute_accuracy": metrics.attribute_accuracy(ATTRIBUTES)}
    for i, stage in enumerate(config.stages_with_labels()):
        labelled = supervision.self_labelled(
            model, train, ATTRIBUTES, share=config.self_labels, by=config.self_labels_by, again=i > 0
        )
        labelled = augment.shifted(labelled, "image", config.shift)
        fit(stage, objective, labelled, validation, measure, before=config.images_first + i * config.epochs)


if __name__ == "__main__":
    cli.run(main)
