"""Compare training recipes on MNIST: log-likelihoods, accuracy of the label given the image, and coherence.

Coherence is how often a digit classifier, trained here on MNIST's training split, reads the label off a picture that
was sampled given that label: the mean of p(image | z) for z drawn from q(z | label). Log-likelihoods are those that
mnist/loglike.py wrote with --json to loglike.json beside the checkpoint, or else prints now. Prints a Markdown table.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvae import checkpoint, cli
from mvae.data import permuted_rows

MNIST = Path(__file__).resolve().parent.parent / "mnist"
sys.path.insert(0, str(MNIST))

import datasets  # noqa: E402
from model import build_model  # noqa: E402

QUANTITIES = ("log p(image)", "log p(image, text)", "log p(image | text)", "log p(text | image)")
ACCURACY = "accuracy of the label predicted from the image"


class Classifier(nn.Sequential):
    """Digits: (batch, 1, 28, 28) in [0, 1] -> the ten classes' logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
        )  # fmt: skip


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR", help="--out-dir of each training")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier.pth.tar"), help="made where absent")
    parser.add_argument("--classifier-epochs", type=cli.positive_int, default=4, help="to train the classifier for")
    parser.add_argument("--n-pictures", type=cli.positive_int, default=200, help="sampled per label, for coherence")
    parser.add_argument("--n-samples", type=cli.positive_int, default=1000, help="importance samples per example")
    parser.add_argument("--limit", type=cli.positive_int, help="log-likelihoods of the first N test examples only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file, too")
    args = parser.parse_args()
    device = cli.device(args.cuda)
    classifier = trained_classifier(args, device)
    accuracy = test_accuracy(classifier, args.data_dir, device)
    runs = [measured(run, classifier, args, device) for run in args.runs]
    print_table(runs)
    counts = sorted({(run["n_examples"], run["n_samples"]) for run in runs})
    for n_examples, n_samples in counts:
        print(f"\nLog p in nats per test example, over {n_examples} examples with {n_samples} importance samples each.")
    pictures = 10 * args.n_pictures
    print(f"Coherence over {pictures} pictures each; the classifier reads {accuracy:.2%} of the test pictures right.")
    if args.json:
        content = {"classifier_test_accuracy": accuracy, "runs": runs}
        checkpoint.write_atomically(args.json, (json.dumps(content, indent=2) + "\n").encode())


def trained_classifier(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The classifier kept in --classifier; where there is none, it is trained and kept there."""
    torch.manual_seed(args.seed)
    classifier = Classifier().to(device)
    if args.classifier.exists():
        classifier.load_state_dict(checkpoint.load(args.classifier, "mnist classifier")["model"])
        return classifier.eval()
    train = datasets.training_data(args.data_dir, n_val=5000)[0].to(device)
    steps = [rows for epoch in range(args.classifier_epochs) for rows in permuted_rows(train, 100, epoch)]
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(steps))
    for rows in cli.progress(steps):
        batch, _ = train.batch(rows)
        F.cross_entropy(classifier(batch["image"]), batch["text"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    checkpoint.save(args.classifier, "mnist classifier", {"model": classifier.state_dict()})
    return classifier.eval()


@torch.no_grad()
def test_accuracy(classifier: nn.Module, data_dir: Path, device: torch.device) -> float:
    """The share of MNIST's test pictures that the classifier reads right."""
    test = datasets.test_data(data_dir).to(device)
    batch, _ = test.batch(torch.arange(len(test), device=device))
    images, labels = batch["image"].split(1000), batch["text"].split(1000)
    right = [(classifier(x).argmax(dim=1) == y).sum().item() for x, y in zip(images, labels, strict=True)]
    return sum(right) / len(test)


def measured(run: Path, classifier: nn.Module, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All numbers of the run in this folder, with the recipe by which it was trained."""
    path = run / checkpoint.BEST
    model, settings = checkpoint.load_model(path, "mnist", build_model, device)
    torch.manual_seed(args.seed)
    digits = [coherence(model, classifier, digit, args.n_pictures, device) for digit in range(10)]
    mean = sum(digits) / 10
    stats = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return {
        "run": str(run),
        "settings": settings,
        "epochs": len(stats),
        "best_epoch": checkpoint.load(path, "mnist")["epoch"],
        **log_likelihoods(run, args),
        "coherence": {
            "mean": mean,
            "standard_error": math.sqrt(mean * (1 - mean) / (10 * args.n_pictures)),
            "by_digit": digits,
        },
    }


@torch.no_grad()
def coherence(model: Any, classifier: nn.Module, digit: int, n: int, device: torch.device) -> float:
    """The share of n pictures, sampled given this digit's label, that the classifier reads as it."""
    z = model.draw({"text": torch.tensor([digit], device=device)}, n, device)
    read: Tensor = classifier(model.likelihood("image").mean(z)).argmax(dim=1)
    return (read == digit).double().mean().item()


def log_likelihoods(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What mnist/loglike.py writes to --json: from the run's loglike.json, else by running it."""
    written = run / "loglike.json"
    if written.exists():
        return json.loads(written.read_text())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "loglike.json")
        flags = ["--data-dir", args.data_dir, "--seed", args.seed, "--n-samples", args.n_samples, "--json", file]
        flags += ["--limit", args.limit] if args.limit else []
        flags += ["--cuda"] if args.cuda else []
        command = [sys.executable, MNIST / "loglike.py", run / checkpoint.BEST, *flags]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def print_table(runs: list[dict[str, Any]]) -> None:
    """A row per run and proposal; what doesn't depend on the proposal stands in the run's first row alone."""
    columns = ["every term scores beside what it is given", "λ text", "epochs (annealed over; best)", "proposal"]
    columns += [*QUANTITIES, "label from image", "coherence, label to image"]
    _row(columns)
    _row(["---"] * len(columns))
    for run in runs:
        values = {(row["quantity"], row["proposal"]): row for row in run["log_likelihood"]}
        proposals = list(dict.fromkeys(proposal for quantity, proposal in values if quantity == QUANTITIES[0]))
        settings = run["settings"]
        reconstruct = " ".join(settings["reconstruct"])
        recipe = [
            "nothing (the paper)" if reconstruct == "given" else reconstruct,
            f"{settings['lambda_text']:g}",
            f"{run['epochs']} ({settings['annealing_epochs']}; {run['best_epoch']})",
        ]
        measures = [_percent(run["measures"][ACCURACY]), _percent(run["coherence"])]
        for i, proposal in enumerate(proposals):
            nats = [values[quantity, proposal] for quantity in QUANTITIES]
            cells = [f"{value['mean']:.2f} ± {value['standard_error']:.2f}" for value in nats]
            _row([*(recipe if i == 0 else [""] * 3), proposal, *cells, *(measures if i == 0 else [""] * 2)])


def _row(cells: list[str]) -> None:
    """A row of a Markdown table, in which a bar within a cell is escaped."""
    print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['standard_error']:.1f} %"


if __name__ == "__main__":
    cli.run(main)
