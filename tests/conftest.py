"""Data and runs that many tests share, made once by each test process."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mvae import synthetic

from helpers import ROOT, SHORT, Trained, run

# Shells start background jobs with Ctrl-C ignored, and the scripts under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 1,200 + 300 made digits."""
    folder = tmp_path_factory.mktemp("digits")
    assert synthetic.main(["digits", str(folder), "--train", "1200", "--test", "300"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three epochs on the made digits, run from another folder than the script's. Not to be written to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arguments = ["--data-dir", digits_dir, "--out-dir", "trained", "--epochs", "3", "--cuda", *SHORT]
    return Trained(folder / "trained", run("mnist/train.py", *arguments, cwd=folder))


@pytest.fixture(scope="session")
def faces_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 240 + 60 + 60 made faces. What is decoded of them goes to its folder `cache`."""
    folder = tmp_path_factory.mktemp("faces")
    splits = ["--train", "240", "--val", "60", "--test", "60"]
    assert synthetic.main(["faces", str(folder), *splits]) == 0
    return folder


@pytest.fixture
def run_here(faces_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a script on the made faces, given its module and its arguments, without a process that imports torch again.

    It runs on one thread, as processes do. Its errors are raised.
    """
    monkeypatch.setenv("MVAE_DATA_DIR", str(faces_dir))
    monkeypatch.setenv("MVAE_CACHE_DIR", str(faces_dir / "cache"))

    def main(script: ModuleType, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            script.main()
        finally:
            torch.set_num_threads(threads)

    return main


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The data folder that holds the real MNIST."""
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"))
    if not (folder / "MNIST").is_dir():
        pytest.skip(f"real MNIST is not in {folder}: MVAE_DATA_DIR names the folder that holds it")
    return folder.resolve()
