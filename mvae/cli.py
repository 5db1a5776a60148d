"""The command line: flags from a dataclass, and errors of the user as one line on stderr.

    @dataclass(kw_only=True)
    class Config:
        model_path: Path  # checkpoint to load

        # Sampling
        n_samples: int = 64  # samples to draw

The comment behind a field is its help, a comment on its own line begins a group of flags, and a field without a
default is a positional argument. Presets are instances.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import io
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError, is_out_of_memory

SIGPIPE = 128 + 13
"""The exit status of a program that ends because nobody reads its output."""

C = TypeVar("C")


def parse(description: str | None, config: type[C] | Mapping[str, C], argv: Sequence[str] | None = None) -> C:
    """Return the Config that `argv` asks for, by default the script's arguments.

    `config` is a dataclass, or its presets by name: --preset picks one (default: the first), and other flags replace
    its fields. Exits with status 2 for a wrong flag; a Config may raise UsageError for a value.
    """
    argv = _joined(sys.argv[1:] if argv is None else argv)
    parser = _Parser(_name(), description=description, formatter_class=_Formatter, allow_abbrev=False)
    kind: Any = config
    defaults: Any = None
    if isinstance(config, Mapping):
        chooser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        chooser.add_argument("--preset", default=next(iter(config)))
        with contextlib.suppress(argparse.ArgumentError):  # reported below, with all the flags
            preset = chooser.parse_known_args(argv)[0].preset
            defaults = config.get(preset)
        kind = type(next(iter(config.values())))
        help_ = f"recipe that sets the defaults; `--preset NAME -h` shows its values (default: {next(iter(config))})"
        parser.add_argument("--preset", choices=list(config), help=help_)
    groups: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for group, name, help_ in documented(kind):
        field = next(field for field in dataclasses.fields(kind) if field.name == name)
        default = getattr(defaults, name) if defaults else field.default
        required = default is dataclasses.MISSING
        shown = "" if required else _shown(default)
        how = {"help": help_.replace("%", "%%") + shown, **_reader(hints[name])}
        if required:
            how.pop("metavar", None)  # its name says more
            parser.add_argument(name, **how)
            continue
        if default is True:
            how["action"] = argparse.BooleanOptionalAction
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    given.pop("preset", None)
    given = {name: tuple(value) if get_origin(_bare(hints[name])) is tuple else value for name, value in given.items()}
    return dataclasses.replace(defaults, **given) if defaults else kind(**given)


def documented(kind: type) -> list[tuple[str, str, str]]:
    """Return (group, name, help) of a dataclass's fields; help is empty without the source, as in a zip.

    Groups that only the class itself has come first, then those of its bases, in the order of the base furthest away.
    """
    groups: dict[str, list[tuple[str, str, str]]] = {}
    seen = set()
    for one in filter(dataclasses.is_dataclass, kind.__mro__):
        try:
            source = inspect.getsource(one)
        except (OSError, TypeError):
            source = "".join(f"    {name}: Any  # \n" for name in one.__annotations__)
        group = "options"
        for line in source.splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
                groups[group] = groups.pop(group, [])
            elif (field := re.match(r"    (\w+): [^#]*# ?(.*)", line)) and field[1] not in seen:
                seen.add(field[1])
                groups.setdefault(group, []).append((group, field[1], field[2]))
    if missing := {field.name for field in dataclasses.fields(kind)} - seen:
        raise TypeError(f"{kind.__name__}: no comment on the line of {', '.join(sorted(missing))}")
    return [entry for entries in groups.values() for entry in entries]


def plain(config: Any) -> dict[str, Any]:
    """Return a Config's fields as plain values, as JSON and checkpoints hold them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def run(main: Callable[[], None]) -> None:
    """Run a script's main and exit with its status.

    A UserError, a file that the system refuses and a lack of memory are one line on stderr, without a traceback.
    Characters that the terminal can't show are escaped, and a closed pipe ends the script with status 141. Of several
    processes only the first logs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _keep_freed_memory()
    logger = logging.getLogger("mvae")
    logger.handlers = [logging.NullHandler()]
    if os.environ.get("RANK", "0") == "0":
        info, warnings = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
        info.addFilter(lambda record: record.levelno < logging.WARNING)
        warnings.setLevel(logging.WARNING)
        logger.handlers = [info, warnings]
        logger.setLevel(logging.INFO)
        logging.raiseExceptions = False  # a line that can't be written would print a traceback
    status: Any = 0
    try:
        main()
    except SystemExit as end:  # argparse's, after -h or a wrong flag
        status = end.code
    except UserError as error:
        status = _failed(str(error), error.status)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = SIGPIPE
    except Exception as error:
        if is_out_of_memory(error):
            status = _failed("out of memory: use fewer examples or samples at a time (--batch-size, --n-samples)", 1)
        elif isinstance(error, OSError):
            file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            status = _failed(f"{file}{error.strerror or error}", 1)
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        # The pipe is closed, as after `head`, or the disk is full. Python would try again at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            status = status or _failed(f"can't write to stdout: {error.strerror}", 1)
        status = status or SIGPIPE
    sys.exit(status)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        words = ["[options]", *(action.dest for action in actions if not action.option_strings)]
        super().add_usage(f"%(prog)s {' '.join(words)}", actions, groups, prefix)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; -h shows all flags\n")


def _joined(words: Sequence[str]) -> list[str]:
    """Join a value that begins with a single dash, such as -Male, to its flag: argparse would take it for a flag."""
    found: list[str] = []
    for word in words:
        if re.match("-[^-]", word) and word != "-h" and found and re.fullmatch("--[^=]+", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _reader(hint: Any) -> dict[str, Any]:
    """Return how argparse reads a flag of this type."""
    hint = _bare(hint)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is list:  # repeated, with one value each
        return {**_reader(get_args(hint)[0]), "action": "append"}
    if get_origin(hint) is tuple:
        one, *others = get_args(hint)
        if others == [...]:
            return {**_reader(one), "nargs": "+"}
        return {**_reader(one), "nargs": 1 + len(others)}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": _path if hint is Path else hint, "metavar": {Path: "PATH", int: "N", float: "X"}.get(hint)}


def _bare(hint: Any) -> Any:
    """Return the type of `int | None` without None."""
    return get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(os.path.expanduser(text))  # Path's own raises for an unknown user


def _shown(default: Any) -> str:
    """Return what help adds about a default; nothing for None, False and ()."""
    if default is None or default is False or default == ():
        return ""
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks for reuse, up to a gigabyte, unless the user has set its variables.

    A step frees and allocates some large blocks. By default glibc returns many of them to the system, which hands out
    new pages filled with zeros: with large images this took up to a sixth of the time.
    """
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}:
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)  # its maximum; larger blocks are always the system's
        mallopt(trim_threshold, 2**30)


def _failed(message: str, status: int) -> int:
    """Print a line on stderr, if anybody reads it; return the status."""
    with contextlib.suppress(OSError):
        print(f"{_name()}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return status


def _name() -> str:
    """Return the script's name, as a user calls it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
