"""Compare the speed of mnist's step and log-likelihood with those of MultiVae, a library that has an MVAE, too.

    pip install multivae
    python benchmarks/peer.py

Both run the same networks with the same weights, on one thread, in turns in one process; a ratio is that of the
processor's time in one round. MultiVae estimates log p(image, text) alone, so ours is asked for no more. Its step is
its trainer's: the loss, the gradients, Adam. Before they are timed, both losses and both estimates are compared. In
bfloat16 ours runs in it, and MultiVae in float32, as its estimator has no other. The matrix products of the decoders by
themselves stand beside: no estimate is faster than they are.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from step import processor
from torch import Tensor, nn
from torch.nn import functional as F

from mvae import MVAE, Objective, log_likelihood, train_step
from mvae.errors import UserError
from mvae.files import write_atomically
from mvae.model import Precision, running_in
from mvae.scripts import machine, running, types

from experiments import EXPERIMENTS, build_model

NAMES = ("image", "text")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
MNIST = EXPERIMENTS["mnist"]


def pair() -> tuple[MVAE, Any]:
    """Our model, and MultiVae's with copies of its networks. Its text is one-hot, encoded for each example."""
    try:
        from multivae import models
        from multivae.models import base
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install multivae") from None

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

    torch.manual_seed(0)
    ours = build_model("mnist", MNIST.n_latents)
    model = copy.deepcopy(ours)
    encoders: Any = model.encoders
    likelihoods: Any = model.decoders
    image, text = (encoders[name] for name in NAMES)
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
        decoders={name: Decoder(likelihoods[name].decoder) for name in NAMES},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=types.positive_int, default=9, help="turns of each (default: 9)")
    parser.add_argument("--examples", type=types.positive_int, default=4, help="of a log-likelihood (default: 4)")
    parser.add_argument("--steps", type=types.positive_int, default=10, help="of training, in a turn (default: 10)")
    parser.add_argument("--json", type=types.output, metavar="FILE", help="write the numbers to this file, too")
    args = parser.parse_args()
    machine.device(argparse.Namespace(threads=1, cuda=False))
    content: dict[str, Any] = {
        **running.origin(),
        "processor": processor(),
        "torch": torch.__version__,
        "ratios": {},
    }
    for precision in PRECISIONS:
        ours, theirs = estimates(args.examples, precision)
        alone = products(args.examples, precision)
        found = in_turns(1, args.rounds, ours, MultiVae=theirs, products=alone)
        content["ratios"][f"log p(image, text), {precision}"] = found
        ours, theirs = steps(precision)
        content["ratios"][f"a step, {precision}"] = in_turns(args.steps, args.rounds, ours, MultiVae=theirs)
    content["multivae"] = version("multivae")
    for name, ratios in content["ratios"].items():
        for other, (low, middle, high) in ratios.items():
            print(f"{name}: {other} / ours {middle:.2f} ({low:.2f} to {high:.2f})")
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def batch_of(n: int) -> tuple[dict[str, Tensor], Any]:
    """n examples, as ours takes them and as MultiVae does."""
    from multivae.data.datasets import MultimodalBaseDataset

    batch, _ = MNIST.data().batch(torch.arange(n))
    batch["image"] = (batch["image"] > 0.5).float()  # MultiVae's Bernoulli takes no grey
    return batch, MultimodalBaseDataset({"image": batch["image"], "text": F.one_hot(batch["text"].long(), 10).float()})


def estimates(n: int, precision: Precision) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both ways to estimate the mean of log p(image, text), with 1,000 draws."""
    (model, peer), (batch, theirs) = pair(), batch_of(n)
    model.eval()

    def ours() -> float:
        noise = torch.randn(1000, n, MNIST.n_latents)
        with running_in(precision, noise.device):
            # In chunks as `evaluate` takes them.
            found = log_likelihood(model, batch, proposal=NAMES, targets=[NAMES], noise=noise, max_rows=2**20 // 784)
        return found[NAMES].log_p.mean().item()

    return ours, lambda: -peer.compute_joint_nll(theirs, K=1000).item() / n


def steps(precision: Precision) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both steps of training, on the same hundred examples; each gives its loss."""
    (model, peer), (batch, theirs) = pair(), batch_of(MNIST.batch_size)
    model.train()
    peer.train()
    objective = Objective(model, weights=MNIST.weights)
    optimizer = torch.optim.Adam(objective.parameters(), MNIST.lr, fused=True)
    other = torch.optim.Adam(peer.parameters(), MNIST.lr)

    def ours() -> float:
        totals = train_step(objective, optimizer, batch, precision=precision)
        return (totals.loss / totals.n).item()

    def their_own() -> float:
        other.zero_grad()
        loss = peer(theirs, epoch=1).loss
        loss.backward()
        other.step()
        return loss.item()

    return ours, their_own


def products(n: int, precision: Precision) -> Callable[[], None]:
    """The matrix products of n log-likelihoods alone, which is the least that the decoders take."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    shapes = [(MNIST.n_latents, 512), (512, 512), (512, 512)]
    weights = [torch.randn(shape, dtype=dtype) for last in (784, 10) for shape in (*shapes, (512, last))]
    rows = {k: torch.randn(1000, k, dtype=dtype) for k in (MNIST.n_latents, 512)}

    def run() -> None:
        for _ in range(n):
            for weight in weights:
                torch.mm(rows[len(weight)], weight)

    return run


def in_turns(n: int, rounds: int, ours: Callable, **others: Callable) -> dict[str, list[float]]:
    """Quartiles of the time of others divided by that of ours, of n calls each.

    Raises UserError if MultiVae doesn't compute the same.
    """
    value, other = ours(), others["MultiVae"]()
    if abs(value - other) > 0.01 * abs(value):
        raise UserError(f"ours gives {value}, and MultiVae {other}: they don't compute the same")
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        took = _seconds(ours, n)
        for name, run in others.items():
            ratios[name].append(_seconds(run, n) / took)
    return {name: np.quantile(found, [0.25, 0.5, 0.75]).tolist() for name, found in ratios.items()}


def _seconds(run: Callable, n: int) -> float:
    """The processor's time of n calls."""
    started = time.process_time()
    for _ in range(n):
        run()
    return time.process_time() - started


if __name__ == "__main__":
    running.run(main)
