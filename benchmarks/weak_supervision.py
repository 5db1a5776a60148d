"""Learning from few labels: the label accuracy on test images against the number of labelled examples.

    python benchmarks/weak_supervision.py mnist --n 20 100 500 2000 10000 60000

N of the examples keep their label, spread evenly over the classes if there are any; the others keep their image only. A
fraction of the N validates for `weak`, `paper` and `dropout`; `favoured` also trains on it, and stops by the labels of
all validation examples. `shifted` and `graph_net` train on all N for a fixed number of steps, and shift images as
`weak` does; `graph_net` is a classifier in `weak`'s place, which learns labels spread over a graph, of principal
components at first and then of its own features. `spread`, `pca` and `pixels` see the test images without their labels.
`both` hides the images of half the others; methods that begin with `no_` are `weak` without one of its parts.

Each run writes results/weak/EXPERIMENT-METHOD-N-SEED.json, and is skipped if that exists.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from mvae import MVAE, Data, cli, load_model
from mvae.data import augment
from mvae.data.celeba import ATTRIBUTES
from mvae.data.dataset import consecutive_rows
from mvae.data.supervision import components, most_confident, neighbour_graph, regressed, share_pairs, spread
from mvae.run import metrics, schedules
from mvae.run.checkpoint import BEST, LATEST
from mvae.run.evaluate import mean_and_error, shown
from mvae.run.schedules import Schedule

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import about, as_json, write
from experiments import EXPERIMENTS as SETTINGS
from quality import EXPERIMENTS, Experiment, Where
from recipes import call

Method = Literal[
    "weak", "spread", "pca", "pixels", "graph_net", "m1", "autoencoder", "dropout", "shifted", "favoured", "logistic",
    "paper", "both", "no_labels", "no_shift", "no_rounds",
]  # fmt: skip
SPLITS = ("train", "validation", "test")
SHIFT = 2
"""Pixels by which `shifted` and `graph_net` shift images, at most, as `weak` does; faces not at all."""
STEPS = 10_000
"""Training steps of `shifted`; each round of `graph_net` has half as many."""
PAPER = ["--epochs", "12", "--annealing-epochs", "16", "--pairs-per-batch", "0"]
"""With 10,000 labels of MNIST, in a run of 40 epochs, accuracy on those that validate was highest after the 12th."""


@dataclass(kw_only=True)
class Config(Where):
    experiment: Literal["mnist", "fashionmnist", "multimnist", "celeba"]  # experiment to run

    n: tuple[int, ...] = (20, 100, 500, 2000, 10000, 60000)  # numbers of labelled examples
    seeds: tuple[int, ...] = (0, 1, 2)  # random seeds
    methods: tuple[Method, ...] = get_args(Method)[:12]  # methods to run
    limit: int | None = None  # train on the first N examples only
    runs_dir: Path = Path("runs/weak")  # folder of the runs' own folders


class Task(NamedTuple):
    """One number of labels, drawn with one seed. train and validation have these labels only, test has all."""

    config: Config
    n: int
    seed: int
    train: Data
    validation: Data
    test: Data

    @property
    def kind(self) -> Experiment:
        return EXPERIMENTS[self.config.experiment]

    @property
    def images_dir(self) -> Path:
        """The folder of the first stage, which is the same for all numbers of labels."""
        return self.config.runs_dir / f"{self.config.experiment}-images-{self.seed}"

    def labelled(self, data: Data) -> tuple[Tensor, Tensor]:
        """Return images and labels of the examples that have a label."""
        here = (data.present or {}).get(self.kind.label, torch.ones(len(data), dtype=torch.bool))
        batch, _ = data.batch(here.nonzero().flatten())
        return batch["image"], batch[self.kind.label]

    def model(self, path: Path) -> MVAE:
        return load_model(path, self.config.experiment, self.kind.build_model, torch.device("cpu"))[0]

    def first_stage(self, kind: str = "weak", *words: str) -> MVAE:
        """Return the model of the images alone, trained if the recipe hasn't trained it yet."""
        folder = self.images_dir if kind == "weak" else Path(f"{self.images_dir}-{kind}")
        if not (folder / BEST).exists():
            weak(self, kind, "--images-dir", str(folder), *words)
        return self.model(folder / LATEST)


def batches(data: Data) -> Iterator[dict[str, Tensor]]:
    return (data.batch(rows)[0] for rows in consecutive_rows(data, 1000))


def means(model: MVAE, data: Data) -> Tensor:
    """Return the means of q(z | image)."""
    return torch.cat([model.fused({"image": batch["image"]})[0] for batch in batches(data)])


@torch.no_grad()
def trained(task: Task, method: str, *words: str) -> Tensor:
    """Run train.py; return the test labels that its model infers at the mean of q(z | image)."""
    config, name = task.config, task.kind.label
    out_dir = config.runs_dir / f"{config.experiment}-{method}-{task.n}-{task.seed}"
    common = ["--n-paired", str(task.n), "--seed", str(task.seed), "--out-dir", str(out_dir), "--resume"]
    common += ["--data-dir", str(config.data_dir), "--log-interval", "1000"]
    common += ["--limit", str(config.limit)] if config.limit else []
    if config.experiment == "multimnist":
        common += ["--canvas-dir", str(config.canvas_dir)]
    if config.experiment == "celeba":
        common += ["--cache-dir", str(config.cache_dir), *["--allow-missing"] * config.allow_missing]
    call(f"{config.experiment}/train.py", *words, *common)
    model = task.model(out_dir / BEST)
    found = model.mean(means(model, task.test), [name])[name]
    return found if task.kind.binary else found.argmax(dim=-1)


def weak(task: Task, method: str = "weak", *words: str) -> Tensor:
    return trained(task, method, "--preset", "weak", "--images-dir", str(task.images_dir), *words)


def loss_of(logits: Tensor, labels: Tensor, kind: Experiment) -> Tensor:
    """Return the mean cross-entropy over the label's places."""
    if kind.binary:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits.flatten(0, -2), labels.long().flatten())


def guess(logits: Tensor, kind: Experiment) -> Tensor:
    return logits.sigmoid() if kind.binary else logits.argmax(dim=-1)


def network_for(task: Task) -> nn.Sequential:
    """Return the image encoder's network with dropout and one more layer, for the labels' logits."""
    torch.manual_seed(task.seed)
    encoder: Any = task.kind.build_model(SETTINGS[task.config.experiment].n_latents).encoders["image"]
    layers = [[layer, *[nn.Dropout(0.5)] * isinstance(layer, nn.SiLU)] for layer in encoder.hidden]
    return nn.Sequential(
        *(part for parts in layers for part in parts),
        nn.Linear(encoder.mu.in_features, torch.Size(task.kind.shape).numel()),
        nn.Unflatten(1, task.kind.shape),
    )


def steps_of(
    network: nn.Module, train: Data, kind: Experiment, steps: int, rate: Schedule = lambda t: 1.0
) -> Iterator[int]:
    """Train by Adam at 1e-3 times `rate` of the share that is done; yield the number of each step."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * rate(step / steps)
        batch, _ = train.batch(torch.randint(len(train), (min(100, len(train)),)))
        loss_of(network(batch["image"]), batch[kind.label], kind).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


@torch.no_grad()
def inferred(network: nn.Module, task: Task) -> Tensor:
    network.eval()
    return torch.cat([guess(network(batch["image"]), task.kind) for batch in batches(task.test)])


def supervised(task: Task, *, favoured: bool = False) -> Tensor:
    """Of the weights with the fewest validation errors, keep those with the lowest validation loss."""
    network, kind = network_for(task), task.kind
    (x, y), (held_x, held_y) = task.labelled(task.train), task.labelled(task.validation)
    if favoured:
        x, y = torch.cat([x, held_x]), torch.cat([y, held_y])
        held_x, held_y = task.labelled(dataclasses.replace(task.validation, present=None))
    best, kept, steps = (math.inf, math.inf), {}, max(1000, 10 * len(x) // 100)
    for step in steps_of(network, Data(tensors={"image": x, kind.label: y}), kind, steps):
        if step % max(20, steps // 50) == 0:
            network.eval()
            with torch.no_grad():
                logits = torch.cat([network(some) for some in held_x.split(1000)])
            network.train()
            found = guess(logits, kind)
            errors = int(((found > 0.5 if kind.binary else found) != held_y).sum())
            score = errors, loss_of(logits, held_y, kind).item()
            if score < best:
                best, kept = score, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return inferred(network, task)


def on_shifted(network: nn.Module, task: Task, x: Tensor, y: Tensor, steps: int) -> None:
    """Train on shifted images (n, ...) and their labels (n, *label) for a fixed number of steps."""
    train = Data(tensors={"image": x, task.kind.label: y})
    train = augment.shifted(train, "image", 0 if task.kind.binary else SHIFT)
    network.train()
    for _ in steps_of(network, train, task.kind, steps, schedules.late(1)):
        pass
    network.eval()


def shifted(task: Task) -> Tensor:
    network = network_for(task)
    x, y = zip(task.labelled(task.train), task.labelled(task.validation), strict=True)
    on_shifted(network, task, torch.cat(x), torch.cat(y), STEPS)
    return inferred(network, task)


def graph_net(task: Task, rounds: int = 3) -> Tensor:
    """For classes: the recipe of `weak` with a classifier in place of the MVAE, on all images that aren't tested."""
    name, parts = task.kind.label, (task.train, task.validation)
    x = torch.cat([batch["image"] for data in parts for batch in batches(data)])
    y = torch.cat([data.tensors[name].long() for data in parts])
    known = torch.cat([(data.present or {})[name] for data in parts])
    network = network_for(task)
    points, believed = components(x.flatten(1)), torch.ones(1)
    for _ in range(rounds):
        probabilities = spread(neighbour_graph(points), y, known) * believed
        rows = known | most_confident(probabilities, known, 0.95)
        on_shifted(network, task, x[rows], torch.where(known, y, probabilities.argmax(dim=-1))[rows], STEPS // 2)
        with torch.no_grad():
            points = torch.cat([network[:-2](some) for some in x.split(1000)])
            believed = network[-2:](points).softmax(dim=-1)
    return inferred(network, task)


def logistic(task: Task) -> Tensor:
    x, y = task.labelled(task.train)
    return by_regression(torch.cat([x, *(batch["image"] for batch in batches(task.test))]), y, task.kind)


@torch.no_grad()
def m1(task: Task, *first: str) -> Tensor:
    model, (x, y) = task.first_stage(*first), task.labelled(task.train)
    known = torch.cat([model.fused({"image": part})[0] for part in x.split(1000)])
    return by_regression(torch.cat([known, means(model, task.test)]), y, task.kind)


def by_regression(points: Tensor, labels: Tensor, kind: Experiment) -> Tensor:
    """Infer the labels of the points that follow those whose labels are given."""
    known = torch.arange(len(points)) < len(labels)
    unknown = labels.new_zeros(len(points) - len(labels), *labels.shape[1:])
    found = regressed(points, torch.cat([labels, unknown]), known)[len(labels) :]
    return found[..., 1] if kind.binary else found.argmax(dim=-1)


GRAPHS: dict[Any, Any] = {}
"""The last graph of `spread_to_test`, which serves all numbers of labels."""


def latents(task: Task) -> Tensor:
    model = task.first_stage()
    return torch.cat([means(model, data) for data in (task.train, task.test)])


def pixels(*some: Data) -> Tensor:
    return torch.cat([batch["image"].flatten(1) for data in some for batch in batches(data)])


@torch.no_grad()
def spread_to_test(task: Task, points: Callable[[Task], Tensor] = latents) -> Tensor:
    name, key = task.kind.label, (points, task.images_dir if points is latents else None)
    if key not in GRAPHS:
        GRAPHS.clear()
        GRAPHS[key] = neighbour_graph(points(task))
    assert task.train.present is not None
    labels = torch.cat([task.train.tensors[name], task.test.tensors[name]])
    known = torch.cat([task.train.present[name], torch.zeros(len(task.test), dtype=torch.bool)])
    found = spread(GRAPHS[key], labels, known)[len(task.train) :]
    return found[..., 1] if task.kind.binary else found.argmax(dim=-1)


METHODS: dict[Method, Callable[[Task], Tensor]] = {
    "weak": weak,
    "spread": spread_to_test,
    "pca": functools.partial(spread_to_test, points=lambda task: components(pixels(task.train, task.test))),
    "pixels": functools.partial(spread_to_test, points=lambda task: pixels(task.train, task.test)),
    "graph_net": graph_net,
    "m1": m1,
    "autoencoder": lambda task: m1(task, "autoencoder", "--beta-hold", "10", "--rounds", "1", "--epochs", "1"),
    "dropout": supervised,
    "shifted": shifted,
    "favoured": functools.partial(supervised, favoured=True),
    "logistic": logistic,
    "paper": lambda task: trained(task, "paper", *PAPER, *["--lambda-text", "50"] * (not task.kind.binary)),
    "both": lambda task: weak(task, "both", "--unpaired", "both", "--images-dir", f"{task.images_dir}-both-{task.n}"),
    "no_labels": lambda task: weak(
        task, "no_labels", "--self-labels", "0", "--pairs-per-batch", "33", "--rounds", "1", "--epochs", "9"
    ),
    "no_shift": lambda task: weak(task, "no_shift", "--shift", "0"),
    "no_rounds": lambda task: weak(task, "no_rounds", "--rounds", "1", "--epochs", "9"),
}
"""By name, what infers the test labels (n, *label), or for attributes their probabilities (n, attributes)."""


def measured(found: Tensor, task: Task) -> dict[str, tuple[float, float]]:
    """Return label accuracies, each with its standard error over the test examples.

    An attribute counts as there if its probability exceeds 0.5. That rarely happens to a rare attribute, whose balanced
    accuracy is then near 0.5 for all methods; so there is one for a threshold of the attribute's share of the labels.
    """
    truth = torch.cat([batch[task.kind.label] for batch in batches(task.test)])
    if task.kind.binary:
        _, known = task.labelled(task.train)
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


def run(task: Task, method: Method, path: Path) -> None:
    """Learn by one method, and write its test accuracies."""
    started = time.perf_counter()
    found = measured(METHODS[method](task), task)
    content = {
        **about(),
        "experiment": task.config.experiment,
        "method": method,
        "n": task.n,
        "total": len(task.train) + len(task.validation),
        "seed": task.seed,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "n_examples": len(task.test),
        "measures": {name: as_json(values) for name, values in found.items()},
    }
    write(path, content)
    said = ", ".join(f"{name} {shown(100 * mean, error and 100 * error, 2)} %" for name, (mean, error) in found.items())
    print(f"{path.stem}: {said}", flush=True)


def main() -> None:
    config = cli.parse(__doc__, Config)
    config.device()
    kind = EXPERIMENTS[config.experiment]
    settings = {"n_val": 5000, "canvases": None}
    train, validation, test = (kind.examples(split, config, settings) for split in SPLITS)
    for seed in config.seeds:
        for n in config.n:
            parts = share_pairs(train[: config.limit], validation, n, ["image", kind.label], seed=seed)
            task = Task(config, n, seed, *parts, test)
            for method in config.methods:
                path = Path("results/weak") / f"{config.experiment}-{method}-{n}-{seed}.json"
                if path.exists():
                    print(f"{path} exists: skipped", flush=True)
                else:
                    run(task, method, path)


if __name__ == "__main__":
    cli.run(main)
