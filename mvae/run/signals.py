"""The signals that ask a run to stop."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGPIPE = 13  # Windows has none
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Ctrl-C, `kill`, a closed terminal, and the warnings of batch systems such as Slurm."""


@dataclasses.dataclass
class Caught:
    """The signal that asks the run to stop, 0 before there is one. While `held`, no signal ends the process."""

    number: int = 0
    held: bool = False

    def say(self, line: str) -> None:
        """Print a line. If the pipe is closed, as after `head`, that asks the run to stop, as SIGPIPE does."""
        try:
            print(line, flush=True)
        except OSError:
            self.number = self.number or SIGPIPE

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let no signal end the process."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before


@contextmanager
def catching(*, held: bool = False) -> Iterator[Caught]:
    """Catch the signals `STOPPING`. A second SIGINT, more than a second later, ends the process.

    Within that second it is the same request: `timeout` signals the process and then its group. Outside of the main
    thread, where Python handles no signals, nothing is caught.
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
        for name in STOPPING:
            number = getattr(signal, name, None)  # Windows lacks some
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # as nohup sets it
                previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
