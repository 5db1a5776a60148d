"""Measure a model's coherence: how well its pictures fit their labels, as read by a classifier that is trained here.

Coherence is how often the classifier reads the label off the mean of p(image | z), for z drawn from q(z | label): a
class, a whole string of digits, or each of a face's attributes. At temperature 0.5 z has half the variance. Agreement
is how often it reads off such a picture, for z drawn from the prior, the label that is most probable given z. Labels
that are not classes are those of held-out examples. Most attributes are rare, so that a face that shows none is right
about most: a balanced coherence counts faces with an attribute as much as all faces without. The classifier learns from
the pictures that the model was trained on, and is tested on those held out for validation; the test split isn't read.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from celeba import datasets as faces
from celeba.model import build_model as build_faces
from celeba19.model import build_model as build_faces_19
from fashionmnist import datasets as garments
from fashionmnist.model import build_model as build_garments
from mnist import datasets as digits
from mnist.model import build_model as build_digits
from multimnist import datasets as canvases
from multimnist.model import build_model as build_canvases
from mvae import MVAE, Data, checkpoint, load_model, metrics
from mvae.data import consecutive_rows, permuted_rows
from mvae.datasets.celeba import ATTRIBUTES
from mvae.estimators import mean_and_error
from mvae.files import write_atomically
from mvae.scripts import faces as face_flags
from mvae.scripts import flags, machine, running, types


class Experiment(NamedTuple):
    """What is measured of an experiment.

    build_model: of its model.py.
    data: its training and validation examples.
    label: the modality that pictures are drawn given; `shape`: that of the logits of one label.
    apart: the model's modalities, one for each value of a label, where it has several in place of `label`.
    """

    build_model: Callable[[int], MVAE]
    data: Callable[[argparse.Namespace, int], tuple[Data, Data]]
    label: str
    shape: tuple[int, ...]
    apart: tuple[str, ...] = ()

    @property
    def binary(self) -> bool:
        """Whether a label is a vector of yes and no, with a logit for each; else each place has a logit a class."""
        return self.label == "attrs"


def prepared_canvases(args: argparse.Namespace, n_val: int) -> tuple[Data, Data]:
    """MultiMNIST's training and validation examples, whose canvases are made if there are none."""
    canvases.prepare(args.data_dir, args.canvas_dir)
    return canvases.training_data(args.canvas_dir, n_val=n_val)


def prepared_faces(args: argparse.Namespace, n_val: int) -> tuple[Data, Data]:
    """CelebA's training and validation examples, their attributes as vectors; `n_val` doesn't matter to it."""
    return faces.training_data(args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers)


EXPERIMENTS = {
    "mnist": Experiment(build_digits, lambda args, n: digits.training_data(args.data_dir, n_val=n), "text", (10,)),
    "fashionmnist": Experiment(
        build_garments, lambda args, n: garments.training_data(args.data_dir, n_val=n), "text", (10,)
    ),
    "multimnist": Experiment(
        build_canvases,
        prepared_canvases,
        "text",
        (canvases.LENGTH, canvases.FILL + 1),
    ),
    "celeba": Experiment(build_faces, prepared_faces, "attrs", (len(ATTRIBUTES),)),
    "celeba19": Experiment(build_faces_19, prepared_faces, "attrs", (len(ATTRIBUTES),), apart=ATTRIBUTES),
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

    @torch.no_grad()
    def read(self, images: Tensor, binary: bool) -> Tensor:
        """The labels that are most probable, (batch, *label)."""
        logits = torch.cat([self(some) for some in images.split(500)])
        return logits > 0 if binary else logits.argmax(dim=-1)


def main() -> None:
    started = time.perf_counter()
    parser = flags.parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", type=types.path, required=True, metavar="FILE", help="the checkpoint to measure")
    parser.add_argument("--n-labels", type=types.two_or_more, default=100, help="strings or vectors of attributes")
    parser.add_argument("--n-pictures", type=types.positive_int, default=200, help="sampled for each label")
    parser.add_argument("--n-prior", type=types.two_or_more, default=2000, help="sampled from the prior")
    parser.add_argument(
        "--classifier", type=types.path, metavar="FILE", help="where it is kept; made where it is absent"
    )
    parser.add_argument("--classifier-epochs", type=types.positive_int, default=4, help="to train the classifier for")
    parser.add_argument("--json", type=types.output, metavar="FILE", help="write the numbers to this file, too")
    canvases.add_canvas_dir(parser)
    face_flags.add_flags(parser)
    args = parser.parse_args()
    device = machine.device(args)
    experiment = EXPERIMENTS[args.experiment]
    model, trained = load_model(args.model, args.experiment, experiment.build_model, device)
    parts = experiment.data(args, trained["settings"].get("n_val", 0))
    train, validation = (part.to(device) for part in parts)

    kind = f"{args.experiment} classifier"
    if args.classifier and args.classifier.exists():
        saved = checkpoint.load(args.classifier, kind)
        classifier, how = untrained(train, experiment), saved["how"]
        classifier.load_state_dict(saved["model"])
    else:
        classifier = trained_classifier(train, experiment, args.classifier_epochs, args.seed)
        how = {"epochs": args.classifier_epochs, "seed": args.seed}
        if args.classifier:
            checkpoint.save(args.classifier, kind, {"model": classifier.state_dict(), "how": how})
    classifier.eval()
    torch.manual_seed(args.seed)
    labels = torch.arange(10, device=device)
    if experiment.shape != (10,):
        labels = validation.batch(torch.arange(min(args.n_labels, len(validation))))[0][experiment.label]

    def read(images: Tensor) -> Tensor:
        return classifier.read(images, experiment.binary)

    def shares(right: Tensor) -> Tensor:
        """Whether a class or all of a string is right, or the share of the attributes that are: from (n, *label)."""
        if right.dim() == 1:
            return right.double()
        return right.double().mean(dim=-1) if experiment.binary else right.all(dim=-1).double()

    label = experiment.label
    names = experiment.apart or (label,)

    def coherence(temperature: float) -> Tensor:
        """Where the labels are read, (pictures, *label)."""
        n = args.n_pictures
        return metrics.coherence(model, read, labels, n=n, given=names, temperature=temperature).flatten(0, 1)

    coherent = coherence(1.0)
    agrees = metrics.prior_agreement(model, read, n=args.n_prior, labels=names)
    typical = coherence(0.5)
    truth, as_read = [], []
    for rows in consecutive_rows(validation, 500):
        batch, _ = validation.batch(rows)
        truth.append(batch[label])
        as_read.append(read(batch["image"]))
    held_out = torch.cat(as_read) == torch.cat(truth)

    def of_labels(values: Tensor) -> tuple[float, float]:
        """Of a value for each picture. Strings and attributes are a sample of all: the error is over them."""
        return mean_and_error(values if experiment.shape == (10,) else values.view(len(labels), -1).mean(dim=1))

    found = {
        "coherence, label to image": of_labels(shares(coherent)),
        "coherence, label to image, at temperature 0.5": of_labels(shares(typical)),
        "agreement of picture and label drawn from the prior": mean_and_error(shares(agrees)),
    }
    accuracy = mean_and_error(shares(held_out))
    about = {**how, **_as_json(accuracy), "n_examples": len(validation)}
    if experiment.binary:
        given = labels.repeat_interleave(args.n_pictures, dim=0)
        of_each = metrics.balanced_accuracies(coherent, given, ATTRIBUTES)
        if of_each:  # some attribute is given in one vector, and not in another
            found["balanced coherence of an attribute"] = of_labels(torch.stack([*of_each.values()]).mean(dim=0))
        found |= {f"balanced coherence of {name}": of_labels(values) for name, values in of_each.items()}
        at_best = metrics.balanced_accuracies(held_out, torch.cat(truth), ATTRIBUTES)
        if at_best:
            about["balanced"] = torch.stack([*at_best.values()]).mean().item()
    for name, (mean, error) in [*found.items(), ("the classifier's accuracy on held-out pictures", accuracy)]:
        print(f"{name}: {mean:.4f} ± {error:.4f}")
    if args.json:
        content = {
            **running.origin(),
            "experiment": args.experiment,
            "checkpoint": str(args.model),
            "seed": args.seed,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": time.perf_counter() - started,
            "n_labels": len(labels),
            "n_pictures_per_label": args.n_pictures,
            "n_prior": args.n_prior,
            "classifier": about,
            "training": {name: value for name, value in trained.items() if name != "settings"},
            "measures": {name: _as_json(values) for name, values in found.items()},
        }
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def _as_json(mean_and_standard_error: tuple[float, float]) -> dict[str, Any]:
    return dict(zip(["mean", "standard_error"], mean_and_standard_error, strict=True))


def untrained(train: Data, experiment: Experiment) -> Classifier:
    """A classifier of the pictures' size, where the data are."""
    batch, _ = train.batch(torch.zeros(1, dtype=torch.long))
    return Classifier(batch["image"][0], experiment.shape).to(train.device)


def trained_classifier(train: Data, experiment: Experiment, epochs: int, seed: int) -> Classifier:
    """A classifier trained on `train`."""
    torch.manual_seed(seed)
    classifier = untrained(train, experiment)
    steps = [rows for epoch in range(epochs) for rows in permuted_rows(train, 100, epoch)]
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(steps))
    for rows in running.progress(steps):
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
    return classifier


if __name__ == "__main__":
    running.run(main)
