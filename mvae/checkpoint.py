"""Checkpoints: one file of tensors and plain values, written atomically and read without running anything in it."""

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import write_atomically
from .model import MVAE

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
TRAINED = ("settings", "epoch", "validation_loss", "training_seconds")
FORMAT = "mvae checkpoint 2"


def save(path: Path, experiment: str, content: dict[str, Any]) -> None:
    """Saves tensors and plain values as `experiment`'s checkpoint. Raises UserError as `write_atomically` does."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "experiment": experiment, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, experiment: str) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU.

    Raises UserError, naming the file, if it is absent, truncated, holds anything but tensors and plain values (nothing
    of it is run), or belongs to another program or experiment.
    """
    try:
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
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        if str(found).startswith("mvae checkpoint "):
            raise UserError(f"{path} has the format '{found}', and this version reads '{FORMAT}': train it again")
        raise UserError(f"{path} is not a checkpoint written by this program (it lacks the mark '{FORMAT}')")
    if content.get("experiment") != experiment:
        raise UserError(f"{path} is a checkpoint of {content.get('experiment')}, not of {experiment}")
    return content


def load_model(
    path: Path, experiment: str, build: Callable[[int], MVAE], device: torch.device
) -> tuple[MVAE, dict[str, Any]]:
    """Rebuilds the model from its file: `build(n_latents)` with the saved weights, in evaluation mode on `device`.

    Returns the model and what the file says of its training: `settings` (the flags), and of a best model `epoch`,
    `validation_loss` and `training_seconds`. Raises UserError as `load` does, and if the weights don't fit the network.
    """
    content = load(path, experiment)
    try:
        model = build(content["n_latents"])
        model.load_state_dict(content["model"])
        content["settings"]
    except (KeyError, RuntimeError, TypeError):
        raise UserError(f"{path} holds weights that don't fit the networks of {experiment}/model.py") from None
    trained = {name: value for name, value in content.items() if name in TRAINED}
    return model.to(device).eval(), trained
