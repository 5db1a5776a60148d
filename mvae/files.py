"""Atomic writes and locks."""

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from .errors import UserError

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, 524}
"""The errors of disks without locks; 524 is Linux's own ENOTSUPP, which some network disks return."""


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file so that at any moment it holds its old content or the new; see `whole`."""
    with whole(path, sync=sync) as file:
        file.write(content)


@contextlib.contextmanager
def whole(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends; after an error `path` is unchanged.

    Missing folders are created, and a symbolic link stays one: its target is replaced. `sync` waits for the disk, so
    that a power cut can't leave an empty file. Raises UserError if the file can't be written.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None


def check_readable(path: Path) -> None:
    """Raise UserError unless this is a regular file: reading a pipe may never end."""
    if not os.path.isfile(path):
        raise UserError(f"can't read {path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")


def check_writable(path: Path) -> None:
    """Raise UserError if `whole` can't write this file, as far as that is known before the work."""
    is_stream = str(path.absolute().parent) in ("/dev", "/dev/fd")  # /dev/stdout may link to a regular file
    if is_stream or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"can't write {path}: not a regular file")
    folder = next(folder for folder in Path(os.path.realpath(path)).parents if os.path.exists(folder))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"can't write {path}: {folder} is not a writable folder")


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of the file `path`, which is created if absent and stays. The system frees it with the process.

    If another process holds the lock, raise BlockingIOError, or with `wait` call it once and wait. On a disk without
    locks, log a warning and continue without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if wait is None:
            raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from None
        wait()
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("can't lock %s (%s): continuing without a lock", path, error.strerror)
    try:
        yield
    finally:
        lock.release()
