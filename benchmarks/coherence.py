"""Measure a model's coherence: how well its pictures fit their labels, as read by a classifier that is trained here.

Coherence is how often the classifier reads the label off the mean of p(image | z), for z drawn from q(z | label).
Agreement is how often it reads off such a picture, for z drawn from the prior, the label that is most probable given z.
The classifier learns from the pictures that the model was trained on, and is tested on those held out for validation;
the test split isn't read.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fashionmnist import datasets as garments
from fashionmnist.model import build_model as build_garments
from mnist import datasets as digits
from mnist.model import build_model as build_digits
from mvae import Data, checkpoint, load_model, metrics
from mvae.data import consecutive_rows, permuted_rows
from mvae.estimators import mean_and_error
from mvae.files import write_atomically
from mvae.scripts import flags

EXPERIMENTS = {"mnist": (digits, build_digits), "fashionmnist": (garments, build_garments)}
N_CLASSES = 10


class Classifier(nn.Sequential):
    """Pictures (batch, 1, 28, 28) in [0, 1] -> the ten classes' logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, N_CLASSES),
        )  # fmt: skip

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The most probable classes, (batch,)."""
        return torch.cat([self(some).argmax(dim=1) for some in images.split(500)])


def main() -> None:
    started = time.perf_counter()
    parser = flags.parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the checkpoint to measure")
    parser.add_argument("--n-pictures", type=flags.positive_int, default=200, help="sampled for each label")
    parser.add_argument("--n-prior", type=flags.two_or_more, default=2000, help="sampled from the prior")
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="where it is kept; made where it is absent")
    parser.add_argument("--classifier-epochs", type=flags.positive_int, default=4, help="to train the classifier for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, too")
    args = parser.parse_args()
    device = flags.device(args)
    datasets, build_model = EXPERIMENTS[args.experiment]
    model, trained = load_model(args.model, args.experiment, build_model, device)
    n_val = trained["settings"]["n_val"]
    train, validation = (part.to(device) for part in datasets.training_data(args.data_dir, n_val=n_val))

    kind = f"{args.experiment} classifier"
    if args.classifier and args.classifier.exists():
        saved = checkpoint.load(args.classifier, kind)
        classifier, how = Classifier().to(device), saved["how"]
        classifier.load_state_dict(saved["model"])
    else:
        classifier = trained_classifier(train, args.classifier_epochs, args.seed)
        how = {"epochs": args.classifier_epochs, "seed": args.seed}
        if args.classifier:
            checkpoint.save(args.classifier, kind, {"model": classifier.state_dict(), "how": how})
    classifier.eval()
    torch.manual_seed(args.seed)
    measures = {
        "coherence, label to image": metrics.coherence(
            model, classifier.read, classes=N_CLASSES, n=args.n_pictures
        ).flatten(),
        "agreement of picture and label drawn from the prior": metrics.prior_agreement(
            model, classifier.read, n=args.n_prior
        ),
    }
    accuracy = "the classifier's accuracy on held-out pictures"
    found = {
        name: mean_and_error(values) for name, values in {**measures, accuracy: right(classifier, validation)}.items()
    }
    for name, (mean, error) in found.items():
        print(f"{name}: {mean:.4f} ± {error:.4f}")
    if args.json:
        content = {
            **flags.origin(),
            "experiment": args.experiment,
            "checkpoint": str(args.model),
            "seed": args.seed,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": time.perf_counter() - started,
            "n_pictures_per_label": args.n_pictures,
            "n_prior": args.n_prior,
            "classifier": {**how, **_as_json(found.pop(accuracy)), "n_examples": len(validation)},
            "training": {name: value for name, value in trained.items() if name != "settings"},
            "measures": {name: _as_json(values) for name, values in found.items()},
        }
        write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def _as_json(mean_and_standard_error: tuple[float, float]) -> dict[str, Any]:
    return dict(zip(["mean", "standard_error"], mean_and_standard_error, strict=True))


def trained_classifier(train: Data, epochs: int, seed: int) -> Classifier:
    """A classifier trained on `train`, where the data are."""
    torch.manual_seed(seed)
    classifier = Classifier().to(train.device)
    steps = [rows for epoch in range(epochs) for rows in permuted_rows(train, 100, epoch)]
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(steps))
    for rows in flags.progress(steps):
        batch, _ = train.batch(rows)
        F.cross_entropy(classifier(batch["image"]), batch["text"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier


def right(classifier: Classifier, data: Data) -> Tensor:
    """(n,): 1 where the classifier reads the picture's label, else 0."""
    batches = (data.batch(rows)[0] for rows in consecutive_rows(data, 500))
    return torch.cat([(classifier.read(batch["image"]) == batch["text"]).float() for batch in batches])


if __name__ == "__main__":
    flags.run(main)
