"""Worker processes that decode pictures."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from ..errors import UsageError, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_parallel(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Generator[Result]:
    """Yield function(job) of each job, as they finish; an exception of a job is raised here.

    Few jobs are submitted at a time, since those that run are waited for when the generator is closed. Close it by
    contextlib.closing if the loop over it may end early. Raises UserError if a worker was killed.
    """
    if workers < 1:
        raise UsageError(f"workers must be an integer >= 1, got {workers}")
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # the others import torch again
    pool = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, initializer=_start_worker)
    todo = iter(jobs)
    try:
        running = {pool.submit(function, job) for job in islice(todo, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, job) for job in islice(todo, len(done))}
            for future in done:
                try:
                    yield future.result()
                except UserError as error:
                    raise error from None  # without the worker's traceback
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed: rerun the command to continue, with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, undo its handler of SIGTERM, and end when the parent ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
