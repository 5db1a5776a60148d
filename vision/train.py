"""Train the MVAE on faces and five images derived from each; they are decoded once, into --cache-dir.

It maximises the ELBO of all six, the ELBO of each one alone, and the ELBOs of --approx-m random subsets. By default
each term reconstructs all six, so that each image learns to generate the others; the paper's terms reconstruct their
inputs (--reconstruct given).
"""

from dataclasses import dataclass, replace
from typing import Literal

from mvae import Data, Objective, Run, Term, cli
from mvae.data import supervision
from mvae.run import checkpoint, schedules
from mvae.run.config import Training

import torch  # after mvae, which sets how OpenMP's threads wait

from datasets import MODALITIES, NAME, Source, training_data
from model import build_model

Target = Literal["given", "all", "image", "gray", "edge", "mask", "obscured", "watermark"]


@dataclass(kw_only=True)
class Config(Training, Source):
    # Vision
    lambda_image: float = 1  # weight of log p(image | z)
    lambda_gray: float = 1  # weight of log p(gray | z)
    lambda_edge: float = 1  # weight of log p(edge | z)
    lambda_mask: float = 1  # weight of log p(mask | z)
    lambda_obscured: float = 1  # weight of log p(obscured | z)
    lambda_watermark: float = 1  # weight of log p(watermark | z)
    approx_m: int = 0  # ELBO terms of random subsets, drawn at each step
    missing: float = 0  # probability that an image of an example is missing
    reconstruct: tuple[Target, ...] = ("all",)  # extra reconstruction targets of each term


LONG = Config(n_latents=250, batch_size=50, epochs=100, annealing_epochs=20, lr=1e-4)
PRESETS = {
    "paper": replace(  # the public code's: it divides all six log p(x | z) by their number, and not the KL divergence
        LONG, lambda_image=1 / 6, lambda_gray=1 / 6, lambda_edge=1 / 6, lambda_mask=1 / 6, lambda_obscured=1 / 6,
        lambda_watermark=1 / 6,
    ),
    "fast": replace(
        LONG, reconstruct=("image", "edge", "mask"), epochs=8, beta_hold=0.5, annealing_epochs=3, lr=1e-3,
        lr_schedule="late", warmup_epochs=0.2,
    ),
}  # fmt: skip


def fit(config: Config, objective: Objective, train: Data, validation: Data) -> None:
    optimizer = torch.optim.AdamW(objective.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    beta = schedules.held(config.beta_hold, schedules.linear(config.annealing_epochs))
    rate = schedules.warmed_up(config.warmup_epochs, schedules.named(config.lr_schedule, config.epochs))
    with Run(NAME, objective, optimizer, config) as run:
        for _ in run.epochs(config.epochs):
            for batch, present in run.batches(train, config.batch_size, config.pairs):
                run.set(lr=config.lr * rate(run.t), beta=beta(run.t))
                subsets = run.random_subsets(config.approx_m)
                loss, parts = run.objective(batch, run.beta, subsets, present)
                run.backward(loss, parts)
                run.step()
            run.validate(validation)


def main() -> None:
    config = cli.parse(__doc__, PRESETS)
    train, validation = training_data(config, limit=config.limit)
    train, validation = supervision.share_pairs(
        train, validation, config.paired, MODALITIES, unpaired=config.unpaired, seed=config.seed
    )
    if config.missing:
        train = supervision.drop(train, config.missing, MODALITIES, seed=config.seed)
    torch.manual_seed(config.seed)
    model = checkpoint.initialised(build_model(config.n_latents), config.init, NAME)

    also = MODALITIES if "all" in config.reconstruct else tuple(set(config.reconstruct) - {"given"})
    singles = [Term((name,), (name, *also)) for name in MODALITIES]
    terms = [Term(MODALITIES, MODALITIES), *singles]
    objective = Objective(
        model,
        terms,
        weights={name: getattr(config, f"lambda_{name}") for name in MODALITIES},
        iw_samples=config.iw_samples,
        iw="image",
        subset_also=also,
    )
    fit(config, objective, train, validation)


if __name__ == "__main__":
    cli.run(main)
