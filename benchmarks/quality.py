"""Measure what a model draws: do picture and label agree, and are the pictures like real ones, and as various?

A classifier of the training pictures, trained here unless --classifier exists, looks at means of p(image | z).

- Agreement: how often it reads from the picture the label that is most probable given z, or that z was conditioned on.
  The label is a class, a whole string of digits, or each of a face's attributes. Most attributes are rare, so a face
  without any is right about most: balanced agreement weighs faces with an attribute as much as faces without it.
- Fréchet distance: between the Gaussians that fit the classifier's 256 features of these pictures and of real ones
  (Heusel et al. 2017, with a classifier of the data set's own).
- Variance: of these features within a label, summed over the features.

z is drawn from p(z) = N(0, I), from a prior fitted as by mvae.tools.prior, and given labels from both; a temperature
multiplies the variance, a fitted prior's within its Gaussians. Strings and attributes to draw for are those of real
examples. With --n-samples log p(image) of the real examples is estimated under both priors.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from multimnist import datasets as canvases
from mvae import MVAE, Batch, Data, cli, load_model
from mvae.data import celeba
from mvae.data.celeba import ATTRIBUTES
from mvae.data.dataset import consecutive_rows, permuted_rows
from mvae.errors import UsageError
from mvae.run import checkpoint, metrics
from mvae.run.device import Machine
from mvae.run.evaluate import Quantity, evaluate, mean_and_error, shown
from mvae.tools import prior

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from tqdm import tqdm

from common import about, as_json, write


@dataclass(kw_only=True)
class Where(Machine, celeba.Source, canvases.Source):
    """Flags of the machine, and of the places of all data sets."""


@dataclass(kw_only=True)
class Config(Where):
    experiment: Literal["mnist", "fashionmnist", "multimnist", "celeba", "celeba19"]  # experiment of the model
    model: Path  # checkpoint to measure

    split: Literal["validation", "test"] = "validation"  # real examples to compare with; test: for final numbers
    n_draws: int = 10_000  # draws in each row
    n_labels: int = 500  # strings or vectors of attributes to draw for
    n_samples: int = 0  # importance samples for log p(image) under both priors (0: no estimate)
    classifier: Path | None = None  # file that keeps the classifier; trained if there is none
    classifier_epochs: int = 4  # epochs to train the classifier for
    seed: int = 0  # random seed
    json: Path | None = None  # file for the numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 10 if EXPERIMENTS[self.experiment].shape == (10,) else self.n_labels
        if not 1 <= least <= self.n_draws:
            raise UsageError(f"n_draws must be >= {least}, a picture for each label, got {self.n_draws}")


class Experiment(NamedTuple):
    """What is measured of an experiment.

    folder: its name. label: the modality that a picture is conditioned on. shape: of the logits of a label.
    separate: the model's modalities if it has one for each value of a label. source: the folder of the data.
    """

    folder: str
    label: str
    shape: tuple[int, ...]
    separate: tuple[str, ...] = ()
    source: str = ""

    @property
    def binary(self) -> bool:
        """Whether a label is a vector of 0 and 1, with a logit each; otherwise its places have a logit per class."""
        return self.label == "attrs"

    def build_model(self, n_latents: int) -> MVAE:
        return importlib.import_module(f"{self.folder}.model").build_model(n_latents)

    def examples(self, split: str, where: Where, settings: dict[str, Any]) -> Data:
        """Return a split with grey pixels, whatever the model was trained on."""
        datasets = importlib.import_module(f"{self.source or self.folder}.datasets")
        return datasets.examples(split, where, {**settings, "binarize": False})


EXPERIMENTS = {
    "mnist": Experiment("mnist", "text", (10,)),
    "fashionmnist": Experiment("fashionmnist", "text", (10,)),
    "multimnist": Experiment("multimnist", "text", (canvases.LENGTH, canvases.FILL + 1)),
    "celeba": Experiment("celeba", "attrs", (len(ATTRIBUTES),)),
    "celeba19": Experiment("celeba19", "attrs", (len(ATTRIBUTES),), separate=ATTRIBUTES, source="celeba"),
}


class Classifier(nn.Module):
    """Pictures (batch, channels, side, side) in [0, 1] -> features (batch, 256), logits (batch, *shape)."""

    def __init__(self, image: Tensor, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        side = image.shape[-1] // 8
        self.net = nn.Sequential(
            nn.Conv2d(len(image), 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * side * side, 256), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(256, torch.Size(shape).numel()),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net[:-2](images)
        return features, self.net[-2:](features).unflatten(1, self.shape)


@torch.enable_grad()
def trained_classifier(config: Config, train: Data) -> Classifier:
    """Return the classifier of --classifier, or train it on `train` and keep it there."""
    experiment, kind = EXPERIMENTS[config.experiment], f"{config.experiment} classifier"
    torch.manual_seed(config.seed)
    classifier = Classifier(train.batch(torch.arange(1))[0]["image"][0], experiment.shape).to(train.device)
    if config.classifier and config.classifier.exists():
        classifier.load_state_dict(checkpoint.load(config.classifier, kind)["model"])
        return classifier.eval()
    steps = [rows for epoch in range(config.classifier_epochs) for rows in permuted_rows(train, 100, epoch)]
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(steps))
    for rows in tqdm(steps, leave=False, disable=None):
        batch, _ = train.batch(rows)
        (_, logits), label = classifier(batch["image"]), batch[experiment.label]
        if experiment.binary:
            loss = F.binary_cross_entropy_with_logits(logits, label.float())
        else:
            loss = F.cross_entropy(logits.flatten(0, -2), label.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if config.classifier:
        checkpoint.save(config.classifier, kind, {"model": classifier.state_dict()})
    return classifier.eval()


class Pictures(NamedTuple):
    """What the classifier sees in n pictures: features (n, 256), predicted and expected labels (n, *label).

    n_given: number of strings or attributes that were given, with equally many pictures of each in turn; 0: others.
    """

    features: Tensor
    read: Tensor
    labels: Tensor
    n_given: int = 0

    def measures(self, real: Tensor) -> dict[str, Any]:
        """Return the agreement, of attributes also the balanced ones, the distance to real features, the variance."""
        binary, right = self.labels.dtype == torch.bool, (self.read == self.labels).view(len(self.read), -1)
        found = self._mean(right.double().mean(dim=1) if binary else right.all(dim=1).double())
        found |= {"frechet": frechet(self.features, real), "variance": self._variance()}
        if balanced := metrics.balanced_accuracies(right, self.labels, ATTRIBUTES) if binary else {}:
            found["balanced"] = self._mean(torch.stack([*balanced.values()]).mean(dim=0))
            found["of each"] = {name: self._mean(values) for name, values in balanced.items()}
        return found

    def _mean(self, values: Tensor) -> dict[str, Any]:
        """Average a value per picture. Given strings and attributes are a sample of all: the error is over them."""
        values = values.view(self.n_given, -1).mean(dim=1) if self.n_given else values
        return as_json(mean_and_error(values))

    def _variance(self) -> float:
        _, group, n = self.labels.unique(dim=0, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(n), self.features.shape[1], dtype=torch.float64).index_add(0, group, self.features)
        within = self.features - (sums / n.unsqueeze(1))[group]
        return (within.square().sum() / (n - 1).sum()).item()


def frechet(a: Tensor, b: Tensor) -> float:
    """Return |m - m'|² + tr(C + C' - 2 (C C')^½), for the means m and covariances C of features (n, 256)."""
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + a.var(dim=0).sum() + b.var(dim=0).sum() - 2 * root).item()


@dataclass
class Viewer:
    """A model and the classifier that looks at its pictures.

    names: the modality of the label, or one for each attribute. binary: whether labels are attributes.
    """

    model: MVAE
    classify: Callable[[Tensor], tuple[Tensor, Tensor]]
    names: tuple[str, ...] = ("text",)
    binary: bool = False

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.classify(images)
        return features.double().cpu(), (logits > 0 if self.binary else logits.argmax(dim=-1)).cpu()

    def real(self, data: Data, label: str) -> Pictures:
        batches = (data.batch(rows)[0] for rows in consecutive_rows(data, 500))
        parts = [(*self._seen(batch["image"]), batch[label].cpu()) for batch in batches]
        features, read, labels = map(torch.cat, zip(*parts, strict=True))
        return Pictures(features, read, labels.to(read.dtype))

    def drawn(self, z: Tensor, labels: Tensor | None = None) -> Pictures:
        """Look at the means of p(image | z). labels: the given ones; None: those that are most probable given z."""
        parts = []
        for some in z.split(500):
            means = self.model.mean(some, [*self.names, "image"])
            probable = [means[name] > 0.5 if self.binary else means[name].argmax(dim=-1) for name in self.names]
            label = probable[0] if len(self.names) == 1 else torch.stack(probable, dim=1)
            parts.append((*self._seen(means["image"]), label.cpu()))
        features, read, most_probable = map(torch.cat, zip(*parts, strict=True))
        if labels is None:
            return Pictures(features, read, most_probable)
        each = labels.repeat_interleave(len(z) // len(labels), dim=0)
        return Pictures(features, read, each, len(labels) if labels.dim() > 1 else 0)

    def given(self, labels: Tensor, draw: Callable[[Batch], Tensor]) -> Pictures:
        """Look at pictures that are drawn given each of the labels (n, *label); draw: from a batch of one to z."""
        each = (labels.float() if self.binary else labels).split(1)
        values = ([one] if len(self.names) == 1 else one.unbind(dim=1) for one in each)
        z = torch.cat([draw(dict(zip(self.names, some, strict=True))) for some in values])
        return self.drawn(z, labels.cpu())


def log_likelihoods(model: MVAE, data: Data, fitted: Distribution, n_samples: int) -> dict[str, Any]:
    """Estimate log p(image) under both priors with the same draws of q(z | image), and the gain of each example."""
    if not n_samples:
        return {}
    quantity, log_p = Quantity(("image",)), []
    for model.prior in (None, fitted):
        found = evaluate(model, data, quantities={quantity: [quantity.target]}, n_samples=n_samples)
        log_p.append(found.estimates[quantity, quantity.target].log_p)
    normal, mixture = log_p
    values = {"N(0, I)": normal, "fitted prior": mixture, "gain": mixture - normal}
    return {name: as_json(mean_and_error(some)) for name, some in values.items()}


@torch.no_grad()
def main() -> None:
    started = time.perf_counter()
    config = cli.parse(__doc__, Config)
    content = about()
    device, experiment = config.device(), EXPERIMENTS[config.experiment]
    model, trained = load_model(config.model, config.experiment, experiment.build_model, device)
    own, settings = importlib.import_module(f"{experiment.folder}.datasets"), trained["settings"]
    splits = (experiment.examples(split, config, settings) for split in ("train", config.split))
    train, held_out = (split.to(device) for split in splits)
    classifier = trained_classifier(config, train)
    torch.manual_seed(config.seed)
    mixture = prior.fitted(model, *prior.training_data(own.examples, config, settings), own.CONTROLS, seed=config.seed)
    fitted, cooler = prior.distribution(mixture, device), prior.distribution(mixture, device, 0.8)
    viewer = Viewer(model, classifier, experiment.separate or (experiment.label,), experiment.binary)
    n, real = config.n_draws, viewer.real(held_out, experiment.label)
    labels = (torch.arange(10) if experiment.shape == (10,) else real.labels[: config.n_labels]).to(device)
    each = n // len(labels)
    examples = own.examples(config.split, config, settings).to(device)
    rows = {
        "real images": real,
        "q(z | image, label)": viewer.drawn(prior.draws(model, examples)),
        "N(0, I)": viewer.drawn(model.draw({}, n)),
        "N(0, I), temperature 0.5": viewer.drawn(model.draw({}, n, 0.5)),
        "fitted prior": viewer.drawn(fitted.sample(torch.Size([n]))),
        "fitted prior, temperature 0.8": viewer.drawn(cooler.sample(torch.Size([n]))),
        "q(z | label)": viewer.given(labels, lambda given: model.draw(given, each)),
        "q(z | label), temperature 0.5": viewer.given(labels, lambda given: model.draw(given, each, 0.5)),
    }
    log_p = log_likelihoods(model, examples, fitted, config.n_samples)
    for mixture_of_z, t in ((fitted, 1.0), (cooler, 0.8)):
        model.prior = mixture_of_z
        at = f", temperature {t}" if t < 1 else ""
        draw = partial(prior.draw_given, model, n=each, temperature=t)
        rows[f"fitted prior, given label{at}"] = viewer.given(labels, draw)
    as_many = viewer.real(train[: len(held_out)], experiment.label)
    found = {}
    for name, pictures in rows.items():
        found[name] = one = pictures.measures((as_many if pictures is real else real).features)
        text = f"{name}: agreement {shown(one['mean'], one['standard_error'], 4)}"
        print(f"{text}, Fréchet distance {one['frechet']:.3f}, variance {one['variance']:.2f}")
    for name, one in log_p.items():
        print(f"log p(image), {name}: {shown(one['mean'], one['standard_error'], 2)}")
    content |= {
        "experiment": config.experiment,
        "checkpoint": str(config.model),
        "split": config.split,
        "seed": config.seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "n_real": len(held_out),
        "n_labels": len(labels),
        "n_draws": n,
        "components": len(mixture["weights"]),
        "training": {
            **{name: value for name, value in trained.items() if name != "settings"},
            **{name: settings[name] for name in ("command", "commit")},
        },
        "drawn": found,
        "n_samples": config.n_samples,
        "log_p": log_p,
    }
    write(config.json, content)


if __name__ == "__main__":
    cli.run(main)
