"""Progress of long work: a bar on a terminal, and elsewhere a line in the log now and then."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

FIRST, EVERY = 10.0, 30.0  # seconds until the first line, and between the others

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, total: int, *, done: int = 0) -> Iterator[Item]:
    """Yield the remaining items; `done` of the `total` were done before."""
    terminal, began = sys.stderr.isatty(), time.monotonic()
    due = began + FIRST
    for n, item in enumerate(tqdm(items, title, total, initial=done, leave=False, disable=not terminal), done + 1):
        yield item
        now = time.monotonic()
        if now > due and n < total and not terminal:
            left = (now - began) / (n - done) * (total - n)
            log.info("%s: %.0f %%, %s left", title, 100 * n / total, duration(left))
            due = now + EVERY


def duration(seconds: float) -> str:
    """Return a time in words, to two digits or so."""
    minutes = round(seconds / 60)
    return f"{minutes / 60:.1f} h" if minutes >= 100 else f"{minutes} min" if minutes else "< 1 min"
