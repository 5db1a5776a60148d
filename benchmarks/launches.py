"""Count the tensor operations of a training step on a GPU, each a kernel launch or more. No GPU is needed.

The step runs on torch's meta device, whose tensors have shapes but no values: it takes the path of a GPU, and fails
where the host would wait for the device.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from mvae import Run, Training, cli

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import ROOT, about, write
from experiments import EXPERIMENTS, NAMES, build_model

META = torch.device("meta")
FREE = ("aten.empty", "aten.new_empty", "aten.scalar_tensor", "aten._unsafe_view", "profiler.")
"""Operations that launch no kernel, in addition to views."""


@dataclass(kw_only=True)
class Config:
    json: Path = ROOT / "results" / "launches.json"  # file to write


def main() -> None:
    config = cli.parse(__doc__, Config)
    rows = [{"experiment": name, **count(name)} for name in NAMES]
    write(config.json, {**about(), "rows": rows})


class Launches(TorchDispatchMode):
    """Counts operations."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += not function.is_view and not str(function).startswith(FREE)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let a Run train on the meta device, where the data can't be checked."""
    with (
        mock.patch.object(Training, "device", return_value=META),
        mock.patch.object(Run, "_on_device", lambda self, data, *_: data.to(META)),
        mock.patch("mvae.run.run.autocast", return_value=contextlib.nullcontext()),
    ):
        yield


def count(name: str) -> dict[str, int]:
    """Return the operations of a step by its parts: the batch, the objective with its gradient, the rest, AdamW."""
    experiment = EXPERIMENTS[name]
    with META:
        model = build_model(name, experiment.n_latents)
    objective = experiment.objective(model)
    optimizer = torch.optim.AdamW(objective.parameters())
    data = experiment.data()[: 2 * experiment.batch_size]
    with (
        on_meta(),
        tempfile.TemporaryDirectory() as folder,
        Run(name, objective, optimizer, Training(out_dir=Path(folder, "run"))) as run,
    ):
        run._forward = objective
        run.start = 1.0  # the first step's loss, which a run asks for
        next(run.epochs(1))
        batches = run.batches(data, experiment.batch_size)
        for _ in range(2):  # the first step has no sums to add to
            with Launches() as making:
                batch, present = next(batches)
            with Launches() as step:
                run.set(lr=experiment.lr, beta=1)
                arguments = batch, run.beta, run.random_subsets(experiment.approx_m), present
                loss, parts = run.objective(*arguments)
                run.backward(loss, parts)
            run.step()
            with Launches() as alone:
                loss, _ = objective(*arguments)
                loss.backward(loss.detach())
            optimizer.zero_grad()
    return {"batch": making.n, "objective": alone.n, "rest": step.n - alone.n, "optimizer": count_adamw(name)}


def count_adamw(name: str) -> int:
    """Return the operations of a step of fused AdamW, which the meta device lacks."""
    weights = [*build_model(name, EXPERIMENTS[name].n_latents).parameters()]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        with Launches() as found:
            optimizer.step()
    return found.n


if __name__ == "__main__":
    cli.run(main)
