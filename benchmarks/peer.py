"""Compare the speed of mnist's step and log-likelihood with those of MultiVae, a library that also has an MVAE.

    pip install multivae
    python benchmarks/peer.py

Both run the same networks with the same weights on one thread, in turns in one process; a ratio is that of the CPU time
in one round. MultiVae estimates only log p(image, text), so ours estimates no more. Its step is its trainer's: the
loss, the gradients, Adam. Before they are timed, both losses and both estimates are compared. MultiVae's estimator has
float32 only. The decoders' matrix products alone are timed too: no estimate is faster than they are.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvae import MVAE, cli, log_likelihood
from mvae.errors import UserError
from mvae.model import Precision, autocast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import about, in_turns, quartiles, spread, write
from experiments import MNIST, build_model

try:
    from multivae import models
    from multivae.data.datasets import MultimodalBaseDataset
    from multivae.models import base
except ImportError as error:
    raise SystemExit(f"peer.py: {error.name} is missing: pip install multivae") from None

NAMES = ("image", "text")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Config:
    rounds: int = 9  # turns of each
    examples: int = 4  # examples of a log-likelihood
    steps: int = 10  # training steps in a turn
    json: Path | None = None  # file for the numbers


class Encoder(base.BaseEncoder):
    def __init__(self, embed: nn.Module, ours: Any):
        super().__init__()
        self.embed, self.ours, self.latent_dim = embed, ours, MNIST.n_latents

    def forward(self, x: Tensor) -> Any:
        hidden = self.ours.hidden(self.embed(x))
        return base.ModelOutput(embedding=self.ours.mu(hidden), log_covariance=self.ours.logvar(hidden))


class Decoder(base.BaseDecoder):
    def __init__(self, ours: nn.Module):
        super().__init__()
        self.ours = ours

    def forward(self, z: Tensor) -> Any:
        return base.ModelOutput(reconstruction=self.ours(z))


def pair() -> tuple[MVAE, Any]:
    """Return our model, and MultiVae's with copies of its networks. Its text is one-hot, encoded for each example."""
    torch.manual_seed(0)
    ours = build_model("mnist", MNIST.n_latents)
    model: Any = copy.deepcopy(ours)
    image, text = (model.encoders[name] for name in NAMES)
    one_hot = nn.Linear(10, 512, bias=False)
    one_hot.weight = nn.Parameter(text.embedding.weight.T.clone())
    config = models.MVAEConfig(
        n_modalities=2,
        latent_dim=MNIST.n_latents,
        input_dims={"image": (1, 28, 28), "text": (10,)},
        uses_likelihood_rescaling=True,
        rescale_factors=dict(MNIST.weights),
        decoders_dist={"image": "bernoulli", "text": "categorical"},
        warmup=0,
    )
    return ours, models.MVAE(
        config,
        encoders={"image": Encoder(nn.Identity(), image), "text": Encoder(one_hot, text)},
        decoders={name: Decoder(model.decoders[name].decoder) for name in NAMES},
    )


def batch_of(n: int) -> tuple[dict[str, Tensor], Any]:
    """Return n examples, as ours takes them and as MultiVae does."""
    batch, _ = MNIST.data().batch(torch.arange(n))
    batch["image"] = (batch["image"] > 0.5).float()  # MultiVae's Bernoulli takes binary pixels only
    return batch, MultimodalBaseDataset({"image": batch["image"], "text": F.one_hot(batch["text"].long(), 10).float()})


def estimates(n: int, precision: Precision) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return both estimators of the mean of log p(image, text) with 1,000 draws."""
    (model, peer), (batch, theirs) = pair(), batch_of(n)
    model.eval()

    def ours() -> float:
        noise = torch.randn(1000, n, MNIST.n_latents)
        with autocast(precision, CPU):
            # In chunks as `evaluate` takes them.
            found = log_likelihood(model, batch, proposal=NAMES, targets=[NAMES], noise=noise, max_rows=2**20 // 784)
        return found[NAMES].log_p.mean().item()

    return ours, lambda: -peer.compute_joint_nll(theirs, K=1000).item() / n


def steps(precision: Precision) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return both training steps, on the same hundred examples; each returns its loss."""
    (model, peer), (batch, theirs) = pair(), batch_of(MNIST.batch_size)
    objective = MNIST.objective(model).train()
    peer.train()
    optimizer = torch.optim.Adam(objective.parameters(), MNIST.lr, fused=True)
    other = torch.optim.Adam(peer.parameters(), MNIST.lr)

    def ours() -> float:
        with autocast(precision, CPU):
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def their_own() -> float:
        other.zero_grad()
        loss = peer(theirs, epoch=1).loss
        loss.backward()
        other.step()
        return loss.item()

    return ours, their_own


def products(n: int, precision: Precision) -> Callable[[], None]:
    """Return the decoders' matrix products of n log-likelihoods, a lower limit of their time."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    shapes = [(MNIST.n_latents, 512), (512, 512), (512, 512)]
    weights = [torch.randn(shape, dtype=dtype) for last in (784, 10) for shape in (*shapes, (512, last))]
    rows = {k: torch.randn(1000, k, dtype=dtype) for k in (MNIST.n_latents, 512)}

    def run() -> None:
        for _ in range(n):
            for weight in weights:
                torch.mm(rows[len(weight)], weight)

    return run


def ratios(rounds: int, n: int, actions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return the quartiles of the others' time divided by ours, of n calls each.

    Raises UserError if MultiVae doesn't compute the same.
    """
    value, other = actions["ours"](), actions["MultiVae"]()
    if abs(value - other) > 0.01 * abs(value):
        raise UserError(f"ours returns {value}, and MultiVae {other}: they don't compute the same")
    repeated = {name: (lambda run=run: [run() for _ in range(n)]) for name, run in actions.items()}
    seconds = in_turns(repeated, rounds)
    return {name: quartiles(np.divide(seconds[name], seconds["ours"])) for name in actions if name != "ours"}


def main() -> None:
    config = cli.parse(__doc__, Config)
    torch.set_num_threads(1)
    content: dict[str, Any] = {**about(), "multivae": version("multivae"), "ratios": {}}
    for precision in PRECISIONS:
        ours, theirs = estimates(config.examples, precision)
        alone = products(config.examples, precision)
        actions = {"ours": ours, "MultiVae": theirs, "products": alone}
        content["ratios"][f"log p(image, text), {precision}"] = ratios(config.rounds, 1, actions)
        ours, theirs = steps(precision)
        actions = {"ours": ours, "MultiVae": theirs}
        content["ratios"][f"a step, {precision}"] = ratios(config.rounds, config.steps, actions)
    for name, found in content["ratios"].items():
        print(f"{name}:", *(f"{other} / ours {spread(values)}" for other, values in found.items()))
    write(config.json, content)


if __name__ == "__main__":
    cli.run(main)
