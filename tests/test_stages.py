"""Two stages: training on the images alone, then on everything; resumed, shared between runs, and never overwritten."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mvae.run import checkpoint

import pytest

from helpers import assert_ended, assert_refused, assert_same_run, run_warm, same, start_warm, stats

WEAK = ["--preset", "weak", "--limit", 100, "--n-val", 100, "--batch-size", 20, "--n-latents", 4, "--n-paired", 40]
WEAK += ["--images-first", 2, "--epochs", 2, "--log-interval", 1, "--save-every", 1e-9]
"""A run of two times two epochs of five steps."""

Train = Callable[..., Any]


class Started:
    """mnist/train.py as a process whose output is read while it runs."""

    def __init__(self, folder: Path, name: str, words: list[object]):
        self.out, self.err = folder / f"{name} out", folder / f"{name} err"
        self.out.write_text("")
        self.err.write_text("")
        self.process: BaseProcess = start_warm("mnist/train.py", *words, logs=(self.out, self.err), cwd=folder)

    def wait_for(self, words: str) -> None:
        while words not in self.out.read_text():
            assert self.process.is_alive(), self.err.read_text()
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def end(self, *statuses: int) -> str:
        self.process.join(timeout=300)
        assert self.process.exitcode in (statuses or (0,)), self.err.read_text()
        return self.out.read_text()


@pytest.fixture
def flags(digits_dir: Path) -> list[object]:
    return ["--data-dir", digits_dir, *WEAK]


@pytest.fixture(scope="module")
def straight(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that never stopped. Read-only."""
    folder = tmp_path_factory.mktemp("straight")
    assert_ended(run_warm("mnist/train.py", "--data-dir", digits_dir, *WEAK, "--out-dir", "run", cwd=folder))
    return folder / "run"


def assert_same_stages(out_dir: Path, straight: Path) -> None:
    assert_same_run(out_dir / "images", straight / "images")
    assert_same_run(out_dir, straight)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_run_that_stops_in_each_stage_and_between_them_is_resumed_bit_for_bit(
    number: signal.Signals, flags: list[object], straight: Path, tmp_path: Path
) -> None:
    words = [*flags, "--out-dir", "run", "--resume"]
    for place in ("epoch 1/2  step 2/5", "epoch 2/2  β", "writing to run\nepoch", "writing to run\nepoch"):
        stopped = Started(tmp_path, "stopped", words)
        stopped.wait_for(place)
        stopped.signal(number)
        stopped.end(128 + signal.SIGTERM, -number)  # between the stages SIGTERM ends it at once
    assert_ended(run_warm("mnist/train.py", *words, cwd=tmp_path))
    assert_same_stages(tmp_path / "run", straight)


def test_runs_that_share_a_first_stage_wait_for_the_one_that_trains_and_reuse_it(
    flags: list[object], straight: Path, tmp_path: Path
) -> None:
    """Whatever concerns labels may differ between them."""
    share = [*flags, "--images-dir", "images"]
    first = Started(tmp_path, "first", [*share, "--out-dir", "one"])
    first.wait_for("epoch 1/2  step 2/5")
    first.signal(signal.SIGSTOP)
    second = Started(tmp_path, "second", [*share, "--out-dir", "two", "--lambda-text", 7, "--n-paired", 20])
    second.wait_for("waiting for another run, which is training in images")
    first.signal(signal.SIGCONT)
    first.end()
    assert "nothing left to do: images holds a run of 2 epochs" in second.end()
    assert_same_run(tmp_path / "images", straight / "images")
    assert_same_run(tmp_path / "one", straight)
    assert len(stats(tmp_path / "two")) == 2


def test_other_epochs_of_a_first_stage_are_refused_before_anything_is_written(
    flags: list[object], straight: Path, tmp_path: Path
) -> None:
    """A shared stage and a run's own; and afterwards the right command still works."""
    before = contents(straight)
    for epochs in (1, 3):
        other = [*flags, "--images-first", epochs]
        shared = [*other, "--images-dir", straight / "images", "--out-dir", tmp_path / "new"]
        done = run_warm("mnist/train.py", *shared, cwd=tmp_path)
        assert_refused(done, 2, f"is of a run over 2 epochs, not {epochs}", straight / "images")
        done = run_warm("mnist/train.py", *other, "--out-dir", straight, "--resume", cwd=tmp_path)
        assert_refused(done, 2, f"images_first was 2, now {epochs}", straight / checkpoint.LATEST)
    done = run_warm("mnist/train.py", *flags, "--out-dir", straight, cwd=tmp_path)
    assert_refused(done, 2, f"{straight} holds a run: continue it with --resume")
    assert contents(straight) == before
    assert not (tmp_path / "new").exists()
    done = run_warm("mnist/train.py", *flags, "--out-dir", straight, "--resume", cwd=tmp_path)
    assert_ended(done)
    assert done.stdout.count("nothing left to do") == 2


def test_other_settings_of_a_shared_first_stage_are_refused(
    flags: list[object], straight: Path, tmp_path: Path
) -> None:
    words = [*flags, "--images-dir", straight / "images", "--out-dir", "run"]
    for flag, value, said in (("--seed", 1, "seed was 0, now 1"), ("--lambda-image", 2, "lambda_image was")):
        assert_refused(run_warm("mnist/train.py", *words, flag, value, cwd=tmp_path), 2, said)
    assert not (tmp_path / "run").exists()


def test_the_second_stage_starts_from_the_first(straight: Path) -> None:
    """Its β counts the epochs of the first, whose learning rate it doesn't continue."""
    first, second = stats(straight / "images"), stats(straight)
    assert [record["beta"] for record in (*first, *second)] == [0, 0.25, 0.5, 0.75]
    assert [record["lr"] for record in (*first, *second)] == [2e-3, 0, 2e-3, 0]
    images, all_ = (checkpoint.load(folder / checkpoint.LATEST, "mnist") for folder in (straight / "images", straight))
    assert not same(images["model"], all_["model"])
    assert images["settings"]["n_paired"] is None
    assert all_["settings"]["n_paired"] == 40
