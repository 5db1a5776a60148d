"""The flags of the scripts. A train.py has more, which `training` holds."""

import argparse
import functools
import os
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError
from .kinds import Controls, Picture, described_by, endpoint, values
from .types import (
    concurrency,
    csv_or_npz,
    host,
    output,
    path,
    positive_float,
    positive_int,
    seed_number,
    two_or_more,
    whole_number,
)

STEPS = 8
"""The rows of an interpolation, its two ends included."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of scripts that read data: --data-dir, --seed, --threads, --cuda. --help shows the defaults."""
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


def add_precision(result: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--precision, in which `device` puts what auto takes."""
    result.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="of the networks, the rest is fp32; auto: bf16 where there are instructions for it",
    )


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
    """A parser with the flags of scripts that take a trained model and read data."""
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
    result = Parser(description=description, formatter_class=_Formatter)
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
    add_precision(result)
    result.add_argument("--jobs", type=concurrency, default=1, help="processes that share the examples")
    result.add_argument("--json", type=output, metavar="FILE", help="write the numbers to this file, too")
    result.add_argument(
        "--per-example", type=csv_or_npz, metavar="FILE", help="write each example's log p to this .csv or .npz file"
    )
    return result


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and refuses to write a file that another flag names, too: one would be lost."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; -h shows all flags\n")

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
