"""Data and runs that many tests share, made once by each test process."""

import functools
import os
import signal
from pathlib import Path

from synthetic import __main__ as synthetic

import pytest

from helpers import ROOT, SHORT, RunHere, Trained, environment, run_warm

# Shells start background jobs with Ctrl-C ignored, and the scripts under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 1,200 + 300 made digits."""
    folder = tmp_path_factory.mktemp("digits")
    synthetic.main(["digits", str(folder), "--train", "1200", "--test", "300"])
    return folder


@pytest.fixture(scope="session")
def trained(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three epochs on the made digits, run from another folder than the script's. Not to be written to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arguments = ["--data-dir", digits_dir, "--out-dir", "trained", "--epochs", "3", "--cuda", *SHORT]
    return Trained(folder / "trained", run_warm("mnist/train.py", *arguments, cwd=folder))


@pytest.fixture(scope="session")
def faces_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 240 + 60 + 60 made faces. What is decoded of them goes to its folder `cache`."""
    folder = tmp_path_factory.mktemp("faces")
    splits = ["--train", "240", "--val", "60", "--test", "60"]
    synthetic.main(["faces", str(folder), *splits])
    return folder


@pytest.fixture
def run_here(faces_dir: Path, tmp_path: Path) -> RunHere:
    """Runs a script on the made faces in the test's own folder: `run_here("celeba/train.py", "--epochs", 1)`."""
    env = environment(MVAE_DATA_DIR=str(faces_dir), MVAE_CACHE_DIR=str(faces_dir / "cache"))
    return functools.partial(run_warm, cwd=tmp_path, env=env)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The data folder that holds the real MNIST."""
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"))
    if not (folder / "MNIST").is_dir():
        pytest.skip(f"real MNIST is not in {folder}: MVAE_DATA_DIR names the folder that holds it")
    return folder.resolve()
