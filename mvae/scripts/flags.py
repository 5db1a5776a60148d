"""The flags of the scripts, and what they ask for."""

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, UserError
from .kinds import Controls, Picture, described_by, endpoint, values
from .machine import device
from .running import origin
from .types import (
    concurrency,
    csv_or_npz,
    fraction,
    host,
    non_negative_float,
    non_negative_int,
    output,
    path,
    positive_float,
    positive_int,
    probability,
    seed_number,
    share,
    two_or_more,
    whole_number,
)

if TYPE_CHECKING:  # torch is imported where it's needed, so that -h doesn't wait for it
    from ..data import Data
    from ..schedules import Schedule
    from ..training import Options

STEPS = 8
"""The rows of an interpolation, its two ends included."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every script: --data-dir, --seed, --threads, --cuda. Defaults are shown in --help."""
    result = Parser(description=description, formatter_class=_Formatter)
    default = os.environ.get("MVAE_DATA_DIR") or "./data"
    result.add_argument(
        "--data-dir", type=path, default=default, help="folder of the data sets; $MVAE_DATA_DIR, else ./data"
    )
    result.add_argument("--seed", type=seed_number, default=0, help="of everything random")
    _add_machine_flags(result)
    return result


def _add_machine_flags(result: argparse.ArgumentParser) -> None:
    """--threads and --cuda, which `device` takes."""
    result.add_argument(
        "--threads", type=concurrency, help="of a CPU that compute together; $OMP_NUM_THREADS, else its cores up to 4"
    )
    result.add_argument("--cuda", action="store_true", help="use the first visible CUDA device")


def _add_precision(result: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--precision, in which `device` puts what auto takes."""
    result.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="of the networks, the rest is fp32; auto: bf16 where there are instructions for it",
    )


def training_parser(
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
    result = parser(description)
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
    _add_precision(optimisation)
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


def add_cache_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags --cache-dir and --workers of the scripts that read pictures; returns their group."""
    group = parser.add_argument_group("pictures")
    cache_dir = os.environ.get("MVAE_CACHE_DIR") or "./data/cache"
    group.add_argument(
        "--cache-dir",
        type=path,
        default=cache_dir,
        help="folder of the pictures decoded once; $MVAE_CACHE_DIR, else ./data/cache",
    )
    group.add_argument(
        "--workers", type=concurrency, default=os.cpu_count() or 1, help="processes that decode pictures"
    )
    return group


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every script that takes a trained model."""
    result = parser(description)
    _add_model_path(result)
    return result


def _add_model_path(result: argparse.ArgumentParser) -> None:
    result.add_argument("model_path", type=path, help="the checkpoint, such as ./trained_models/model_best.pth.tar")


def sampling_parser(description: str | None, controls: Controls) -> argparse.ArgumentParser:
    """The flags of a sample.py, but for its conditions; see `add_conditions`."""
    result = model_parser(description)
    result.add_argument("--n-samples", type=positive_int, help="samples to draw of each condition; 64, of several 8")
    result.add_argument("--out-dir", type=path, default=Path("."), help="folder to write into")
    result.add_argument(
        "--save",
        action="append",
        choices=["grid", "images", "npy"],
        help="a grid (the default), a folder of single pictures, or float arrays; may be repeated",
    )
    result.add_argument("--draw", action="store_true", help="draw from p(x | z), in place of its means")
    result.add_argument(
        "--temperature",
        type=positive_float,
        default=1.0,
        help="multiplies the variance of z, and with --draw divides the logits of x; below 1 it is more typical",
    )
    result.add_argument(
        "--interpolate",
        nargs=2,
        type=functools.partial(endpoint, controls),
        metavar=("A", "B"),
        help=f"{STEPS} conditions on the way from A to B, each [NAME=]VALUE, with NAME of {', '.join(controls)}",
    )
    return result


def add_conditions(parser: argparse.ArgumentParser, controls: Controls) -> None:
    """The flag --condition-on-NAME for each control; see `given`."""
    other = described_by(controls)
    for name, kind in controls.items():
        of_picture = isinstance(kind, Picture)
        metavar = f"{kind.metavar}|{controls[other].metavar}" if of_picture and other else kind.metavar
        what = f"a picture of your own, of any size; or a random held-out one of this {other}, chosen by --seed"
        parser.add_argument(
            f"--condition-on-{name}",
            action="extend",
            type=functools.partial(values, controls, name),
            metavar=metavar,
            help=(what if of_picture else kind.help) + "; may be repeated, and each is a row",
        )


def given(args: argparse.Namespace, controls: Controls) -> dict[str, list[Any]]:
    """The values that the flags --condition-on-NAME give, by control; a control without is left out."""
    found = {name: getattr(args, f"condition_on_{name}") for name in controls}
    return {name: values for name, values in found.items() if values is not None}


def embedding_parser(description: str | None, controls: Controls) -> argparse.ArgumentParser:
    """The flags of an embed.py."""
    result = model_parser(description)
    result.add_argument(
        "--given",
        nargs="+",
        action="extend",
        choices=list(controls),
        help=f"what the posterior is given; without this flag {next(iter(controls))}",
    )
    result.add_argument("--split", choices=["train", "validation", "test"], default="test", help="whose examples")
    result.add_argument("--limit", type=positive_int, help="the first N examples only")
    result.add_argument(
        "--files", nargs="+", action="extend", type=path, metavar="FILE", help="pictures, or folders of them, instead"
    )
    result.add_argument("--out", type=output, default=Path("latents.npz"), help="file to write")
    result.add_argument(
        "--plot", type=output, metavar="FILE", help="draw a map in two dimensions to this PNG file, too"
    )
    result.add_argument(
        "--map",
        choices=["pca", "tsne", "umap"],
        default="pca",
        help="how it is made: principal components, t-SNE (by scikit-learn), or UMAP (by umap-learn)",
    )
    result.add_argument("--colour-by", metavar="NAME", help="what the map's colours show: a label or an attribute")
    return result


def exploring_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of an explore.py."""
    result = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    _add_model_path(result)
    _add_machine_flags(result)
    result.add_argument(
        "--port", type=whole_number(0, 65535), default=8050, help="where the page is served; 0: a free one"
    )
    result.add_argument(
        "--host", type=host, default="127.0.0.1", help="the address; another one lets other machines in"
    )
    return result


def loglike_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of a loglike.py."""
    result = model_parser(description)
    result.add_argument("--n-samples", type=whole_number(2, 10**6), default=1000, help="importance samples per example")
    result.add_argument("--split", choices=["test", "validation"], default="test", help="whose examples")
    result.add_argument("--limit", type=two_or_more, help="the first N examples only")
    _add_precision(result)
    result.add_argument("--jobs", type=concurrency, default=1, help="processes that share the examples")
    result.add_argument("--json", type=output, metavar="FILE", help="write the numbers to this file, too")
    result.add_argument(
        "--per-example", type=csv_or_npz, metavar="FILE", help="write each example's log p to this .csv or .npz file"
    )
    return result


def options(args: argparse.Namespace) -> "Options":
    """What `fit` is asked to do by the flags of `training_parser`."""
    from ..training import Options

    where = device(args)  # first of all, as it says which precision auto is
    return Options(
        epochs=args.epochs,
        batch_size=args.batch_size,
        approx_m=getattr(args, "approx_m", 0),  # a flag of the experiments with three modalities or more
        pairs_per_batch=_pairs_per_batch(args),
        seed=args.seed,
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class Parser(argparse.ArgumentParser):
    """Refuses to write a file that another flag names, too: one of the two would be lost."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        found = super().parse_args(*args, **kwargs)
        read = [file for name in ("model_path", "files") for file in _listed(getattr(found, name, None))]
        named = {os.path.realpath(file) for file in read}
        for name in ("json", "per_example", "out", "plot"):
            for file in _listed(getattr(found, name, None)):
                if os.path.realpath(file) in named:
                    raise UsageError(f"`{name}` would write over {file}, which is named before: name another file")
                named.add(os.path.realpath(file))
        return found


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
