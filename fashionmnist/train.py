"""Train the MVAE on FashionMNIST images and their classes: maximise ELBO(image, text) + ELBO(image) + ELBO(text)."""

from dataclasses import dataclass, replace
from typing import Literal

from mvae import Data, Objective, Run, Term, cli
from mvae.data import augment, supervision
from mvae.run import checkpoint, metrics, schedules
from mvae.run.config import TwoStages

import torch  # after mvae, which sets how OpenMP's threads wait

from datasets import NAME, Source, training_data
from model import build_model

IMAGE, TEXT, BOTH = ("image",), ("text",), ("image", "text")
ALSO = {"given": (), "all": BOTH, "image": IMAGE, "text": TEXT}


@dataclass(kw_only=True)
class Config(TwoStages, Source):
    # FashionMNIST
    lambda_image: float = 1  # weight of log p(image | z)
    lambda_text: float = 10  # weight of log p(text | z)
    reconstruct: Literal["given", "all", "image", "text"] = "given"  # extra reconstruction targets of each term
    binarize: bool = False  # draw each pixel from Bernoulli(grey value)
    n_val: int = 5000  # training examples held out for validation


PAPER = Config(n_latents=64, batch_size=100, epochs=500, annealing_epochs=200, lr=1e-3)
SHORT = replace(
    PAPER, reconstruct="text", beta_hold=1, lr=2e-3, lr_schedule="late", warmup_epochs=0.2, weight_decay=0.05
)
PRESETS = {
    "paper": PAPER,
    # The joint ELBO, which has no λ, chooses the best model: labels are memorised before the images are learnt.
    "fast": replace(SHORT, lambda_text=25, iw_samples=2, select="joint", epochs=40, annealing_epochs=14),
    "weak": replace(
        SHORT, lambda_text=50, images_first=10, annealing_epochs=4, self_labels=0.95, pairs_per_batch=0, epochs=3,
        rounds=3, shift=2,
    ),
}  # fmt: skip


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
    train, validation = training_data(config.data_dir, n_val=config.n_val, limit=config.limit, binarize=config.binarize)
    train, validation = supervision.share_pairs(
        train, validation, config.paired, BOTH, unpaired=config.unpaired, seed=config.seed
    )
    torch.manual_seed(config.seed)
    model = checkpoint.initialised(build_model(config.n_latents), config.init, NAME)
    λ = {"image": config.lambda_image, "text": config.lambda_text}

    if config.images_first:
        images = Objective(
            model, [Term(IMAGE, IMAGE)], weights={"image": λ["image"]}, iw_samples=config.iw_samples, iw="image"
        )
        first = config.first_stage(NAME)
        fit(first, images, train.only("image"), validation.only("image"), {})

    also = ALSO[config.reconstruct]
    terms = [Term(BOTH, BOTH + also), Term(IMAGE, IMAGE + also), Term(TEXT, TEXT + also)]
    objective = Objective(model, terms, weights=λ, iw_samples=config.iw_samples, iw="image")
    measure = {"label_accuracy": metrics.label_accuracy("text")}
    for i, stage in enumerate(config.stages_with_labels()):
        labelled = supervision.self_labelled(
            model, train, TEXT, share=config.self_labels, by=config.self_labels_by, again=i > 0
        )
        labelled = augment.shifted(labelled, "image", config.shift)
        fit(stage, objective, labelled, validation, measure, before=config.images_first + i * config.epochs)


if __name__ == "__main__":
    cli.run(main)
