"""Train the MVAE on MultiMNIST canvases and their texts: maximise ELBO(image, text) + ELBO(image) + ELBO(text)."""

from dataclasses import dataclass, replace
from typing import Literal

from mvae import Data, Objective, Run, Term, cli
from mvae.data import augment, supervision
from mvae.run import checkpoint, metrics, schedules
from mvae.run.config import TwoStages

import torch  # after mvae, which sets how OpenMP's threads wait

from datasets import NAME, Source, prepare, training_data
from model import build_model

IMAGE, TEXT, BOTH = ("image",), ("text",), ("image", "text")
ALSO = {"given": (), "all": BOTH, "image": IMAGE, "text": TEXT}


@dataclass(kw_only=True)
class Config(TwoStages, Source):
    # MultiMNIST
    lambda_image: float = 1  # weight of log p(image | z)
    lambda_text: float = 10  # weight of log p(text | z)
    reconstruct: Literal["given", "all", "image", "text"] = "given"  # extra reconstruction targets of each term
    n_val: int = 5000  # training canvases held out for validation


PAPER = Config(n_latents=100, batch_size=100, epochs=500, annealing_epochs=200, lr=1e-3)
SHORT = replace(
    PAPER, reconstruct="text", beta_hold=1, lr=2e-3, lr_schedule="late", warmup_epochs=0.2, weight_decay=0.05
)
PRESETS = {
    "paper": PAPER,
    "fast": replace(SHORT, epochs=30, annealing_epochs=11),
    "weak": replace(
        SHORT,
        lambda_text=50,
        images_first=10,
        annealing_epochs=4,
        self_labels=0.95,
        self_labels_by="regression",
        pairs_per_batch=67,
        epochs=4,
        rounds=3,
        shift=2,
    ),
}


def fit(
    config: Config, objective: Objective, train: Data, validation: Data, measure: dict, recipe: dict, before: int = 0
) -> None:
    """Train for `config.epochs`. recipe: of the canvases. before: epochs of an earlier stage, which β counts."""
    optimizer = torch.optim.AdamW(objective.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    beta = schedules.held(config.beta_hold, schedules.linear(config.annealing_epochs))
    rate = schedules.warmed_up(config.warmup_epochs, schedules.named(config.lr_schedule, config.epochs))
    with Run(NAME, objective, optimizer, config, facts={"canvases": recipe}) as run:
        for _ in run.epochs(config.epochs):
            for batch, present in run.batches(train, config.batch_size, config.pairs):
                run.set(lr=config.lr * rate(run.t), beta=beta(run.t + before))
                loss, parts = run.objective(batch, run.beta, present=present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, measure)


def main() -> None:
    config = cli.parse(__doc__, PRESETS)
    recipe = prepare(config.data_dir, config.canvas_dir)
    train, validation = training_data(config.canvas_dir, n_val=config.n_val, limit=config.limit)
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
        fit(first, images, train.only("image"), validation.only("image"), {}, recipe)

    also = ALSO[config.reconstruct]
    terms = [Term(BOTH, BOTH + also), Term(IMAGE, IMAGE + also), Term(TEXT, TEXT + also)]
    objective = Objective(model, terms, weights=λ, iw_samples=config.iw_samples, iw="image")
    measure = {"text_accuracy": metrics.label_accuracy("text")}
    for i, stage in enumerate(config.stages_with_labels()):
        labelled = supervision.self_labelled(
            model, train, TEXT, share=config.self_labels, by=config.self_labels_by, again=i > 0
        )
        labelled = augment.shifted(labelled, "image", config.shift)
        fit(stage, objective, labelled, validation, measure, recipe, before=config.images_first + i * config.epochs)


if __name__ == "__main__":
    cli.run(main)
