"""Data and runs that many tests share, made once by each test process."""

import os
from pathlib import Path

import pytest

from mvae import synthetic

from helpers import ROOT, SHORT, Trained, run


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
def mnist_dir() -> Path:
    """The data folder that holds the real MNIST."""
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"))
    if not (folder / "MNIST").is_dir():
        pytest.skip(f"real MNIST is not in {folder}: MVAE_DATA_DIR names the folder that holds it")
    return folder.resolve()
