"""Learning from few pairs: how well labels are read off test images, against the number of labelled examples.

    python benchmarks/weak_supervision.py mnist --n 20 100 500 2000 10000 60000

N of the examples keep their label, evenly over the classes where there are any, and the others keep their image alone;
a share of the N validates. All methods have the same N, and choose by the validating ones alone:

    weak        train.py --preset weak: the images first, labels spread over their neighbours, then the MVAE's terms
    paper       train.py: the paper's terms from the start, over as many epochs in all
    supervised  the image encoder's network with an output for each class, stopped at the best validation loss
    dropout     the same with dropout of a half after each activation
    favoured    the same, trained on all N and stopped by the labels of all validation examples, which no other sees
    logistic    logistic regression on the pixels
    m1          logistic regression on the means of q(z | image) of weak's first stage (M1 of Kingma et al. 2014)
    spread      weak's labels alone: spread to the test images, which this method sees without their labels

and what `weak` is without a part of it:

    no_hold     β rises from the start
    half        labels for the surest half of the examples alone
    no_labels   no labels but the pairs', a third of each batch

Each run leaves results/weak/EXPERIMENT-METHOD-N-SEED.json, and isn't run again. The test split is read once a run.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from coherence import EXPERIMENTS, Experiment
from recipes import call
from torch import Tensor, nn
from torch.nn import functional as F

from celeba import datasets as faces
from fashionmnist import datasets as garments
from mnist import datasets as digits
from multimnist import datasets as canvases
from mvae import MVAE, Data, load_model, metrics
from mvae.checkpoint import BEST, LATEST
from mvae.data import consecutive_rows
from mvae.datasets.celeba import ATTRIBUTES
from mvae.estimators import mean_and_error
from mvae.files import write_atomically
from mvae.scripts import faces as face_flags
from mvae.scripts import flags, machine, running, training, types
from mvae.supervision import neighbour_graph, regressed, spread

from experiments import EXPERIMENTS as SETTINGS

TEST: dict[str, Callable[[argparse.Namespace], Data]] = {
    "mnist": lambda args: digits.test_data(args.data_dir),
    "fashionmnist": lambda args: garments.test_data(args.data_dir),
    "multimnist": lambda args: canvases.test_data(args.canvas_dir),
    "celeba": lambda args: faces.test_data(
        args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers
    ),
}
"""The test examples by experiment; `coherence.EXPERIMENTS` has the others."""

WORDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "multimnist": lambda args: ["--canvas-dir", str(args.canvas_dir)],
    "celeba": lambda args: ["--cache-dir", str(args.cache_dir), *["--allow-missing"] * args.allow_missing],
}
"""Flags of a train.py for where its data are, beside --data-dir."""

PAPER = ["--epochs", "12", "--annealing-epochs", "5", "--pairs-per-batch", "0"]


class Task(NamedTuple):
    """One number of pairs, drawn by one seed.

    args: where files are. train, validation: with the pairs' labels alone; test: with all of them.
    """

    experiment: str
    n: int
    seed: int
    args: argparse.Namespace
    train: Data
    validation: Data
    test: Data

    @property
    def kind(self) -> Experiment:
        return EXPERIMENTS[self.experiment]

    def pairs(self, data: Data) -> tuple[Tensor, Tensor]:
        """Images and labels of the examples that have a label."""
        labelled = (data.present or {}).get(self.kind.label, torch.ones(len(data), dtype=torch.bool))
        batch, _ = data.batch(labelled.nonzero().flatten())
        return batch["image"], batch[self.kind.label]

    @property
    def images_dir(self) -> Path:
        """The folder of the first stage, which is the same for all numbers of pairs."""
        return self.args.runs_dir / f"{self.experiment}-images-{self.seed}"

    def first_stage(self) -> MVAE:
        """The model of the images alone. Trains it if `weak` didn't yet."""
        if not (self.images_dir / BEST).exists():
            weak(self)
        return load_model(self.images_dir / LATEST, self.experiment, self.kind.build_model, torch.device("cpu"))[0]


def batches(data: Data) -> Iterator[dict[str, Tensor]]:
    return (data.batch(rows)[0] for rows in consecutive_rows(data, 1000))


@torch.no_grad()
def read_by(model: MVAE, task: Task) -> Tensor:
    """The labels of the test images as an MVAE has them at the mean of q(z | image)."""
    name, found = task.kind.label, []
    for batch in batches(task.test):
        mu, _ = model.posterior({"image": batch["image"]})
        mean = model.mean(mu, [name])[name]
        found.append(mean if task.kind.binary else mean.argmax(dim=-1))
    return torch.cat(found)


def trained(task: Task, method: str, *words: str) -> Tensor:
    """The test labels by train.py."""
    out_dir = task.args.runs_dir / f"{task.experiment}-{method}-{task.n}-{task.seed}"
    common = ["--n-paired", str(task.n), "--seed", str(task.seed), "--out-dir", str(out_dir), "--resume"]
    where = ["--data-dir", str(task.args.data_dir), *WORDS.get(task.experiment, lambda args: [])(task.args)]
    where += ["--limit", str(task.args.limit)] if task.args.limit else []
    call(f"{task.experiment}/train.py", *words, *common, *where, "--log-interval", "1000")
    return read_by(load_model(out_dir / BEST, task.experiment, task.kind.build_model, torch.device("cpu"))[0], task)


def weak(task: Task, method: str = "weak", *words: str) -> Tensor:
    return trained(task, method, "--preset", "weak", "--images-dir", str(task.images_dir), *words)


def no_hold(task: Task) -> Tensor:
    return weak(task, "no_hold", "--beta-hold", "0", "--images-dir", f"{task.images_dir}-no-hold")


def paper(task: Task) -> Tensor:
    return trained(task, "paper", *PAPER)


def loss_of(logits: Tensor, labels: Tensor, kind: Experiment) -> Tensor:
    """The mean cross-entropy of a label's places."""
    if kind.binary:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits.flatten(0, -2), labels.long().flatten())


def guess(logits: Tensor, kind: Experiment) -> Tensor:
    return logits.sigmoid() if kind.binary else logits.argmax(dim=-1)


def wrong(logits: Tensor, labels: Tensor, kind: Experiment) -> int:
    """How many of the labels' places are not the most probable ones."""
    found = guess(logits, kind)
    return int(((found > 0.5 if kind.binary else found) != labels).sum())


def supervised(task: Task, dropout: float = 0.0, *, favoured: bool = False) -> Tensor:
    """The image encoder's network with one more layer, by Adam at 1e-3, with the fewest validation errors.

    Of weights that make as many, those with the lower loss are kept.
    """
    torch.manual_seed(task.seed)
    encoder: Any = task.kind.build_model(SETTINGS[task.experiment].n_latents).encoders["image"]
    shape = task.kind.shape
    layers = [[layer, *[nn.Dropout(dropout)] * isinstance(layer, nn.SiLU)] for layer in encoder.hidden]
    network = nn.Sequential(
        *(part for parts in layers for part in parts),
        nn.Linear(encoder.mu.in_features, torch.Size(shape).numel()),
        nn.Unflatten(1, shape),
    )
    held_out = dataclasses.replace(task.validation, present=None) if favoured else task.validation
    (x, y), (held_x, held_y) = task.pairs(task.train), task.pairs(held_out)
    if favoured:
        also_x, also_y = task.pairs(task.validation)
        x, y = torch.cat([x, also_x]), torch.cat([y, also_y])
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    steps, size = max(1000, 10 * len(x) // 100), min(100, len(x))
    best, kept = (math.inf, math.inf), {}
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (size,))
        loss_of(network(x[rows]), y[rows], task.kind).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(20, steps // 50) == 0:
            network.eval()
            with torch.no_grad():
                parts = zip(held_x.split(1000), held_y.split(1000), strict=True)
                errors, loss = 0, 0.0
                for some_x, some_y in parts:
                    logits = network(some_x)
                    errors += wrong(logits, some_y, task.kind)
                    loss += loss_of(logits, some_y, task.kind).item() * len(some_x)
            network.train()
            if (errors, loss) < best:
                best, kept = (errors, loss), {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    network.eval()
    with torch.no_grad():
        return torch.cat([guess(network(batch["image"]), task.kind) for batch in batches(task.test)])


def logistic(task: Task) -> Tensor:
    (x, y), there = task.pairs(task.train), torch.cat([batch["image"] for batch in batches(task.test)])
    return by_regression(torch.cat([x, there]), y, task.kind)


@torch.no_grad()
def m1(task: Task) -> Tensor:
    model = task.first_stage()
    x, y = task.pairs(task.train)
    parts = [*x.split(1000), *(batch["image"] for batch in batches(task.test))]
    return by_regression(torch.cat([model.posterior({"image": part})[0] for part in parts]), y, task.kind)


def by_regression(points: Tensor, labels: Tensor, kind: Experiment) -> Tensor:
    """The labels of the points after the first ones, whose labels are given."""
    known = torch.arange(len(points)) < len(labels)
    unknown = labels.new_zeros(len(points) - len(labels), *labels.shape[1:])
    found = regressed(points, torch.cat([labels, unknown]), known)[len(labels) :]
    return found[..., 1] if kind.binary else found.argmax(dim=-1)


@torch.no_grad()
def spread_to_test(task: Task) -> Tensor:
    model, name = task.first_stage(), task.kind.label
    key = (task.experiment, task.seed)
    if key not in GRAPHS:
        GRAPHS.clear()
        parts = [batch for data in (task.train, task.test) for batch in batches(data)]
        GRAPHS[key] = neighbour_graph(torch.cat([model.posterior({"image": batch["image"]})[0] for batch in parts]))
    assert task.train.present is not None
    labels = torch.cat([task.train.tensors[name], task.test.tensors[name]])
    known = torch.cat([task.train.present[name], torch.zeros(len(task.test), dtype=torch.bool)])
    found = spread(GRAPHS[key], labels, known)[len(task.train) :]
    return found[..., 1] if task.kind.binary else found.argmax(dim=-1)


GRAPHS: dict[tuple[str, int], Tensor] = {}
"""The latest graph of `spread_to_test`: a seed's serves all numbers of pairs."""

Method = Callable[[Task], Tensor]
"""What a method reads off the test images: labels (n, *label), or of attributes the probabilities (n, attributes)."""

METHODS: dict[str, Method] = {
    "weak": weak,
    "spread": spread_to_test,
    "m1": m1,
    "supervised": supervised,
    "dropout": lambda task: supervised(task, 0.5),
    "favoured": lambda task: supervised(task, 0.5, favoured=True),
    "logistic": logistic,
    "paper": paper,
    "no_hold": no_hold,
    "half": lambda task: weak(task, "half", "--self-labels", "0.5"),
    "no_labels": lambda task: weak(task, "no_labels", "--self-labels", "0", "--pairs-per-batch", "33"),
}


def measured(found: Tensor, task: Task) -> dict[str, tuple[float, float]]:
    """How many labels are right, with the standard error over the test examples.

    An attribute is taken to be there if its probability exceeds a half. Few have one that does where the attribute is
    rare, and balanced accuracy is then near a half for all methods; so it's also taken where the probability exceeds
    the attribute's share of the pairs.
    """
    truth = torch.cat([batch[task.kind.label] for batch in batches(task.test)])
    if task.kind.binary:
        _, known = task.pairs(task.train)
        names = ("accuracy of an attribute predicted from the image", "balanced accuracy of an attribute")
        values = metrics.accuracies(found, truth, ATTRIBUTES)
        at_share = metrics.accuracies((found > known.float().mean(dim=0)).float(), truth, ATTRIBUTES)
        return {
            **{name: mean_and_error(values[name]) for name in names},
            f"{names[1]}, said to be there where its probability exceeds its share": mean_and_error(at_share[names[1]]),
        }
    right = found == truth
    if right.dim() == 1:
        return {"accuracy": mean_and_error(right.double())}
    return {
        "accuracy": mean_and_error(right.all(dim=1).double()),
        "accuracy of a digit": mean_and_error(right.double().mean(dim=1)),
    }


def main() -> None:
    parser = flags.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("experiment", choices=TEST)
    parser.add_argument("--n", nargs="+", type=types.two_or_more, default=[20, 100, 500, 2000, 10000, 60000])
    parser.add_argument("--seeds", nargs="+", type=types.seed_number, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:8])
    parser.add_argument("--limit", type=types.positive_int, help="the first examples of the training split only")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/weak"), help="folder of the runs' own folders")
    canvases.add_canvas_dir(parser)
    face_flags.add_flags(parser)
    args = parser.parse_args()
    machine.device(args)
    kind = EXPERIMENTS[args.experiment]
    train, validation = kind.data(args, 5000)
    train = train[: args.limit]
    test = TEST[args.experiment](args)
    for seed in args.seeds:
        for n in args.n:
            how = argparse.Namespace(n_paired=n, paired_fraction=None, unpaired="image", seed=seed)
            some, held_out = training.supervised(how, train, validation, ["image", kind.label])
            task = Task(args.experiment, n, seed, args, some, held_out, test)
            for method in args.methods:
                path = Path("results/weak") / f"{args.experiment}-{method}-{n}-{seed}.json"
                if path.exists():
                    print(f"{path} is there: not run again", flush=True)
                else:
                    run(task, method, path)


def run(task: Task, method: str, path: Path) -> None:
    """Learns by one method, and writes what it reads off the test images."""
    started = time.perf_counter()
    found = measured(METHODS[method](task), task)
    content = {
        **running.origin(),
        "experiment": task.experiment,
        "method": method,
        "n": task.n,
        "total": len(task.train) + len(task.validation),
        "seed": task.seed,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "n_examples": len(task.test),
        "measures": {name: dict(zip(["mean", "standard_error"], pair, strict=True)) for name, pair in found.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    said = ", ".join(f"{name} {100 * mean:.2f} ± {100 * error:.2f} %" for name, (mean, error) in found.items())
    print(f"{path.stem}: {said}", flush=True)


if __name__ == "__main__":
    running.run(main)
