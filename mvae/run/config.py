"""The flags that the train.py of all six experiments share."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from ..data.dataset import seed_of
from ..errors import UsageError
from .device import Machine, resolve
from .resume import saved_state


@dataclass(kw_only=True)
class Training(Machine):
    """Training options. An experiment's Config adds its own; its presets are instances."""

    # Run
    epochs: int = 500  # passes over the training data
    seed: int = 0  # random seed
    out_dir: Path = Path("trained_models")  # folder of checkpoints, stats.jsonl and TensorBoard's files
    resume: bool = False  # continue the run in --out-dir, or start it if there is none
    init: Path | None = None  # checkpoint whose weights a new run starts from, such as for fine-tuning
    limit: int | None = None  # train on the first N examples only

    # Model and objective
    n_latents: int = 64  # size of z
    annealing_epochs: float = 200  # epochs over which β rises to 1
    beta_hold: float = 0  # epochs of β = 0 before it rises
    iw_samples: int = 1  # draws of z in each term; importance-weighted (IWAE) in terms conditioned on the image

    # Optimisation
    batch_size: int = 100  # examples per step, over all processes
    lr: float = 1e-3  # AdamW's learning rate
    lr_schedule: Literal["constant", "cosine", "late"] = "constant"  # late: linear to 0 over the second half
    warmup_epochs: float = 0  # epochs over which the learning rate rises from 0
    weight_decay: float = 0  # AdamW's weight decay

    # Weak supervision
    n_paired: int | None = None  # complete examples; the others keep the image only
    paired_fraction: float | None = None  # the same as a fraction of the examples
    unpaired: Literal["image", "both"] = "image"  # what the others keep; both: half the image, half the rest
    pairs_per_batch: int | None = None  # least number of complete examples per batch (default: a third)

    # Rarely needed
    select: Literal["loss", "joint"] = "loss"  # best model by validation loss, or by the joint term's ELBO
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # network precision; auto: bf16 if the processor supports it
    compile: bool = False  # compile the objective with torch.compile, on CUDA with CUDA graphs
    wait: bool = False  # if another run is writing to --out-dir: wait and share its result instead of refusing
    log_interval: int = 100  # steps between progress reports
    save_every: float = 10  # minutes between saves within an epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "auto":  # resolved now, so that a resumed run compares the actual type
            self.precision = resolve(self.precision, self.device())
        for name in ("epochs", "n_latents", "iw_samples", "batch_size", "log_interval", "limit", "n_paired"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**9:
                raise UsageError(f"{name} must be an integer >= 1, got {value}")
        for name in ("annealing_epochs", "beta_hold", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1e30:
                raise UsageError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("lr", "save_every"):
            if not 0 < getattr(self, name) <= 1e30:
                raise UsageError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed}")
        if self.paired_fraction is not None and (self.n_paired or not 0 < self.paired_fraction <= 1):
            raise UsageError(f"paired_fraction must be in (0, 1], without n_paired, got {self.paired_fraction}")
        if self.unpaired == "both" and not self.paired:
            raise UsageError("unpaired needs n_paired or paired_fraction")

    @property
    def paired(self) -> int | float | None:
        """The number of complete examples, an int, or their fraction; None: all."""
        return self.n_paired or self.paired_fraction

    @property
    def pairs(self) -> int:
        """The least number of complete examples in a batch."""
        default = self.batch_size // 3 if self.paired else 0
        return default if self.pairs_per_batch is None else self.pairs_per_batch


@dataclass(kw_only=True)
class TwoStages(Training):
    """Fields of runs that may train on the images alone first."""

    # Weak supervision
    images_first: int = 0  # epochs of a first stage on the images alone
    images_dir: Path | None = None  # folder of the first stage, to share between runs (default: images/ in --out-dir)
    self_labels: float = 0  # fraction of unlabelled examples to pseudo-label after it, most confident first
    self_labels_by: Literal["neighbours", "regression"] = "neighbours"  # how those are found from the latents
    rounds: int = 1  # stages with labels; all but the first infer them anew from what the model has learnt since
    shift: int = 0  # pixels by which images are shifted at random in these, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_first < 0:
            raise UsageError(f"images_first must be an integer >= 0, got {self.images_first}")
        if not 0 <= self.self_labels <= 1:
            raise UsageError(f"self_labels must be from 0 to 1, got {self.self_labels}")
        if self.rounds < 1 or (self.rounds > 1 and not self.self_labels):
            raise UsageError(f"rounds must be an integer >= 1, and 1 without self_labels, got {self.rounds}")
        if self.shift < 0:
            raise UsageError(f"shift must be an integer >= 0, got {self.shift}")
        if not self.images_first and (self.self_labels or self.images_dir):
            raise UsageError("self_labels and images_dir need images_first, the epochs of the first stage")

    def first_stage(self, name: str) -> Self:
        """Return the Config of the first stage, after checking that the second can follow it.

        Options that concern labels have their defaults in it, so that runs which differ in them can share a folder.
        Raises UsageError as `resume.saved_state` does, or for self_labels without n_paired or paired_fraction.
        """
        for stage in reversed(self.stages_with_labels()):
            saved_state(stage, name)
        if self.self_labels and not self.paired:
            raise UsageError("self_labels are for examples without a label: set n_paired or paired_fraction")
        first: dict[str, Any] = {field.name: field.default for field in fields(self) if _concerns_labels(field.name)}
        first |= {
            "epochs": self.images_first,
            "out_dir": self.images_dir or self.out_dir / "images",
            "resume": self.resume or self.images_dir is not None,
            "wait": self.images_dir is not None,
        }
        return replace(self, **first)

    def stages_with_labels(self) -> list[Self]:
        """Return the Configs of the rounds that follow the first stage.

        The last has this one's folder and seed. Each other has a folder in it, and draws batches and noise of its own.
        """
        earlier = [(self.out_dir / f"round-{i}", seed_of(self.seed, i)) for i in range(1, self.rounds)]
        return [*(replace(self, out_dir=out_dir, seed=seed) for out_dir, seed in earlier), self]


def _concerns_labels(name: str) -> bool:
    others = {"n_paired", "paired_fraction", "unpaired", "pairs_per_batch", "images_first", "images_dir", "self_labels"}
    others |= {"self_labels_by", "rounds", "shift", "select", "reconstruct", "attr_missing"}
    return name in others or (name.startswith("lambda_") and name != "lambda_image")
