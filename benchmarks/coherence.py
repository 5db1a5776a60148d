"""Measure a model's coherence: how often a classifier, trained here, reads the given label from the model's pictures.

The pictures are means of p(image | z), for z drawn from q(z | label). The label is a class, a whole string of digits,
or each of a face's attributes; strings and attributes are those of held-out examples. At temperature 0.5 z has half the
variance. Agreement is the same for z drawn from the prior, with the label that is most probable given z. Most
attributes are rare, so a face without any is right about most: balanced coherence weighs faces with an attribute as
much as faces without it. The classifier is trained on the model's training pictures and tested on the validation split;
the test split isn't read.
"""

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from multimnist import datasets as canvases
from mvae import MVAE, Data, cli, load_model
from mvae.data import celeba
from mvae.data.celeba import ATTRIBUTES
from mvae.data.dataset import consecutive_rows, permuted_rows
from mvae.run import checkpoint, metrics
from mvae.run.device import Machine
from mvae.run.evaluate import mean_and_error, shown

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import about, write


@dataclass(kw_only=True)
class Where(Machine, celeba.Source, canvases.Source):
    """Flags of the machine, and of the places of all data sets."""


@dataclass(kw_only=True)
class Config(Where):
    experiment: Literal["mnist", "fashionmnist", "multimnist", "celeba", "celeba19"]  # experiment of the model
    model: Path  # checkpoint to measure

    n_labels: int = 100  # strings or vectors of attributes
    n_pictures: int = 200  # pictures per label
    n_prior: int = 2000  # draws from the prior
    classifier: Path | None = None  # file that keeps the classifier; trained if there is none
    classifier_epochs: int = 4  # epochs to train the classifier for
    seed: int = 0  # random seed
    json: Path | None = None  # file for the numbers


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
    """Pictures (batch, channels, side, side) in [0, 1] -> logits (batch, *shape)."""

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

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).unflatten(1, self.shape)


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
        logits, label = classifier(batch["image"]), batch[experiment.label]
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


def main() -> None:
    started = time.perf_counter()
    config = cli.parse(__doc__, Config)
    content = about()
    device, experiment = config.device(), EXPERIMENTS[config.experiment]
    model, trained = load_model(config.model, config.experiment, experiment.build_model, device)
    splits = (experiment.examples(split, config, trained["settings"]) for split in ("train", "validation"))
    train, validation = (split.to(device) for split in splits)
    classifier = trained_classifier(config, train)
    torch.manual_seed(config.seed)
    of_classes = experiment.shape == (10,)
    labels = torch.arange(10, device=device)
    if not of_classes:
        labels = validation.batch(torch.arange(min(config.n_labels, len(validation))))[0][experiment.label]
    names = experiment.separate or (experiment.label,)

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        """Return the most probable labels, (batch, *label)."""
        logits = torch.cat([classifier(some) for some in images.split(500)])
        return logits > 0 if experiment.binary else logits.argmax(dim=-1)

    def shares(right: Tensor) -> Tensor:
        """From (n, *label): whether a class or a whole string is right, or the fraction of right attributes."""
        if right.dim() == 1:
            return right.double()
        return right.double().mean(dim=-1) if experiment.binary else right.all(dim=-1).double()

    def coherence(temperature: float) -> Tensor:
        """Return where the label is read, (pictures, *label)."""
        n = config.n_pictures
        return metrics.coherence(model, read, labels, n=n, given=names, temperature=temperature).flatten(0, 1)

    def of_labels(values: Tensor) -> tuple[float, float]:
        """Average a value per picture. Strings and attributes are a sample of all: the error is over them."""
        return mean_and_error(values if of_classes else values.view(len(labels), -1).mean(dim=1))

    coherent = coherence(1.0)
    agrees = metrics.prior_agreement(model, read, n=config.n_prior, labels=names)
    found = {
        "coherence, label to image": of_labels(shares(coherent)),
        "coherence, label to image, at temperature 0.5": of_labels(shares(coherence(0.5))),
        "agreement of picture and label drawn from the prior": mean_and_error(shares(agrees)),
    }
    batches = (validation.batch(rows)[0] for rows in consecutive_rows(validation, 500))
    pairs = [(batch[experiment.label], read(batch["image"])) for batch in batches]
    truth, as_read = map(torch.cat, zip(*pairs, strict=True))
    held_out = as_read == truth
    accuracy = mean_and_error(shares(held_out))
    about_classifier = {**as_json(accuracy), "n_examples": len(validation)}
    if experiment.binary:
        given = labels.repeat_interleave(config.n_pictures, dim=0)
        of_each = metrics.balanced_accuracies(coherent, given, ATTRIBUTES)
        if of_each:  # some attribute is there in one vector and absent in another
            found["balanced coherence of an attribute"] = of_labels(torch.stack([*of_each.values()]).mean(dim=0))
        found |= {f"balanced coherence of {name}": of_labels(values) for name, values in of_each.items()}
        if at_best := metrics.balanced_accuracies(held_out, truth, ATTRIBUTES):
            about_classifier["balanced"] = torch.stack([*at_best.values()]).mean().item()
    for name, (mean, error) in [*found.items(), ("accuracy of the classifier on held-out pictures", accuracy)]:
        print(f"{name}: {shown(mean, error, 4)}")
    content |= {
        "experiment": config.experiment,
        "checkpoint": str(config.model),
        "seed": config.seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "n_labels": len(labels),
        "n_pictures_per_label": config.n_pictures,
        "n_prior": config.n_prior,
        "classifier": about_classifier,
        "training": {name: value for name, value in trained.items() if name != "settings"},
        "measures": {name: as_json(values) for name, values in found.items()},
    }
    write(config.json, content)


def as_json(mean_and_standard_error: tuple[float, float]) -> dict[str, Any]:
    return dict(zip(["mean", "standard_error"], mean_and_standard_error, strict=True))


if __name__ == "__main__":
    cli.run(main)
