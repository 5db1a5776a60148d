"""Pictures decoded once: resized, cropped, and kept as uint8 in a cache file that is memory-mapped.

The file holds the pixels of all pictures, a checksum of each block of them, and a line of JSON that describes them
(`tail -n 1` shows it). By the checksums a reader finds damage, and a rerun finds the blocks that a killed build lacks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import locked
from ..progress import progress
from .dataset import SAMPLED, DataDir
from .pictures import Mode, fault, is_named_as_picture, pixels
from .pool import in_parallel

log = logging.getLogger(__name__)

FORMAT = "mvae pictures 2"
BLOCK = 128  # pictures per checksum, and per job of a worker


@dataclasses.dataclass(kw_only=True)
class CacheDir(DataDir):
    """The flags of every script that decodes pictures."""

    # Pictures
    cache_dir: Path = Path(os.environ.get("MVAE_CACHE_DIR") or "data/cache")  # folder of decoded pictures
    workers: int = os.cpu_count() or 1  # number of processes that decode pictures


class Entry(NamedTuple):
    """A picture in a folder or zip: its name, its bytes, and its modification time in ns (in a zip: its CRC)."""

    member: str
    size: int
    stamp: int


def listing(source: Path) -> dict[str, Entry]:
    """Return the pictures of a folder or zip by name; folders inside a zip aren't part of a name."""
    if source.is_dir():
        with os.scandir(source) as files:
            entries = {
                file.name: file.is_file() and Entry(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
                for file in files
            }
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except zipfile.BadZipFile as error:
            raise UserError(f"can't read {source}: {error}") from None
        entries = {one.filename.rpartition("/")[2]: Entry(one.filename, one.file_size, one.CRC) for one in members}
    found = {name: entry for name, entry in entries.items() if entry and is_named_as_picture(name)}
    if others := len(entries) - len(found):
        log.info("skipped %d of %d entries of %s, which aren't pictures", others, len(entries), source)
    return found


def decoded(
    source: Path, entries: Sequence[Entry], path: Path, *, mode: Mode = "RGB", size: int = 64, workers: int = 1
) -> Tensor:
    """Return pictures of a folder or zip, (n, channels, size, size) uint8, memory-mapped from the cache file `path`.

    The file is built by `workers` processes unless it holds these pictures: their names, sizes and times are compared,
    and its checksums, of a large file those of a sample; see `SAMPLED`. A build that was killed is continued; a build
    by another process is awaited.

    Raises UserError for an empty `entries`, a damaged picture or a file that can't be written.
    """
    if not entries:
        raise UserError(f"no pictures in {source}")
    layout = _Layout(entries, mode, size)
    # Of the processes of a run, the first on each machine checks the file.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if layout.broken(path, every=1 + layout.checksums // SAMPLED if is_first else layout.n) != []:
            lock = path.with_name(path.name + ".lock")
            with locked(lock, lambda: log.info("waiting for another process, which is decoding into %s", path)):
                _build(source, path, layout, workers)
    except OSError as error:
        raise UserError(f"can't write decoded pictures to {path}: {error.strerror or error}: set --cache-dir") from None
    stored = torch.from_file(str(path), shared=False, size=layout.checksums, dtype=torch.uint8)
    return stored.view(len(entries), len(mode), size, size)


class _Layout:
    """The layout of the cache file of some pictures: their pixels, 4 bytes of CRC-32 per block, and a description."""

    def __init__(self, entries: Sequence[Entry], mode: Mode, size: int):
        self.mode, self.size, self.n = mode, size, len(entries)
        names = [entry.member for entry in entries]
        self.blocks = [names[first : first + BLOCK] for first in range(0, len(names), BLOCK)]
        self.block_bytes = BLOCK * len(mode) * size * size  # the last block may be shorter
        self.checksums = len(entries) * len(mode) * size * size
        self.end = self.checksums + 4 * len(self.blocks)
        fingerprint = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        content = {"format": FORMAT, "n": len(entries), "mode": mode, "size": size, "block": BLOCK}
        line = json.dumps({**content, "sha256 of names, sizes, times": fingerprint})
        self.description = f"\n{line}\n".encode()

    def broken(self, path: Path, every: int = 1) -> list[int] | None:
        """Return those of every n-th block with a wrong checksum; None if it doesn't exist or holds other pictures."""
        if not path.exists() or path.stat().st_size != self.end + len(self.description):
            return None
        content = np.memmap(path, mode="r")
        if content[self.end :].tobytes() != self.description:
            return None
        pictures, checksums = content[: self.checksums], content[self.checksums : self.end].view("<u4")
        numbers = range(0, len(self.blocks), every)
        blocks = [pictures[block * self.block_bytes :][: self.block_bytes] for block in numbers]
        with ThreadPoolExecutor() as threads:  # reading and summing release Python's lock
            found = list(threads.map(zlib.crc32, blocks))  # an unwritten block is zeros, whose CRC-32 isn't zero
        return [block for block, sum in zip(numbers, found, strict=True) if sum != checksums[block]]


def _build(source: Path, path: Path, layout: _Layout, workers: int) -> None:
    """Build the file under another name and rename it, so that whoever has mapped an older one keeps that."""
    partial = path.with_name(path.name + ".partial")
    found = layout.broken(path)
    if found == []:
        return  # another process has built it while this one waited
    if found:
        log.info("%s is damaged: decoding %d of %d blocks again", path, len(found), len(layout.blocks))
        os.replace(path, partial)
    elif path.exists():
        log.info("%s is incomplete or of other pictures than %s holds now: decoding all", path, source)
    todo = layout.broken(partial)
    if todo is None:
        partial.unlink(missing_ok=True)  # a process may have mapped it
        with open(partial, "xb") as file:
            file.seek(layout.end)
            file.write(layout.description)
        todo = list(range(len(layout.blocks)))
    jobs = [(block, layout.blocks[block]) for block in todo]
    done = layout.n - sum(len(names) for _, names in jobs)
    log.info("decoding %d pictures of %s%s", layout.n, source, f", {done} of which are done" * (done > 0))
    results = in_parallel(functools.partial(_decode, source, layout.mode, layout.size), jobs, workers)
    n = len(layout.blocks)
    with open(partial, "r+b") as file, contextlib.closing(results):
        for block, content in progress(results, "decoding", n, done=n - len(jobs)):
            file.seek(block * layout.block_bytes)
            file.write(content)
            file.seek(layout.checksums + 4 * block)
            file.write(zlib.crc32(content).to_bytes(4, "little"))
        file.flush()
        os.fsync(file.fileno())  # a power cut would leave blocks of zeros, which a sample may miss
    os.replace(partial, path)


def _decode(source: Path, mode: Mode, size: int, job: tuple[int, Sequence[str]]) -> tuple[int, bytes]:
    """Return a block's number and its pixels. Runs in a worker."""
    block, names = job
    parts = []
    for name in names:
        try:
            content = _archive(source).read(name) if source.is_file() else Path(source, name).read_bytes()
            parts.append(pixels(content, mode, size))
        except Exception as error:
            raise UserError(f"{source}/{name} is {fault(error)}: replace it") from None
    return block, b"".join(parts)


@functools.cache
def _archive(source: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(source)  # read once per worker: the index of CelebA's zip takes a second
