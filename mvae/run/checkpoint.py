"""Checkpoints: one file of tensors and plain values, written atomically, read without running anything in it.

A file is believed when its content has the digest that stands beside it; whoever takes something of it then checks by
`check` that it is what the networks or the optimiser at hand take.
"""

import copy
import hashlib
import io
import json
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import UserError
from .files import write_atomically
from .model import MVAE

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
TRAINED = {"settings": dict, "epoch": int, "validation_loss": float, "training_seconds": float}
"""What a best model's checkpoint says of its training."""
FORMAT = "mvae checkpoint 3"


def save(path: Path, experiment: str, content: dict[str, Any]) -> None:
    """Saves tensors and plain values, as `digest` takes them, as `experiment`'s checkpoint.

    Raises UserError for anything else, and as `write_atomically` does.
    """
    content = {"format": FORMAT, "experiment": experiment, **content}
    buffer = io.BytesIO()
    try:
        torch.save({**content, "digest": digest(content)}, buffer)
    except ValueError as error:
        raise UserError(f"can't write {path}, which holds tensors and plain values alone: {error}") from None
    write_atomically(path, buffer.getvalue())


def load(path: Path | str, experiment: str) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU.

    Raises UserError, naming the file, if it is absent, truncated or damaged, holds anything but tensors and plain
    values (nothing of it is run), or belongs to another program or experiment.
    """
    import zipfile  # not before it is needed: that takes a while

    path = Path(path)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > size:
                raise zipfile.BadZipFile("it would be unpacked to more than was written")
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train.py writes one") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is no checkpoint of tensors and plain values alone") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None
    except Exception:  # torch.load fails in many ways on a damaged file; each means the same to the user
        raise UserError(f"{path} is no checkpoint, or a truncated or damaged one") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        if str(found).startswith("mvae checkpoint "):
            remedy = "train it again, or use the version that wrote it"
            raise UserError(f"{path} has the format {str(found)!r:.40}, and this version reads '{FORMAT}': {remedy}")
        raise UserError(f"{path} is not a checkpoint written by this program (it lacks the mark '{FORMAT}')")
    try:
        sound = content.pop("digest", None) == digest(content, size)
    except Exception:  # such as a tensor without values
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: its content isn't what was written (the digest is wrong)")
    if content["experiment"] != experiment:
        raise UserError(f"{path} is a checkpoint of {str(content['experiment'])!r:.40}, not of {experiment!r}")
    return content


def digest(content: Any, most: float = math.inf) -> str:
    """SHA-256 of tensors and plain values, and of dicts, lists and tuples of them.

    Raises ValueError for anything else, for more than `most` values, and for a tensor of more than `most` bytes.
    """
    found, left, n = hashlib.sha256(), [content], 0
    while left:
        value = left.pop()
        n += 1
        if n > most or (isinstance(value, Tensor) and value.nbytes > most):
            raise ValueError(f"there is more in it than {most} bytes can hold")
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif type(value) in (dict, OrderedDict):
            found.update(f"dict {len(value)}\n".encode())
            left += [*value.values(), *value]
        elif type(value) in (list, tuple):
            found.update(f"{type(value).__name__} {len(value)}\n".encode())
            left += value
        elif type(value) in (bool, int, float, str, type(None)):
            found.update(f"{value!r}\n".encode())
        else:
            raise ValueError(f"a {type(value).__name__} is no plain value")
    return found.hexdigest()


def check(name: str, found: Any, wanted: Any) -> None:
    """Raises ValueError, naming the part of `found`, unless it is such as `wanted`.

    Args:
        wanted: a type, object for anything, or an example. An example stands for what has its type; of a tensor, its
            shape, and no NaN; of a dict, its keys and such values; of a list, its length and such values. In a dict the
            key `...` stands for any further keys, and [x, ...] is any number of values such as x.
    """
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in wanted:
            if key not in found and key is not ...:
                raise ValueError(f"{name} lacks {key!r:.60}")
        for key, value in found.items():
            if key not in wanted and ... not in wanted:
                raise ValueError(f"{name} has an unknown {key!r:.60}")
            check(f"{name}.{key}", value, wanted[key if key in wanted else ...])
    elif isinstance(wanted, list) and isinstance(found, list):
        examples = wanted[:1] * len(found) if wanted and wanted[-1] is ... else wanted
        if len(found) != len(examples):
            raise ValueError(f"{name} has {len(found)} values, and {len(examples)} are wanted")
        for i, value in enumerate(found):
            check(f"{name}[{i}]", value, examples[i])
    elif wanted is not object and _kind(found) != _kind(wanted):
        raise ValueError(f"{name} is {_kind(found)}, and {_kind(wanted)} is wanted")
    elif isinstance(found, Tensor) and found.isnan().any():
        raise ValueError(f"{name} is not a number in places")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "dict"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_plain(name: str, found: Any) -> None:
    """Raises ValueError unless `found` is a dict of plain values by name, as JSON can hold it."""
    check(name, found, dict)
    for key in found:
        check(f"the name {key!r:.60} in {name}", key, str)
    try:
        digest(found)
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} isn't of plain values: {error}") from None


def check_weights(found: Any, network: nn.Module) -> None:
    """Raises ValueError, naming the part, unless `found` is a state_dict of such a network, its weights finite."""
    check("model", found, network.state_dict())
    for name, _ in network.named_parameters():
        if not found[name].isfinite().all():
            raise ValueError(f"model.{name} isn't finite")


def check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError, naming the part, unless `found` is a state_dict that such an optimiser of such weights makes.

    Of the values in its groups that says nothing.
    """
    groups = optimizer.state_dict()["param_groups"]
    any_of_these = [{"params": group["params"], ...: object} for group in groups]
    check("optimizer", found, {"state": dict, "param_groups": any_of_these})
    if [group["params"] for group in found["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("optimizer.param_groups has the weights in another order")
    stepped, state = _after_a_step(optimizer), found["state"]
    if stepped and not state:
        raise ValueError("optimizer.state is empty")
    if stepped is not None:  # a weight that was in no loss so far has no state
        check("optimizer.state", state, {weight: stepped[weight] for weight in stepped if weight in state})


def _after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, Any] | None:
    """The state that such an optimiser has after a step, by weight; None if that can't be known."""
    try:
        twin = copy.deepcopy(optimizer)
        for group in twin.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        twin.step()
        return dict(twin.state_dict()["state"])
    except Exception:  # one that isn't torch's may not be made to be copied
        return None


def load_model(
    path: Path | str, experiment: str, build: Callable[[int], MVAE], device: torch.device
) -> tuple[MVAE, dict[str, Any]]:
    """Rebuilds the model from its file: `build(n_latents)` with the saved weights, in evaluation mode on `device`.

    Returns the model and what the file says of its training: `settings` (the flags), `epoch`, `validation_loss` and
    `training_seconds`. A state within an epoch has no such loss and time, and `epoch` is the one that isn't done.
    Raises UserError as `load` does, and if the weights don't fit the network.
    """
    content = load(path, experiment)
    try:
        check("it", content, {"settings": dict, "n_latents": int, "model": dict, ...: object})
        content |= _last_epoch(content)
        trained = {name: content[name] for name in TRAINED if name in content}
        check_plain("settings", content["settings"])
        check("it", trained, {name: TRAINED[name] for name in trained})
        numbers = [content.get(name, 1) for name in ("epoch", "validation_loss", "training_seconds")]
        if numbers[0] < 1 or not all(abs(number) < math.inf for number in numbers):
            raise ValueError("its epoch, validation_loss or training_seconds can't be")
        check_weights(content["model"], outline(build, content["n_latents"]))
        model = build(content["n_latents"])
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, ValueError, UserError) as error:
        reason = str(error).split("\n")[0]
        what = f"holds weights that don't fit the networks of {experiment}/model.py"
        raise UserError(f"{path} {what}: {reason}") from None
    return model.to(device).eval(), trained


def _last_epoch(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `TRAINED` names, of a latest state that was saved between two epochs; nothing of any other checkpoint.

    Raises ValueError if its history is damaged.
    """
    if not content.get("history") or content.get("step"):
        return {}
    record = {"epoch": int, "validation/loss": float, "seconds": float, ...: object}
    check("its history", content["history"], [record, ...])
    last = content["history"][-1]
    seconds = sum(record["seconds"] for record in content["history"])
    return {"epoch": last["epoch"], "validation_loss": last["validation/loss"], "training_seconds": seconds}


def outline(build: Callable[[int], MVAE], n_latents: int) -> MVAE:
    """The model without values, which takes no memory whatever its size."""
    try:
        with torch.device("meta"), _Undrawn():
            return build(n_latents)
    except Exception:  # such as networks whose making reads a value
        return build(n_latents)


class _Undrawn(TorchFunctionMode):
    """Leaves out drawing from a normal distribution: torch loads its compiler to do so without values, for seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})
