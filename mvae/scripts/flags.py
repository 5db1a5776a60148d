"""What the scripts share: flags, the device, and errors of one line."""

import argparse
import contextlib
import functools
import io
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from ..errors import UsageError, UserError, is_out_of_memory
from ..files import check_writable
from .kinds import Controls, Picture, described_by, endpoint, values

if TYPE_CHECKING:  # torch is imported where it's needed, so that -h doesn't wait for it
    import torch

    from ..data import Data
    from ..processes import Processes
    from ..schedules import Schedule
    from ..training import Options

log = logging.getLogger(__name__)

T = TypeVar("T")

STEPS = 8
"""The rows of an interpolation, its two ends included."""


SMALLER = {
    "train.py": "--batch-size, --iw-samples or --n-latents",
    "sample.py": "--n-samples",
    "loglike.py": "--n-samples",
    "transform.py": "--n-samples",
    "embed.py": "--limit",
    "setup.py": "--workers",
    "datasets.py": "--workers, or the examples of what is made",
}
"""By script, the flags that lower what memory it takes."""


def run(main: Callable[[], None]) -> None:
    """Runs a script, and exits with its status: what a user can mend becomes one line on stderr, without a traceback.

    That is a UserError, whose parameters in backticks are printed as flags; a file or a folder that the system refuses;
    and memory that doesn't suffice. Output that the terminal can't show is escaped, and output that nobody reads ends
    the script as SIGPIPE does. What the package logs is printed, too: warnings on stderr, the rest on stdout. Of
    several processes the first alone prints it.
    """
    _open_streams()
    if is_first():
        said, warned = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
        said.addFilter(_is_no_warning)
        warned.setLevel(logging.WARNING)
        logger = logging.getLogger("mvae")
        logger.handlers = [said, warned]
        logger.setLevel(logging.INFO)
        logging.raiseExceptions = False  # else a line that can't be written is a traceback
    status: Any = 0
    try:
        main()
    except SystemExit as end:  # argparse's, after -h or a wrong flag
        status = end.code
    except UserError as error:
        message = re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", str(error))
        status = _ended(message, error.status)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = SIGPIPE
    except Exception as error:
        if is_out_of_memory(error):
            status = _ended(f"the memory doesn't suffice: lower {SMALLER.get(_name(), 'what it is to hold')}", 1)
        elif isinstance(error, OSError):
            what = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            status = _ended(f"{what}{error.strerror or error}", 1)
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        # Nobody reads the output, as after `head`, or it has no room. What is left of it mustn't be tried at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            status = status or _ended(f"can't write what it prints: {error.strerror}", 1)
        status = status or SIGPIPE
    sys.exit(status)


SIGPIPE = 128 + 13
"""The status of a program that ends because nobody reads its output."""


def _open_streams() -> None:
    """Gives the script streams that take any text. One that was closed (`>&-`) leads nowhere.

    Else a file that the script opens would take its number, and whatever writes to that stream would write into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended(message: str, status: int) -> int:
    """Prints a line on stderr, if there is somebody to read it; gives the status."""
    with contextlib.suppress(OSError):
        print(f"{_name()}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return status


def _name() -> str:
    """The script's name, as a user calls it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    return f"python -m {module.parent}" if module and module.name.endswith(".__main__") else Path(sys.argv[0]).name


def is_first() -> bool:
    """Whether this process is the one that speaks for those of a run."""
    return os.environ.get("RANK", "0") == "0"


def _is_no_warning(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


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
        help="importance samples of each term: its bound is the IWAE's",
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
    """The flags --cache-dir and --workers of the scripts that read pictures, in a group of their own."""
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


def origin() -> dict[str, str | None]:
    """The command that runs, named from the repository's root, and its commit: None if git doesn't tell."""
    root = Path(__file__).resolve().parents[2]
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    commit = None
    with contextlib.suppress(OSError):  # there may be no git
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() if found.returncode == 0 else None
    return {"command": shlex.join(["python", str(name), *sys.argv[1:]]), "commit": commit}


def device(args: argparse.Namespace) -> "torch.device":
    """Has torch compute with --threads, and gives the device asked for.

    Afterwards `args.threads` says how many there are, and `args.precision` what auto takes, which a line says, too.
    Without a CUDA device --cuda warns in one line, and the CPU does the work.
    """
    import torch

    usual = torch.get_num_threads()  # OMP_NUM_THREADS, else all cores: too many for networks of a hundred examples
    shared = max(1, min(usual, 4) // getattr(args, "jobs", 1))
    args.threads = args.threads or (usual if "OMP_NUM_THREADS" in os.environ else shared)
    torch.set_num_threads(args.threads)
    found = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        found = cuda_device(os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count())
    elif args.cuda:
        log.warning("--cuda: this machine has no CUDA device that torch can use; going on with the CPU")
    if getattr(args, "precision", None) == "auto":
        having = _bf16_instructions(found)
        args.precision = "bf16" if having else "fp32"
        if is_first():
            print(f"--precision auto: {args.precision}, as this processor has {having or 'no instructions for bf16'}")
    return found


def _bf16_instructions(device: "torch.device") -> str:
    """The names of the processor's instructions for bf16; empty if it has none, or if nothing tells."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ""
    return " and ".join(sorted({"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.intersection(words)))


@contextmanager
def processes(args: argparse.Namespace, device: "torch.device") -> "Iterator[Processes]":
    """The processes that share the work: torchrun's, or --jobs of them. The others run the same command beside this."""
    from ..processes import Processes

    children = []
    if args.jobs > 1 and "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.update(group, WORLD_SIZE=str(args.jobs))
        for rank in map(str, range(1, args.jobs)):
            environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, *sys.argv]
            children.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        os.environ["RANK"] = "0"
    try:
        found = Processes.join(device)
        with found.together():
            yield found
    finally:
        for child in children:
            child.terminate()
            child.wait()


def cuda_device(local_rank: str, n: int) -> "torch.device":
    """The CUDA device of a process, of `n`; torchrun gives each its LOCAL_RANK. Raises UsageError if there is none."""
    import torch

    if not local_rank.isdecimal():
        raise UsageError(f"LOCAL_RANK is {local_rank!r}, and torchrun sets it to a number: unset it for one process")
    if int(local_rank) >= n:
        raise UsageError(f"LOCAL_RANK is {local_rank}, and there are {n} CUDA devices: have at most as many processes")
    return torch.device("cuda", int(local_rank))


def progress(items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar where stderr is a terminal; `total` is their number if they have no length."""
    return tqdm(items, total=total, leave=False, disable=not sys.stderr.isatty())


# The types of flags.


def path(text: str) -> Path:
    """A file or a folder; ~ is the user's home."""
    try:
        text.encode()
        found = Path(text).expanduser()
    except UnicodeEncodeError:  # torch and TensorBoard don't take such names
        raise argparse.ArgumentTypeError(f"the name {text!r} is not UTF-8") from None
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such home") from None
    if not text:
        raise argparse.ArgumentTypeError("'' names no file or folder")
    return found


def output(text: str) -> Path:
    """A file to write. One that can't be written is known before the work and not after it: raises UserError."""
    found = path(text)
    check_writable(found)
    return found


def csv_or_npz(text: str) -> Path:
    if not text.endswith((".csv", ".npz")):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .csv nor in .npz")
    return output(text)


def _number(kind: type, allowed: Callable, wanted: str, text: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")
    return value


def host(text: str) -> str:
    if not text:  # to a socket that is any address: the page would be open to other machines
        raise argparse.ArgumentTypeError("'' is no address")
    return text


MOST = 10**9
"""The largest number of anything that is counted: a larger one isn't meant."""


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of whole numbers from `least` to `most`."""
    return functools.partial(_number, int, lambda value: least <= value <= most, f"whole number from {least} to {most}")


positive_int, non_negative_int, two_or_more = whole_number(1), whole_number(0), whole_number(2)
seed_number = whole_number(0, 2**63 - 1)
concurrency = whole_number(1, 1024)
"""Threads, or processes."""


def real_number(least: float, most: float, wanted: str) -> Callable[[str], float]:
    return functools.partial(_number, float, lambda value: least <= value <= most, wanted)


LARGEST = 1e30
"""Of real numbers: float32 ends at 3e38, and begins at 1e-38."""

positive_float = real_number(1 / LARGEST, LARGEST, f"number above 0, from {1 / LARGEST:g} to {LARGEST:g}")
non_negative_float = real_number(0, LARGEST, f"number from 0 to {LARGEST:g}")
share = real_number(0, 1, "number from 0 to 1")
fraction = real_number(1 / LARGEST, 1, "number above 0, and 1 at most")
probability = real_number(0, 1 - 1e-9, "number from 0 to below 1")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class Parser(argparse.ArgumentParser):
    """Refuses to write a file that another flag names, too: one of the two would be lost."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        found = super().parse_args(*args, **kwargs)
        read = [path for name in ("model_path", "files") for path in _listed(getattr(found, name, None))]
        named = {os.path.realpath(path) for path in read}
        for name in ("json", "per_example", "out", "plot"):
            for path in _listed(getattr(found, name, None)):
                if os.path.realpath(path) in named:
                    raise UsageError(f"`{name}` would write over {path}, which is named before: name another file")
                named.add(os.path.realpath(path))
        return found


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
