"""Whether a run may write into a folder, and the state that it continues from."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from .. import cli
from ..errors import UsageError, UserError
from ..files import locked
from ..objective import Objective
from . import checkpoint
from .distributed import is_first

log = logging.getLogger(__name__)

MAY_CHANGE = {"init", "cuda", "threads", "workers", "log_interval", "save_every", "resume", "wait", "allow_missing"}
"""Fields of a Config that may differ when a run is resumed, as may folders; the data are compared by a checksum."""

DIVERGED = "diverged.txt"
"""The file that a run leaves if it diverged."""


def saved_state(config: Any, name: str) -> dict[str, Any] | None:
    """Return the content of the checkpoint that a run with this Config continues from; None for a new run.

    Raises UsageError if the folder holds a run and `resume` isn't set, or if that run has other settings or diverged;
    UserError if its checkpoint can't be read.
    """
    latest, best = config.out_dir / checkpoint.LATEST, config.out_dir / checkpoint.BEST
    diverged = config.out_dir / DIVERGED
    if config.resume and diverged.exists():
        raise UsageError(
            f"{diverged.read_text().strip()}: resuming would repeat it; start a new run from a checkpoint's weights "
            f"with --init CHECKPOINT, another --out-dir and a smaller --lr (delete {diverged} to resume anyway)"
        )
    if not latest.exists():
        # A kill may have come between the first epoch's two files: starting again yields the same model.
        if best.exists() and not (config.resume and checkpoint.load(best, name).get("epoch") == 1):
            raise UsageError(f"{best} would be overwritten: use another out_dir")
        return None
    if not config.resume:
        raise UsageError(f"{config.out_dir} holds a run: continue it with --resume, or use another --out-dir")
    saved = checkpoint.load(latest, name)
    if "kept" not in saved:  # a best model, or a state of an older version
        raise UsageError(f"{latest} has no state to resume from: start a new run with --init {latest}")
    _compare(saved, config, latest)
    return saved


def _compare(content: dict[str, Any], config: Any, path: Path) -> None:
    """Raise UsageError if the settings of the checkpoint at `path` aren't the Config's, field by field."""
    saved = content["settings"]
    now, defaults = cli.plain(config), cli.plain(type(config)())
    if unknown := sorted(saved.keys() - now.keys()):
        raise UsageError(f"{path} has settings that this version doesn't know: {', '.join(unknown)}")
    followed = {
        "other runs share it": now["wait"],
        f"its lr_schedule {now['lr_schedule']} ends with them": now["lr_schedule"] != "constant",
        "the labels of later rounds depend on them": now.get("rounds", 1) > 1,
    }
    if saved["epochs"] != now["epochs"] and any(followed.values()):
        why = next(reason for reason, holds in followed.items() if holds)
        raise UsageError(
            f"{path} is of a run of {saved['epochs']} epochs, not {now['epochs']}, and {why}: "
            f"to train longer, start a new run with --init {path} and another --out-dir"
        )
    compared = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in MAY_CHANGE | {"epochs"} and not field.name.endswith("_dir")
    ]
    pairs = {name: (saved.get(name, defaults[name]), now[name]) for name in compared}
    differ = [f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UsageError(
            f"{path} was made with other settings: {'; '.join(differ[:3])}{more}. "
            f"Resume with the flags of its command: {content['facts']['command']}"
        )


def facts_of(objective: Objective, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a checkpoint records in addition to the Config: the command, the objective's terms and weights, and
    the optimizer's options, which must be the same when a run is resumed."""
    varying = {"params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
    groups = [{name: value for name, value in group.items() if name not in varying} for group in optimizer.param_groups]
    return {
        **checkpoint.origin(),
        "objective_crc32": objective.checksum(),
        "optimizer": f"{type(optimizer).__name__} {groups}",
    }


@contextmanager
def only_writer(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, in the first process. If another run does: wait for it, or raise UsageError."""
    waiting = functools.partial(log.info, "waiting for another run, which is training in %s", folder)
    with ExitStack() as stack:
        if is_first():
            try:
                stack.enter_context(locked(folder / ".lock", waiting if wait else None))
            except BlockingIOError:
                raise UsageError(f"another run is writing to {folder}: use another out_dir") from None
            except OSError as error:
                raise UserError(f"can't write {folder}: {error.strerror or error}") from None
        yield
