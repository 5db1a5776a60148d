"""The machine a script computes on: its device, threads and precision."""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import UsageError
from ..model import Precision

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Machine:
    """The flags of every script that runs a network."""

    # Machine
    cuda: bool = False  # run on a CUDA device; without one, on the CPU
    threads: int | None = None  # number of CPU threads (default: $OMP_NUM_THREADS, or the number of cores up to 4)

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"threads must be from 1 to 1024, got {self.threads}")

    def device(self) -> torch.device:
        """Set the number of threads and return the device; torchrun's processes have one each, by LOCAL_RANK."""
        default = torch.get_num_threads()  # OMP_NUM_THREADS, or all cores: too many for networks of a hundred examples
        torch.set_num_threads(self.threads or (default if "OMP_NUM_THREADS" in os.environ else min(default, 4)))
        if not self.cuda:
            _mention_cuda()
            return torch.device("cpu")
        if not torch.cuda.is_available():
            log.warning("--cuda: no CUDA device is available to torch; using the CPU")
            return torch.device("cpu")
        rank, n = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        if not rank.isdecimal() or int(rank) >= n:
            raise UsageError(f"LOCAL_RANK must be a number below {n}, the number of CUDA devices, got {rank!r}")
        return torch.device("cuda", int(rank))


@functools.cache  # once per process
def _mention_cuda() -> None:
    if torch.cuda.is_available():
        log.info("using the CPU; there is a CUDA device, which --cuda uses")


def resolve(precision: Literal["fp32", "bf16", "auto"], device: torch.device) -> Precision:
    """Return the precision for "auto": bf16 if the processor has instructions for it, which is logged."""
    if precision != "auto":
        return precision
    found = _bf16_instructions(device)
    log.info("precision auto: %s (%s)", "bf16" if found else "fp32", found or "no instructions for bf16")
    return "bf16" if found else "fp32"


def _bf16_instructions(device: torch.device) -> str:
    """Return the names of the processor's bf16 instructions; empty if it has none or can't tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ""
    return " and ".join(sorted({"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.intersection(words)))
