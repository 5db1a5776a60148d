"""A script's run: its streams, its status, its log, and what it says of errors."""

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import UserError, is_out_of_memory

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
    commit()  # a run takes hours, and the repository may go on meanwhile
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


ROOT = Path(__file__).resolve().parents[2]
"""The repository's."""


@functools.cache
def commit() -> str | None:
    """The repository's commit when this was first asked; None if git doesn't tell."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def origin() -> dict[str, str | None]:
    """The command that runs, named from the repository's root, and the commit that it began with."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {"command": shlex.join(["python", str(name), *sys.argv[1:]]), "commit": commit()}


T = TypeVar("T")


def progress(items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar where stderr is a terminal; `total` is their number if they have no length."""
    return tqdm(items, total=total, leave=False, disable=not sys.stderr.isatty())
