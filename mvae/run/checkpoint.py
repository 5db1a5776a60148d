"""Checkpoints: one file of tensors and plain values, written atomically and read without running any code in it.

A file is trusted if its content has the digest that is stored with it.
"""

import copy
import functools
import hashlib
import io
import shlex
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_atomically
from ..model import MVAE

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
FORMAT = "mvae checkpoint 3"
ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, experiment: str, content: dict[str, Any]) -> None:
    """Save tensors and plain values, nested in dicts, lists and tuples. Raises UserError for anything else, or if the
    file can't be written."""
    content = {"format": FORMAT, "experiment": experiment, **content}
    buffer = io.BytesIO()
    try:
        torch.save({**content, "digest": digest(content)}, buffer)
    except ValueError as error:
        raise UserError(f"can't write {path}: a checkpoint holds tensors and plain values only, but {error}") from None
    write_atomically(path, buffer.getvalue())


def load(path: Path | str, experiment: str) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU.

    Raises UserError, naming the file, if it is missing, damaged, holds anything but tensors and plain values (none of
    it is run), or belongs to another program or experiment.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says it in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train.py writes one") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    except Exception:  # torch.load fails in many ways on a damaged file; each means the same to the user
        raise UserError(f"{path} is not a checkpoint, or is damaged") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {str(found)!r:.40}, expected {FORMAT!r}: not written by this version")
    try:
        sound = content.pop("digest", None) == digest(content)
    except Exception:  # such as of a value of another type
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: its digest is wrong")
    if content["experiment"] != experiment:
        raise UserError(f"{path} is a checkpoint of {str(content['experiment'])!r:.40}, not of {experiment!r}")
    return content


def digest(content: Any) -> str:
    """Return the SHA-256 of tensors and plain values, and of dicts, lists and tuples. Raises ValueError for others."""
    found, left = hashlib.sha256(), [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif type(value) in (dict, OrderedDict, Counter):
            found.update(f"dict {len(value)}\n".encode())
            left += [*value.values(), *value]
        elif type(value) in (list, tuple):
            found.update(f"{type(value).__name__} {len(value)}\n".encode())
            left += value
        elif type(value) in (bool, int, float, str, type(None)):
            found.update(f"{value!r}\n".encode())
        else:
            raise ValueError(f"got a {type(value).__name__}")
    return found.hexdigest()


def load_model(
    path: Path | str, experiment: str, build: Callable[[int], MVAE], device: torch.device | str = "cpu"
) -> tuple[MVAE, dict[str, Any]]:
    """Rebuild the model of a checkpoint: `build(n_latents)` with its weights, in evaluation mode on `device`.

    Its weights require no gradients; to train from a checkpoint's weights, see `initialised`.

    Returns the model and what the file says of its training: `settings` (the flags), `epoch`, `validation_loss` and
    `training_seconds`; of a state within an epoch, `settings` and that `epoch`. Raises UserError as `load` does, and if
    the weights don't fit the networks.
    """
    content = load(path, experiment)
    try:
        model = build(content["n_latents"])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} doesn't fit the networks of {experiment}/model.py: {error}") from None
    set_weights(model, content, path)
    if content.get("history") and not content["done"]:  # the latest state, between two epochs
        last = content["history"][-1]
        seconds = sum(record["seconds"] for record in content["history"])
        content |= {"epoch": last["epoch"], "validation_loss": last["validation/loss"], "training_seconds": seconds}
    content["settings"] = {**content.get("facts", {}), **content["settings"]}
    names = ("settings", "epoch", "validation_loss", "training_seconds")
    return model.to(device).eval().requires_grad_(False), {name: content[name] for name in names if name in content}


def set_weights(model: MVAE, content: Mapping[str, Any], path: Path | str) -> None:
    """Give the model the weights of a checkpoint's content. Raises UserError, naming the parts that don't fit."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        parts = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
        more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
        raise UserError(f"the weights of {path} don't fit this model: {'; '.join(parts[:3])}{more}") from None


def initialised(model: MVAE, path: Path | None, experiment: str) -> MVAE:
    """Return the model with the weights of a checkpoint, if a path is given. Errors: see `load` and `set_weights`."""
    if path:
        set_weights(model, load(path, experiment), path)
    return model


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Raise UserError unless `saved` has the shapes of such an optimizer's state: torch's fused kernels don't check."""
    groups = optimizer.state_dict()["param_groups"]
    fits = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in groups]
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    twin.step()
    expected = twin.state_dict()["state"]
    for weight, state in saved["state"].items():  # a weight that was in no loss so far has none
        fits = fits and _shapes(state) == _shapes(expected.get(weight, {}))
    if not fits:
        raise UserError(f"the optimizer's state in {path} doesn't fit this optimizer and its weights")


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) if isinstance(value, Tensor) else None for name, value in state.items()}


@functools.cache  # the repository may change while a run goes on
def origin() -> dict[str, str | None]:
    """Return the command that runs, as from the repository's root, and the commit that it began with."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    found = {"command": shlex.join(["python", str(name), *sys.argv[1:]]), "commit": None}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return found
    return {**found, "commit": git.stdout.strip() if git.returncode == 0 else None}
