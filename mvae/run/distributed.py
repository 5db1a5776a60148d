"""The processes of one run, as torchrun starts them, and the signals that ask them to stop."""

import atexit
import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .errors import UsageError, UserError

T = TypeVar("T")

CPU = torch.device("cpu")

SIGPIPE = 13  # Windows has none

VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, of which a group is made."""

_lists = itertools.count()  # of those that processes share by `taken`


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's `rank` among `world` processes that share every batch. One process needs no group.

    launcher: the process id of the torchrun that started this one; None if another program did.
    """

    rank: int
    world: int
    launcher: int | None = None

    @classmethod
    def join(cls, device: torch.device) -> "Processes":
        """Joins the group that torchrun's variables name. Raises UsageError if they don't name one.

        Runs of a process one after the other share its group: to found another one would wait for what is gone.
        """
        found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if (found.get("WORLD_SIZE", "1"), found.get("RANK", "0")) == ("1", "0"):
            return cls(0, 1)
        numbers = {name: int(value) if value.isdecimal() else -1 for name, value in found.items()}
        good = (
            len(found) == len(VARIABLES)
            and 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]
            and 0 <= numbers["MASTER_PORT"] < 2**16
        )
        if not good:
            what = ", ".join(f"{name} is {found.get(name, 'not set')}" for name in VARIABLES)
            raise UsageError(
                f"{what}: torchrun sets them, to fit each other; for one process unset WORLD_SIZE and RANK"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not distributed.is_initialized():
            with _named_if_lost():
                distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(distributed.destroy_process_group)
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        return cls(distributed.get_rank(), distributed.get_world_size(), launcher)

    def abandoned(self) -> int:
        """SIGTERM if the torchrun that started this process was killed, and so can't send it; else 0."""
        return signal.SIGTERM if self.launcher and os.getppid() != self.launcher else 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises UserError in place of what torch raises where another process is gone."""
        if self.world == 1:
            yield
            return
        with _named_if_lost():
            yield

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of all processes."""
        if self.world > 1:
            sums = sums.clone()
            distributed.all_reduce(sums)
        return sums

    def sum_in_first(self, sums: Tensor) -> Tensor:
        """The sums of all processes in the first one, and zeros in the others."""
        total = self.sum(sums)
        return total if self.rank == 0 else torch.zeros_like(total)

    def agree(self, *numbers: float) -> list[float]:
        """The largest that any process gives of each number; no process goes on before all have asked.

        It is exchanged between the CPUs, so that no step waits for a device.
        """
        if self.world == 1:
            return list(numbers)
        # At least one number: an empty tensor isn't exchanged, and nobody would wait.
        found = torch.tensor([0.0, *numbers], dtype=torch.float64)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return found.tolist()[1:]

    def from_first(self, value: T) -> T:
        """What the first process gives."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values, src=0, device=CPU)
        return values[0]

    def taken(self, items: Iterable[T]) -> Iterator[T]:
        """Of items that all processes go through, those that this one takes: the next one whenever it is free."""
        if self.world == 1:
            yield from items
            return
        counter, store = f"mvae {next(_lists)}", distributed.distributed_c10d._get_default_store()
        mine = store.add(counter, 1) - 1
        for i, item in enumerate(items):
            if i == mine:
                yield item
                mine = store.add(counter, 1) - 1

    def share_buffers(self, module: nn.Module) -> None:
        """Gives all processes the first one's buffers, such as batch norm's running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)


class _SumOfAll(torch.autograd.Function):
    """The sum of all processes' tensors. Each process's loss depends on each one's tensor: gradients add up, too."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOfAll.forward(ctx, gradient)


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm that takes its statistics in training over the rows of all processes: as one with all rows does."""

    @classmethod
    def become(cls, module: nn.Module) -> None:
        """Makes each batch norm in `module` one of these, with the weights and statistics that it has."""
        for one in module.modules():
            if isinstance(one, nn.modules.batchnorm._BatchNorm):
                one.__class__ = cls

    def _check_input_dim(self, x: Tensor) -> None:
        """Any with channels in dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        values = x if x.dtype == torch.float64 else x.float()
        n = values.new_tensor([x.numel() / x.shape[1]])
        # Means first, and then squares about them: the difference of large squares would be rounded.
        sums = _SumOfAll.apply(torch.cat([values.sum(dims), n]))
        n = sums[-1]
        mean = sums[:-1] / n
        centred = values - mean.view(shape)
        variance = _SumOfAll.apply(centred.square().sum(dims)) / n
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), rate)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)


@contextmanager
def _named_if_lost() -> Iterator[None]:
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


@dataclasses.dataclass
class Caught:
    """The signal that asks the run to stop, 0 before there is one. While `held`, no signal ends the process."""

    number: int = 0
    held: bool = False

    def say(self, line: str) -> None:
        """Prints a line. If nobody can read it, as when `head` has left, that asks the run to stop, as SIGPIPE does."""
        try:
            print(line, flush=True)
        except OSError:
            self.number = self.number or SIGPIPE

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within it no signal ends the process."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before


@contextmanager
def signals(*, held: bool = False) -> Iterator[Caught]:
    """Catches SIGINT, SIGTERM and a terminal's SIGHUP. A second SIGINT, more than a second later, ends the process.

    Within that second it is the same request: `timeout` sends its signal to the process, and then to its group.
    Nothing is caught outside of the main thread, where Python handles no signals.
    """
    caught = Caught(held=held)
    asked_at = 0.0

    def catch(number: int, frame: Any) -> None:
        nonlocal asked_at
        if not caught.number:
            caught.number, asked_at = number, time.monotonic()
        elif number == signal.SIGINT and not caught.held and time.monotonic() - asked_at > 1:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # as nohup sets it
                previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
