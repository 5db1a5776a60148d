"""Files that are written whole or not at all, arrays that are written row by row, and locks."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from .errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old content or the new stands under its name.

    Raises UserError if the folder can't be written or the disk is full; the old file is then still there.
    """
    with whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which stands under its name when the block has ended without an error.

    Until then the old file is there, and after an error still. Raises UserError as `write_atomically` does.
    """
    check_writable(path)
    temporary = _temporary(path)
    try:
        with made(path.parent):
            try:
                with open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a folder can't be synced
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write {path}: {reason}; what was there before is unchanged") from None


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_writable(path: Path) -> None:
    """Raises UserError if `whole` can't write this file, as far as that can be known before."""
    try:
        of_system = {Path("/dev"), Path("/proc")} & {*path.absolute().parents}  # such as /dev/stdout
        if of_system or _mode(path) not in (stat.S_IFREG, None):
            raise UserError(f"can't write {path}: that is a folder or a device, and a file is wanted")
        _mode(_temporary(path))  # its name may be too long
        folder = next(folder for folder in path.absolute().parents if _mode(folder) is not None)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None


def _mode(path: Path) -> int | None:
    """What kind of file stands there; None if there is none."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder, and those above it. After an error in the block, those that were made and are empty are gone."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in new:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


@contextlib.contextmanager
def npy(path: Path, n: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends rows to the .npy file of a float32 array (n, ...), so that no memory holds all of it.

    Raises UserError as `write_atomically` does.
    """
    with whole(path) as file:

        def append(rows: np.ndarray) -> None:
            if not file.tell():
                about = {"descr": "<f4", "fortran_order": False, "shape": (n, *rows.shape[1:])}
                np.lib.format.write_array_header_2_0(file, about)
            file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())

        yield append


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Holds the lock of the file `path`, which is made if it is absent, and stays. A lock ends with its process.

    If another process holds the lock: calls `wait` and waits, or without it raises BlockingIOError. Systems and disks
    that have no such locks go without.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
