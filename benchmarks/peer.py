"""Compare the speed of mnist's step and log-likelihood with those of MultiVae, a library that has an MVAE, too.

    pip install multivae
    python benchmarks/peer.py

Both run the same networks with the same weights, on one thread, in turns in one process; a ratio is that of the
processor's time in one round. MultiVae estimates log p(image, text) alone, so ours is asked for no more. Its step is
its trainer's: the loss, the gradients, Adam. Before they are timed, both losses and both estimates are compared.
"""

import argparse
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
from mvae.scripts import running, types

from experiments import EXPERIMENTS, build_model

NAMES = ("image", "text")
MNIST = EXPERIMENTS["mnist"]


def peer_of(model: MVAE) -> Any:
    """MultiVae's model with the networks of ours. Its text is one-hot, which its encoder takes on each example."""
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
    return models.MVAE(
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
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model("mnist", MNIST.n_latents)
    peer = peer_of(model)
    content: dict[str, Any] = {
        **running.origin(),
        "processor": processor(),
        "torch": torch.__version__,
        "multivae": version("multivae"),
        "ratios": {
            "log p(image, text)": in_turns(*estimates(model, peer, args.examples), 1, args.rounds),
            "a step": in_turns(*steps(model, peer), args.steps, args.rounds),
        },
    }
    for name, (low, middle, high) in content["ratios"].items():
        print(f"{name}: MultiVae {content['multivae']} / ours {middle:.2f} ({low:.2f} to {high:.2f})")
    if args.json:
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def batch_of(n: int) -> tuple[dict[str, Tensor], Any]:
    """n examples, as ours takes them and as MultiVae does."""
    from multivae.data.datasets import MultimodalBaseDataset

    batch, _ = MNIST.data().batch(torch.arange(n))
    batch["image"] = (batch["image"] > 0.5).float()  # MultiVae's Bernoulli takes no grey
    return batch, MultimodalBaseDataset({"image": batch["image"], "text": F.one_hot(batch["text"].long(), 10).float()})


def estimates(model: MVAE, peer: Any, n: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both ways to estimate the mean of log p(image, text), with 1,000 draws."""
    batch, theirs = batch_of(n)

    def ours() -> float:
        model.eval()
        noise = torch.randn(1000, n, MNIST.n_latents)
        found = log_likelihood(model, batch, proposal=NAMES, targets=[NAMES], noise=noise)[NAMES]
        return found.log_p.mean().item()

    return ours, lambda: -peer.compute_joint_nll(theirs, K=1000).item() / n


def steps(model: MVAE, peer: Any) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both steps of training, on the same hundred examples; each gives its loss."""
    batch, theirs = batch_of(MNIST.batch_size)
    objective = Objective(model, weights=MNIST.weights)
    optimizer = torch.optim.Adam(objective.parameters(), MNIST.lr, fused=True)
    other = torch.optim.Adam(peer.parameters(), MNIST.lr)

    def ours() -> float:
        model.train()
        totals = train_step(objective, optimizer, batch)
        return (totals.loss / totals.n).item()

    def their_own() -> float:
        peer.train()
        other.zero_grad()
        loss = peer(theirs, epoch=1).loss
        loss.backward()
        other.step()
        return loss.item()

    return ours, their_own


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], n: int, rounds: int) -> list[float]:
    """Quartiles of the time of theirs divided by that of ours, of n calls each. Raises UserError if they differ."""
    values = ours(), theirs()
    if abs(values[0] - values[1]) > 0.01 * abs(values[0]):
        raise UserError(f"ours gives {values[0]}, and MultiVae {values[1]}: they don't compute the same")
    ratios = []
    for _ in range(rounds):
        times = []
        for run in (ours, theirs):
            started = time.process_time()
            for _ in range(n):
                run()
            times.append(time.process_time() - started)
        ratios.append(times[1] / times[0])
    return np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()


if __name__ == "__main__":
    running.run(main)
