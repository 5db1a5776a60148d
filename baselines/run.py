"""Train a baseline on an experiment's networks and estimate its log-likelihoods: a row of the paper's Table 2.

    python baselines/run.py --model jmvae --experiment mnist --seed 0                 # validation examples
    python baselines/run.py --model jmvae --experiment mnist --seed 0 --split test    # the same run, for the table

A run that was interrupted is continued, and estimates whose file exists are not made again. model.py describes the
models. Choose settings by the estimates on validation examples, each with an --out-dir of its own.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fashionmnist.model import build_model as build_fashionmnist
from mnist.model import build_model as build_mnist
from mvae import Data, Objective, Quantity, Run, Training, UsageError, cli, of_a_pair
from mvae.data import mnist
from mvae.data.dataset import DataDir
from mvae.run import checkpoint, metrics, schedules
from mvae.tools.report import Loglike, estimate, report

import torch  # after mvae, which sets how OpenMP's threads wait

from model import IMAGE, TEXT, Name, build_model, build_objective, labelled

NAME = "baselines"
SETS = {
    "mnist": ("MNIST", build_mnist),
    "binarymnist": ("MNIST", build_mnist),
    "fashionmnist": ("FashionMNIST", build_fashionmnist),
}
"""By experiment, the data set and what builds the networks."""


@dataclass(kw_only=True)
class Baseline(Training, DataDir):
    """The settings of a run."""

    # Baseline
    model: Name = "jmvae"  # model to train
    experiment: Literal["mnist", "binarymnist", "fashionmnist"] = "mnist"  # experiment whose data and networks it has
    lambda_text: float = 25  # weight of log p(text | z), where a label is reconstructed
    alpha: float = 0.1  # weight of JMVAE's KL divergences to q(z | image) and q(z | text)
    reconstruct: Literal["given", "text"] = "text"  # extra target of ELBO(image) in mvae-q and mvae-joint
    n_val: int = 5000  # training examples held out for validation

    # Run
    out_dir: Path = Path("runs/baselines")  # folder of the runs' own folders, MODEL-EXPERIMENT-SEED
    resume: bool = True  # continue the run in its folder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paired:
            raise UsageError("the baselines need complete examples: omit n_paired and paired_fraction")
        if self.alpha < 0:
            raise UsageError(f"alpha must be >= 0, got {self.alpha}")


@dataclass(kw_only=True)
class Config(Baseline):
    # Estimates
    split: Literal["validation", "test"] = "validation"  # split to read
    n_samples: int = 1000  # importance samples per example
    n_examples: int | None = None  # number of examples (default: all)
    json: Path | None = None  # file to write (default: results/DIR/RUN.json as in --out-dir, or validation.json there)


PAPER = Config(epochs=500, annealing_epochs=200, lr=1e-3, lambda_text=50, reconstruct="given")
PRESETS = {
    "fast": replace(  # as in mnist/train.py
        PAPER, lambda_text=25, reconstruct="text", beta_hold=1, lr=2e-3, lr_schedule="late", warmup_epochs=0.2,
        weight_decay=0.05, iw_samples=2, epochs=25, annealing_epochs=9,
    ),
    "paper": PAPER,
}  # fmt: skip


def fit(config: Baseline, objective: Objective, train: Data, validation: Data) -> dict[str, Any]:
    """Train for `config.epochs`; return the record of the best epoch, as in stats.jsonl."""
    optimizer = torch.optim.AdamW(objective.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    beta = schedules.held(config.beta_hold, schedules.linear(config.annealing_epochs))
    rate = schedules.warmed_up(config.warmup_epochs, schedules.named(config.lr_schedule, config.epochs))
    measure = {"label_accuracy": metrics.label_accuracy("text")} if "text" in objective.model.modalities else {}
    with Run(NAME, objective, optimizer, config) as run:
        for _ in run.epochs(config.epochs):
            for batch, _ in run.batches(train, config.batch_size):
                run.set(lr=config.lr * rate(run.t), beta=beta(run.t))
                loss, parts = run.objective(batch, run.beta)
                run.backward(loss, parts)
                run.step()
            run.validate(validation, measure)
    return run.history[run.best_epoch - 1]


def main() -> None:
    flags = cli.parse(__doc__, PRESETS)
    name = f"{flags.model}-{flags.experiment}-{flags.seed}"
    out_dir = flags.out_dir / name
    results = Path("results", flags.out_dir.name, f"{name}.json")
    path = flags.json or (results if flags.split == "test" else out_dir / "validation.json")
    if path.exists():
        print(f"{path} exists: {name} is skipped")
        return
    how = Loglike(
        model_path=out_dir / checkpoint.BEST, cuda=flags.cuda, threads=flags.threads, precision=flags.precision,
        split=flags.split, n_samples=flags.n_samples, json=path,
    )  # fmt: skip
    config = Baseline(**{field.name: getattr(flags, field.name) for field in fields(Baseline)} | {"out_dir": out_dir})

    data_set, build = SETS[config.experiment]
    binarize = config.experiment == "binarymnist"
    train, validation = mnist.training_data(
        data_set, config.data_dir, n_val=config.n_val, limit=config.limit, binarize=binarize
    )
    if config.model == "cvae":
        train, validation = labelled(train), labelled(validation)
    torch.manual_seed(config.seed)
    build_this = partial(build_model, config.model, build)
    objective = build_objective(
        config.model, checkpoint.initialised(build_this(config.n_latents), config.init, NAME),
        lambda_text=config.lambda_text, alpha=config.alpha, iw_samples=config.iw_samples,
        reconstruct=TEXT if config.reconstruct == "text" else (),
    )  # fmt: skip
    best = fit(config, objective, train, validation)

    model, trained = checkpoint.load_model(how.model_path, NAME, build_this, config.device())
    trained["validation"] = {key.removeprefix("validation/"): x for key, x in best.items() if "validation/" in key}
    data = validation
    if flags.split == "test":
        data = mnist.test_data(data_set, config.data_dir, binarize=binarize)
        data = labelled(data) if config.model == "cvae" else data
    one, pair = model.modalities, "text" in model.modalities
    quantities = of_a_pair(IMAGE, TEXT) if pair else {Quantity(one): [one]}
    data = data[: flags.n_examples].to(config.device())
    found = estimate(how, model, data, quantities, {"text": IMAGE} if pair else {})
    measures = {}
    if pair:
        right = found.predictions["text"].argmax(dim=1) == found.truth["text"]
        measures = {"accuracy of the label predicted from the image": right.double()}
    report(found, measures, how, trained)


if __name__ == "__main__":
    cli.run(main)
