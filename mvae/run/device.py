"""The machine that a script computes on: its device, threads, precision, and the processes that share the work."""

import argparse
import contextlib
import ctypes
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .running import is_first

if TYPE_CHECKING:  # torch is imported where it's needed, so that -h doesn't wait for it
    import torch

    from ..processes import Processes

log = logging.getLogger(__name__)


def device(args: argparse.Namespace) -> "torch.device":
    """Has torch compute with --threads, on memory that it keeps, and gives the device asked for.

    Afterwards `args.threads` says how many there are, and `args.precision` what auto takes, which a line says, too.
    Without a CUDA device --cuda warns in one line, and the CPU does the work.
    """
    import torch

    usual = torch.get_num_threads()  # OMP_NUM_THREADS, else all cores: too many for networks of a hundred examples
    shared = max(1, min(usual, 4) // getattr(args, "jobs", 1))
    args.threads = args.threads or (usual if "OMP_NUM_THREADS" in os.environ else shared)
    torch.set_num_threads(args.threads)
    _keep_freed_memory()
    found = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        found = cuda_device(os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count())
    elif args.cuda:
        log.warning("--cuda: this machine has no CUDA device that torch can use; going on with the CPU")
    if getattr(args, "precision", None) == "auto":
        having = _bf16_instructions(found)
        args.precision = "bf16" if having else "fp32"
        if is_first():
            print(f"--precision auto: {args.precision}, as this processor has {having or 'no instructions for bf16'}")
    return found


def _keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next ones, up to a gigabyte, unless the user's variables have it otherwise.

    A step frees and takes again some large blocks. By default glibc gives many of them back to the system, which hands
    out new ones page by page, filled with zeros: with large pictures, up to a sixth of the time.
    """
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}:
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)  # its largest value; blocks above are the system's
        mallopt(trim_threshold, 2**30)


def _bf16_instructions(device: "torch.device") -> str:
    """The names of the processor's instructions for bf16; empty if it has none, or if nothing tells."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ""
    return " and ".join(sorted({"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.intersection(words)))


@contextmanager
def processes(args: argparse.Namespace, device: "torch.device") -> "Iterator[Processes]":
    """The processes that share the work: torchrun's, or --jobs of them. The others run the same command beside this."""
    from ..processes import Processes

    children = []
    if args.jobs > 1 and "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.update(group, WORLD_SIZE=str(args.jobs))
        for rank in map(str, range(1, args.jobs)):
            environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, *sys.argv]
            children.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        os.environ["RANK"] = "0"
    try:
        found = Processes.join(device)
        with found.together():
            yield found
    finally:
        for child in children:
            child.terminate()
            child.wait()


def cuda_device(local_rank: str, n: int) -> "torch.device":
    """The CUDA device of a process, of `n`; torchrun gives each its LOCAL_RANK. Raises UsageError if there is none."""
    import torch

    if not local_rank.isdecimal():
        raise UsageError(f"LOCAL_RANK is {local_rank!r}, and torchrun sets it to a number: unset it for one process")
    if int(local_rank) >= n:
        raise UsageError(f"LOCAL_RANK is {local_rank}, and there are {n} CUDA devices: have at most as many processes")
    return torch.device("cuda", int(local_rank))
