"""The processes of one run, as torchrun starts them."""

import atexit
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError, UserError
from ..model import has_fixed_shapes
from ..objective import Objective, Totals

T = TypeVar("T")
Forward = Callable[..., tuple[Tensor, Totals]]

CPU = torch.device("cpu")

VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets and a process group is made from."""


def is_first() -> bool:
    """Return whether this process is the first of its run, which writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def together() -> Iterator[None]:
    """Raise UserError instead of torch's error if another process is gone."""
    try:
        yield
    except RuntimeError as error:
        is_of_group = isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if not is_of_group:
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"another process of this run is gone or can't be reached ({reason}); the last saved state is kept"
        ) from None


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's `rank` among `world` processes that share every batch. One process needs no group.

    launcher: process id of the torchrun that started this one; None if another program did.
    """

    rank: int
    world: int
    launcher: int | None = None

    @classmethod
    def join(cls, device: torch.device) -> "Processes":
        """Join the group that torchrun's variables name. Raises UsageError if they don't name one.

        Several runs of one process, one after the other, share its group.
        """
        found = {name: os.environ.get(name, "(not set)") for name in VARIABLES}
        if (os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")) == ("1", "0"):
            return cls(0, 1)
        if not all(found[name].isdecimal() for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")):
            got = ", ".join(f"{name}={value}" for name, value in found.items())
            raise UsageError(
                f"{got}: these must be as torchrun sets them (under srun, start torchrun); for one process unset them"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not distributed.is_initialized():
            with together():
                distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(distributed.destroy_process_group)
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        return cls(distributed.get_rank(), distributed.get_world_size(), launcher)

    def abandoned(self) -> int:
        """Return SIGTERM if the torchrun that started this process was killed, and so can't send it; else 0."""
        return signal.SIGTERM if self.launcher and os.getppid() != self.launcher else 0

    def sum(self, sums: Tensor) -> Tensor:
        """Return the sums of all processes."""
        if self.world > 1:
            sums = sums.clone()
            distributed.all_reduce(sums)
        return sums

    def sum_in_first(self, sums: Tensor) -> Tensor:
        """Return the sums of all processes in the first one, and zeros in the others."""
        total = self.sum(sums)
        return total if self.rank == 0 else torch.zeros_like(total)

    def agree(self, *numbers: float) -> list[float]:
        """Return the largest that any process gives of each number; each waits until all have called.

        It is exchanged between the CPUs, so that no step waits for a device.
        """
        if self.world == 1:
            return list(numbers)
        # At least one number: an empty tensor isn't exchanged, and nobody would wait.
        found = torch.tensor([0.0, *numbers], dtype=torch.float64)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return found.tolist()[1:]

    def from_first(self, value: T) -> T:
        """Return what the first process gives."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values, src=0, device=CPU)
        return values[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's buffers, such as batch norm's running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)


def parallel(objective: Objective, present: Mapping[str, Tensor] | None, world: int, compiled: bool) -> Forward:
    """Return the objective as `world` processes share it, compiled if asked. present: the training data's masks.

    Raises UsageError if compiling needs a compiler that isn't there.
    """
    device = next(objective.parameters()).device
    forward: Forward = objective
    if world > 1:
        # A network has no gradient if a process's examples lack its modality, or no term uses it.
        lacking = present is not None and not compiled and not has_fixed_shapes(device)
        inputs = {name for term in objective.terms for name in term.inputs}
        outputs = {name for term in objective.terms for name in term.reconstructs}
        unused = set(objective.model.modalities) != inputs & outputs
        shared = DistributedDataParallel(
            objective, find_unused_parameters=lacking or unused, gradient_as_bucket_view=True
        )
        shared.broadcast_buffers = False  # at each step; only evaluation needs them. Newer torch warns of the argument
        forward = shared
    if compiled:
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if device.type == "cpu" and not shutil.which(compiler):
            raise UsageError(f"compile needs a C++ compiler ({compiler}): install one, set CXX, or omit --compile")
        forward = torch.compile(forward, mode="reduce-overhead" if device.type == "cuda" else None)
    return forward
