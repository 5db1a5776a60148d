"""Pictures decoded once: resized, cropped, and kept as uint8 in one cache file that is memory-mapped.

The file is the pixels of all pictures, the checksum of each block of them, and a line of JSON that says what they are
(`tail -n 1` shows it). A block is whole if its checksum fits. By that rule a reader finds damage, and a build that was
killed finds what is left to do.

Run as a command, this module is one of the processes that decode. So that they start fast, torch is imported only where
it is needed.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from PIL import UnidentifiedImageError
from tqdm import tqdm

from ..errors import UserError
from ..files import locked
from .picture_files import pixels

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = "mvae pictures 2"
BLOCK = 128  # pictures: what a kill loses of each process's work, and what a checksum is of


class Entry(NamedTuple):
    """A picture of a folder or a zip: its name there, its bytes, and its time of change in ns (in a zip: its CRC)."""

    member: str
    size: int
    stamp: int


def listing(source: Path) -> dict[str, Entry]:
    """The files of a folder or of a zip, by their names. Folders inside the zip are no part of a name.

    Raises UserError if it can't be read.
    """
    try:
        if source.is_dir():
            with os.scandir(source) as files:
                stats = [(file.name, file.stat()) for file in files if file.is_file()]
            return {name: Entry(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats}
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        entries = [Entry(member.filename, member.file_size, member.CRC) for member in members]
        return {entry.member.split("/")[-1]: entry for entry in entries}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"can't read {source}: {getattr(error, 'strerror', None) or error}") from None


def decoded(
    source: Path,
    entries: Sequence[Entry],
    path: Path,
    *,
    mode: Literal["RGB", "L"] = "RGB",
    size: int = 64,
    workers: int = 1,
) -> "Tensor":
    """The pictures that `make` makes, (n, channels, size, size) uint8. Raises UserError as it does.

    They are memory-mapped: the system reads from `path` what is used, and can let go of it.
    """
    import torch

    make(source, entries, path, mode=mode, size=size, workers=workers)
    shape = (len(entries), len(mode), size, size)
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=torch.uint8).view(shape)


def make(
    source: Path,
    entries: Sequence[Entry],
    path: Path,
    *,
    mode: Literal["RGB", "L"] = "RGB",
    size: int = 64,
    workers: int = 1,
) -> None:
    """Decodes the pictures `entries` of `source` into the file `path`, unless it holds them already.

    That is checked: their names, sizes and times of change, and every byte of the file. By `workers` processes, what
    `eight_bit` makes of them becomes what torchvision's Resize(size) and CenterCrop(size) make of that. A build that
    was killed goes on from the blocks that are done. If another process is making the file, this one waits for it.

    Raises UserError if a picture is damaged or the file can't be written (what is decoded by then is kept), or if there
    are no entries.
    """
    if not entries:
        raise UserError(f"there are no pictures in {source}")
    if not hasattr(os, "pread"):
        raise UserError("decoding pictures into a cache needs Linux or macOS")
    file = _File.of(entries, mode, size)
    try:
        if file.broken(path) != []:
            waiting = functools.partial(log.info, "waiting for another process, which is decoding into %s", path)
            with locked(path.with_name(path.name + ".lock"), waiting):
                _build(source, entries, path, file, workers)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't keep decoded pictures in {path} ({reason}): name another `cache_dir`") from None


class _File(NamedTuple):
    """The layout of a file of n pictures: their pixels, 4 bytes of CRC-32 for each block, and `description`."""

    n: int
    mode: str
    size: int
    description: str

    @classmethod
    def of(cls, entries: Sequence[Entry], mode: str, size: int) -> "_File":
        fingerprint = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        content = {"format": FORMAT, "n": len(entries), "mode": mode, "size": size, "block": BLOCK}
        line = json.dumps({**content, "sha256 of names, sizes, times": fingerprint})
        return cls(len(entries), mode, size, f"\n{line}\n")

    @property
    def picture(self) -> int:
        """The bytes of a picture."""
        return len(self.mode) * self.size * self.size

    @property
    def blocks(self) -> range:
        return range(-(-self.n // BLOCK))

    def pictures_in(self, block: int) -> int:
        return min(BLOCK, self.n - block * BLOCK)

    def checksum_at(self, block: int) -> int:
        return self.n * self.picture + 4 * block

    @property
    def end(self) -> int:
        """Where the description begins."""
        return self.checksum_at(len(self.blocks))

    def broken(self, path: Path) -> list[int] | None:
        """The blocks that aren't whole; None if there is no such file, or it is not of these pictures."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            description = self.description.encode()
            if os.pread(descriptor, len(description) + 1, self.end) != description:
                return None

            def is_whole(block: int) -> bool:
                pixels = os.pread(descriptor, self.pictures_in(block) * self.picture, block * BLOCK * self.picture)
                return os.pread(descriptor, 4, self.checksum_at(block)) == _checksum(pixels)

            with ThreadPoolExecutor() as pool:  # reading and summing run outside of Python's lock
                whole = list(pool.map(is_whole, self.blocks))
            return [block for block in self.blocks if not whole[block]]
        finally:
            os.close(descriptor)

    def write(self, descriptor: int, block: int, pixels: bytes) -> None:
        with open(descriptor, "r+b", closefd=False) as file:
            file.seek(block * BLOCK * self.picture)
            file.write(pixels)
            file.seek(self.checksum_at(block))
            file.write(_checksum(pixels))


def _checksum(pixels: bytes) -> bytes:
    return zlib.crc32(pixels).to_bytes(4, "little")  # what was never written reads as zeros, whose sum isn't zero


def _build(source: Path, entries: Sequence[Entry], path: Path, file: _File, workers: int) -> None:
    """Makes the file whole, under another name, and renames it. Whoever has mapped an older one keeps that."""
    partial = path.with_name(path.name + ".partial")
    found = file.broken(path)
    if found == []:
        return  # while this process waited
    if found:
        log.info("%s is damaged: decoding %d of %d blocks again", path, len(found), len(file.blocks))
        os.replace(path, partial)
    elif path.exists():
        log.info("%s doesn't hold the pictures that are now in %s, or was cut short: decoding anew", path, source)
    todo = file.broken(partial)
    if todo is None:
        _create(partial, file)
        todo = list(file.blocks)
    done = file.n - sum(map(file.pictures_in, todo))
    log.info("decoding %d pictures of %s%s", file.n, source, f", of which {done} are done" * (done > 0))
    members = [(block, [entry.member for entry in entries[block * BLOCK :][:BLOCK]]) for block in todo]
    shares = [(str(source), str(partial), file, members[first::workers]) for first in range(min(workers, len(todo)))]
    with tqdm(total=file.n, initial=done, leave=False, unit=" pictures", disable=None) as bar:
        for n in _decode(shares):
            bar.update(n)
    if file.broken(partial):
        raise UserError("a process that decodes pictures was killed: the same command goes on from what is done")
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _create(path: Path, file: _File) -> None:
    """Takes the room that the file needs, so that a full disk is known at once."""
    path.unlink(missing_ok=True)
    try:
        with open(path, "xb") as new:
            with contextlib.suppress(AttributeError):  # macOS has none
                os.posix_fallocate(new.fileno(), 0, file.end)
            new.seek(file.end)
            new.write(file.description.encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _decode(shares: Sequence[tuple[str, str, _File, list[tuple[int, list[str]]]]]) -> Iterator[int]:
    """Runs a process for each share; yields the numbers of pictures done, as they are.

    Each process is in another group, so that Ctrl-C reaches this one alone. They report through one pipe: if this
    process dies, the pipe breaks, and each of them ends at its next report.
    """
    command = [sys.executable, "-P", "-m", __name__]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    reader, writer = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open(reader) as reports:
            try:
                for _ in shares:
                    process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=writer, env=environment, process_group=0
                    )
                    processes.append(process)
            finally:
                os.close(writer)
            for process, share in zip(processes, shares, strict=True):
                assert process.stdin
                with contextlib.suppress(BrokenPipeError), process.stdin as file:  # a dead one's blocks stay undone
                    file.write(json.dumps(share).encode())
            for line in reports:
                report = json.loads(line)
                if isinstance(report, str):
                    raise UserError(report)
                yield report
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _work() -> None:
    """Decodes the share that stdin gives. Writes a line of JSON for each block: how many, or what is wrong."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        source, partial, layout, blocks = json.load(sys.stdin)
    except ValueError:  # cut short: the process that asks is gone
        return
    file = _File(*layout)
    archive = None if os.path.isdir(source) else zipfile.ZipFile(source)
    descriptor = os.open(partial, os.O_RDWR)  # of this very file, even if another build puts its own in that place
    for block, members in blocks:
        parts = []
        for member in members:
            try:
                content = archive.read(member) if archive else Path(source, member).read_bytes()
                parts.append(pixels(content, file.mode, file.size))
            except Exception as error:  # PIL fails in many ways on a damaged file; each means the same to the user
                reason = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:200]})"
                return _report(f"{source}/{member} is damaged, or no picture{reason}: replace it")
        try:
            file.write(descriptor, block, b"".join(parts))
        except OSError as error:
            return _report(f"can't write {partial}: {error.strerror or error}")
        _report(len(members))


def _report(what: int | str) -> None:
    os.write(1, f"{json.dumps(what)}\n".encode())  # one write, so that the processes' lines stay whole in their pipe


if __name__ == "__main__":
    _work()
