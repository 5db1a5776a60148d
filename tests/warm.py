"""Run a script in a forked process. It imports no mvae: a Config's defaults are read from the script's environment."""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch


def run_script(words: list[str], logs: tuple[Path, Path], cwd: Path, env: dict[str, str]) -> None:
    """Turn this process into `python WORDS >LOGS[0] 2>LOGS[1]`."""
    for log, stream in zip(logs, (sys.stdout, sys.stderr), strict=True):
        stream.flush()
        with open(log, "wb", buffering=0) as file:
            os.dup2(file.fileno(), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = words
    own = str(Path(__file__).parent)
    sys.path = [str(Path(words[0]).parent), *(path for path in sys.path if path not in ("", own))]
    runpy.run_path(words[0], run_name="__main__")
