"""The flags of a train.py, and what they ask for."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, UserError
from . import flags
from .machine import device
from .running import origin
from .types import (
    fraction,
    non_negative_float,
    non_negative_int,
    path,
    positive_float,
    positive_int,
    probability,
    share,
    whole_number,
)

if TYPE_CHECKING:  # torch is imported where it's needed, so that -h doesn't wait for it
    from ..data import Data
    from ..schedules import Schedule
    from ..training import Options


def parser(
    description: str | None,
    *,
    modalities: Sequence[str],
    lambdas: Mapping[str, float],
    n_latents: int,
    batch_size: int,
    epochs: int,
    annealing_epochs: int,
    lr: float,
    n_val: int | None = None,
    approx_m: int | None = None,
    reconstruct: str = "given",
    presets: Mapping[str, Mapping[str, object]] | None = None,
    missing: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """The flags of a train.py, with its defaults; `lambdas` gives each --lambda-NAME its default.

    `presets`: the values of --preset beside "paper", each with the defaults that it sets in place of the paper's.
    Give `n_val` to have --n-val, for data without a validation split; give `approx_m` to have --approx-m.
    `missing`: the name and the help of a flag for the probability that a value is missing.
    """
    result = flags.parser(description)
    names = ["paper", *(presets or {})]
    result.add_argument(
        "--preset", choices=names, default="paper", help="whose defaults: flags that are given still win"
    )
    model = result.add_argument_group("model and objective")
    model.add_argument("--n-latents", type=whole_number(1, 10**5), default=n_latents, help="size of z")
    for name, value in lambdas.items():
        model.add_argument(f"--lambda-{name}", type=positive_float, default=value, help=f"weight of log p({name} | z)")
    model.add_argument(
        "--reconstruct",
        nargs="+",
        default=[reconstruct],
        choices=["given", "all", *modalities],
        help="what each ELBO term scores beside what it is given: nothing more, all, or these modalities",
    )
    model.add_argument(
        "--annealing-epochs", type=non_negative_int, default=annealing_epochs, help="epochs over which β rises to 1"
    )
    model.add_argument("--beta-hold", type=non_negative_float, default=0.0, help="epochs of β = 0 before it rises")
    model.add_argument(
        "--iw-samples",
        type=whole_number(1, 10**4),
        default=1,
        help="draws of z in each term: more make the terms that are given the picture the IWAE's bounds",
    )
    if approx_m is not None:
        model.add_argument(
            "--approx-m",
            type=whole_number(0, 1000),
            default=approx_m,
            help="ELBO terms of random subsets, drawn each step",
        )
    optimisation = result.add_argument_group("optimisation")
    optimisation.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="examples a step, over all processes"
    )
    optimisation.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the training data")
    optimisation.add_argument("--lr", type=positive_float, default=lr, help="Adam's learning rate")
    optimisation.add_argument(
        "--lr-schedule",
        choices=["constant", "cosine", "late"],
        default="constant",
        help="the rate's course: cosine falls to 0, late stays to half of the epochs and then falls linearly to 0",
    )
    optimisation.add_argument(
        "--warmup-epochs", type=non_negative_float, default=0.0, help="epochs over which the rate rises from 0"
    )
    optimisation.add_argument(
        "--weight-decay", type=non_negative_float, default=0.0, help="AdamW's decay of the weights, times the rate"
    )
    optimisation.add_argument(
        "--select", choices=["loss", "joint"], default="loss",
        help="the best model: of the epoch with the least validation loss, or with the greatest joint ELBO, without λ",
    )  # fmt: skip
    flags.add_precision(optimisation)
    optimisation.add_argument("--compile", action="store_true", help="compile the step; on CUDA, capture it as a graph")
    optimisation.add_argument(
        "--sync-batchnorm", action="store_true", help="under torchrun: batch norm over all processes' examples"
    )
    supervision = result.add_argument_group("weak supervision")
    pairs = supervision.add_mutually_exclusive_group()
    pairs.add_argument(
        "--n-paired", type=positive_int, metavar="N", help="examples that keep all modalities, validation's included"
    )
    pairs.add_argument("--paired-fraction", type=fraction, metavar="F", help="the same as a share of all examples")
    supervision.add_argument(
        "--unpaired",
        choices=["image", "both"],
        default="image",
        help="what the other examples keep: the image; or one half of them the image, and one half all but the image",
    )
    supervision.add_argument(
        "--pairs-per-batch",
        type=non_negative_int,
        metavar="P",
        help="examples with all modalities in each batch, at least (a third of it); 0: as many as chance gives",
    )
    supervision.add_argument(
        "--images-first", type=non_negative_int, default=0, metavar="EPOCHS", help="train on the images alone, before"
    )
    supervision.add_argument(
        "--images-dir", type=path, metavar="DIR", help="that stage's folder, which runs may share; else OUT_DIR/images"
    )
    supervision.add_argument(
        "--self-labels", type=share, default=0.0, metavar="F",
        help="the share of the examples without a label, the surest, that get one by what that stage has learnt",
    )  # fmt: skip
    supervision.add_argument(
        "--self-labels-by", choices=["neighbours", "regression"], default="neighbours",
        help="how they are found in the means of q(z | image): labels spread over neighbours, or logistic regression",
    )  # fmt: skip
    for name, about in (missing or {}).items():
        supervision.add_argument(f"--{name}", type=probability, default=0.0, metavar="F", help=about)
    data = result.add_argument_group("data and files")
    if n_val is not None:
        data.add_argument("--n-val", type=positive_int, default=n_val, help="training examples held out for validation")
    data.add_argument("--limit", type=positive_int, help="train on the first N examples only, for trying out")
    data.add_argument("--out-dir", type=path, default=Path("./trained_models"), help="folder of checkpoints and logs")
    data.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out-dir, if there is one")
    data.add_argument("--log-interval", type=positive_int, default=100, help="steps between reports")
    data.add_argument(
        "--save-every", type=positive_float, default=10.0, metavar="MINUTES", help="save within an epoch, too"
    )
    chooser = argparse.ArgumentParser(add_help=False, exit_on_error=False)  # what -h shows depends on --preset, too
    chooser.add_argument("--preset")
    result.set_defaults(**(presets or {}).get(chooser.parse_known_args()[0].preset, {}))
    return result


def options(args: argparse.Namespace) -> "Options":
    """What `fit` is asked to do by the flags of `parser`."""
    from ..training import Options

    where = device(args)  # first of all, as it says which precision auto is
    return Options(
        epochs=args.epochs,
        batch_size=args.batch_size,
        approx_m=getattr(args, "approx_m", 0),  # a flag of the experiments with three modalities or more
        pairs_per_batch=_pairs_per_batch(args),
        seed=args.seed,
        select=args.select,
        precision=args.precision,
        compile=args.compile,
        sync_batchnorm=args.sync_batchnorm,
        resume=args.resume,
        log_interval=args.log_interval,
        save_every=args.save_every,
        out_dir=args.out_dir,
        device=where,
    )


def _pairs_per_batch(args: argparse.Namespace) -> int:
    """--pairs-per-batch; a third of the batch by default, if there are few pairs."""
    if args.pairs_per_batch is not None or not (args.n_paired or args.paired_fraction):
        return args.pairs_per_batch or 0
    return args.batch_size // 3


def supervised(args: argparse.Namespace, train: "Data", validation: "Data", names: Sequence[str]) -> list["Data"]:
    """Training and validation data with the pairs that --n-paired or --paired-fraction leaves, and none else.

    The pairs are shared out in proportion, so that validation knows no more labels than training does. They are spread
    evenly over the classes where a label is one of several classes. `names`: of the modalities, the image's first.

    Raises UsageError for fewer pairs than two or more than there are examples.
    """
    from ..supervision import keep_pairs

    total = len(train) + len(validation)
    n = args.n_paired or round(total * (args.paired_fraction or 0))
    if not n:
        return [train, validation]
    if n > total or n < 2:
        raise UsageError(f"`n_paired` is from 2 to {total}, the examples that train and validate, not {n}")
    held_out = min(max(1, round(n * len(validation) / total)), n - 1)
    parts = []
    for data, pairs, seed in ((train, n - held_out, args.seed), (validation, held_out, args.seed + 1)):
        labels = data.tensors.get("text")
        classes = labels if labels is not None and labels.dim() == 1 else None
        parts.append(keep_pairs(data, pairs, names, unpaired=args.unpaired, seed=seed, classes=classes))
    return parts


def beta_schedule(args: argparse.Namespace, *, first: bool = False) -> "Schedule":
    """β as --beta-hold and --annealing-epochs ask for; they count from the start of the first stage, if there is one.

    Set `first` to True for that stage.
    """
    from .. import schedules

    course = schedules.held(args.beta_hold, schedules.linear(args.annealing_epochs))
    return course if first else lambda t: course(t + args.images_first)


def lr_schedule(args: argparse.Namespace) -> "Schedule":
    """The factor of the rate that --lr-schedule and --warmup-epochs ask for."""
    from .. import schedules

    courses = {"constant": lambda epochs: schedules.constant(), "cosine": schedules.cosine, "late": schedules.late}
    return schedules.warmed_up(args.warmup_epochs, courses[args.lr_schedule](args.epochs))


def reconstruct(args: argparse.Namespace, groups: Mapping[str, Sequence[str]] | None = None) -> str | list[str]:
    """--reconstruct as the objective takes it; `groups` are names that stand for several modalities.

    Raises UsageError where given or all stands beside other names.
    """
    names = args.reconstruct
    if len(names) == 1 and names[0] in ("given", "all"):
        return names[0]
    if {"given", "all"} & set(names):
        raise UsageError(f"`reconstruct` takes given, all, or names of modalities, not {' '.join(names)}")
    return [one for name in names for one in (groups or {}).get(name, [name])]


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The flags as plain values, as a checkpoint records them. A schedule that ends with the run says so."""
    found = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if found.get("lr_schedule", "constant") != "constant":
        found["lr_schedule"] = f"{args.lr_schedule} over {args.epochs} epochs"
    return found | origin()


def recorded(settings: Mapping[str, Any], name: str, kind: type) -> Any:
    """What a checkpoint's settings have of train.py's `name`. Raises UserError if that isn't of type `kind`."""
    value = settings.get(name)
    if type(value) is not kind:
        recorded = f"train.py records one of type {kind.__name__}"
        raise UserError(f"the checkpoint's settings have {value!r:.60} for {name}, and {recorded}")
    return value
