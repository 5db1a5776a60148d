"""Compare priors on MNIST: N(0, I), a mixture fitted to the trained model, and a VampPrior that is trained with it.

The VampPrior (Tomczak & Welling 2018) is the mean of q(z | image) over images that are learnt, here 200. All models
have the recipe `fast` with one draw of z and fewer epochs; a step with a VampPrior takes 1.3 times as long, so it gets 3/4
of the epochs. Estimates of log p(image) over validation images.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist import datasets
from mnist.model import build_model
from mvae import MVAE, Data, Objective, Term, cli, evaluate, experts
from mvae.data.dataset import permuted_rows, seed_of
from mvae.run import schedules
from mvae.run.evaluate import Quantity, mean_and_error
from mvae.tools import prior

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from common import about, as_json, write

IMAGE, TEXT, BOTH = ("image",), ("text",), ("image", "text")
TERMS = [Term(BOTH, BOTH), Term(IMAGE, BOTH), Term(TEXT, TEXT)]


@dataclass(kw_only=True)
class Config(datasets.Source):
    seeds: tuple[int, ...] = (0, 1, 2)  # random seeds
    epochs: int = 8  # epochs of a run with N(0, I); β rises over a third of a run's
    n_images: int = 200  # components of the VampPrior
    limit: int = 1000  # validation images to estimate log p of
    n_samples: int = 200  # importance samples
    json: Path = Path("results/learnt_prior.json")  # file to write


def main() -> None:
    config = cli.parse(__doc__, Config)
    train = datasets.examples("train", config, {"n_val": 5000, "binarize": False})
    validation = datasets.examples("validation", config, {"n_val": 5000, "binarize": False})
    rows = []
    for seed in config.seeds:
        for learnt in (False, True):
            torch.manual_seed(seed)
            started = time.perf_counter()
            epochs = config.epochs * 3 // 4 if learnt else config.epochs
            model, vamp = trained(epochs, config.n_images, train, seed, learnt)
            seconds = time.perf_counter() - started
            before = vamp.distribution(model) if vamp else None
            for name in ("learnt",) if learnt else ("N(0, I)", "fitted"):
                model.prior = before
                if name == "fitted":
                    mixture = prior.fitted(model, train, validation, datasets.CONTROLS, seed=seed)
                    model.prior = prior.distribution(mixture, torch.device("cpu"))
                quantity = Quantity(IMAGE)
                found = evaluate(
                    model, validation[: config.limit], quantities={quantity: [IMAGE]}, n_samples=config.n_samples
                )
                log_p = found.estimates[quantity, IMAGE].log_p
                rows.append({"prior": name, "seed": seed, "seconds": seconds, **as_json(mean_and_error(log_p))})
                print(rows[-1], flush=True)
            write(config.json, {**about(), "rows": rows})


def trained(
    epochs: int, n_images: int, train: Data, seed: int, learnt: bool
) -> tuple[MVAE, "VampPrior | None"]:
    model = build_model(64)
    vamp = VampPrior(train.batch(torch.arange(n_images))[0]["image"]) if learnt else None
    objective = Objective(model, TERMS, weights={"image": 1, "text": 50})
    weights = [*objective.parameters(), *(vamp.parameters() if vamp else ())]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0, fused=True)
    beta = schedules.linear(epochs / 3)
    rate = schedules.warmed_up(0.2, schedules.named("late", epochs))
    for epoch in range(epochs):
        steps = permuted_rows(train, 100, seed_of(seed, epoch))
        for i, rows in enumerate(steps):
            t = epoch + (i + 1) / len(steps)
            optimizer.param_groups[0]["lr"] = 2e-3 * rate(t)
            with under(model, vamp):
                loss, _ = objective(train.batch(rows)[0], beta(t))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), vamp


class VampPrior(nn.Module):
    """The prior of images that are learnt, (n, 1, 28, 28)."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.logits = nn.Parameter(images.clamp(0.01, 0.99).logit())

    def log_prob(self, model: MVAE, z: Tensor) -> Tensor:
        """As that of the distribution, in matrix products: a broadcast difference would double a step's time."""
        mu, logvar = model.fused({"image": self.logits.sigmoid()})
        precision = (-logvar).exp()
        squares = z.square() @ precision.T - 2 * z @ (mu * precision).T + (mu.square() * precision + logvar).sum(dim=-1)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi) + math.log(len(mu))
        return (-0.5 * squares).logsumexp(dim=-1) - constant

    def distribution(self, model: MVAE) -> MixtureSameFamily:
        mu, logvar = model.fused({"image": self.logits.sigmoid()})
        gaussians = Independent(Normal(mu, (0.5 * logvar).exp(), validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(Categorical(torch.ones(len(mu))), gaussians, validate_args=False)


@contextmanager
def under(model: MVAE, vamp: VampPrior | None) -> Iterator[None]:
    """Replace KL(q || N(0, I)) by log q(z) - log p(z) of the draw itself."""
    if vamp is None:
        yield
        return
    original: tuple[Callable[..., Tensor], Callable[..., Tensor]] = experts.draw, experts.kl_to_prior
    last: dict[str, Any] = {}

    def draw(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        last["z"], last["noise"] = original[0](mu, logvar, noise), noise
        return last["z"]

    def kl(mu: Tensor, logvar: Tensor) -> Tensor:
        log_q = experts.log_standard_normal(last["noise"]) - 0.5 * logvar.sum(dim=-1)
        return log_q - vamp.log_prob(model, last["z"])

    experts.draw, experts.kl_to_prior = draw, kl  # type: ignore[assignment]
    try:
        yield
    finally:
        experts.draw, experts.kl_to_prior = original


if __name__ == "__main__":
    cli.run(main)
