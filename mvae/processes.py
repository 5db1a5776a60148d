"""The processes of one run, as torchrun starts them, and the signals that ask them to stop."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's `rank` among `world` processes that share every batch. One process needs no group."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, batch_size: int, device: torch.device) -> "Processes":
        """Joins the group that torchrun's variables name. Raises UsageError if they can't share a batch evenly."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls(0, 1, device)
        if batch_size % world:
            raise UsageError(f"`batch_size` {batch_size} can't be shared evenly by {world} processes")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), world, device)

    def leave(self) -> None:
        if self.world > 1:
            distributed.destroy_process_group()

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of all processes."""
        if self.world > 1:
            sums = sums.clone()
            distributed.all_reduce(sums)
        return sums

    def agree_to_stop(self, caught: list[int], *, ask: bool) -> bool:
        """True if the run is to stop here: a signal was caught, by this process or, when they `ask`, by another.

        Several processes stop only when they ask each other, so that all of them stop at the same step.
        """
        if self.world > 1:
            if not ask:
                return False
            flag = torch.tensor(float(caught[0] if caught else 0), device=self.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            if flag and not caught:
                caught.append(int(flag))
        return bool(caught)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list. The same signal again, more than a second later, ends the process.

    Within that second it is the same request: `timeout` sends its signal to the process, and then to its group. In a
    thread other than the main one there are no signals to collect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    caught: list[int] = []
    first: dict[int, float] = {}

    def catch(number: int, frame: Any) -> None:
        if time.monotonic() - first.setdefault(number, time.monotonic()) > 1:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        caught.append(number)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
