"""Two stages: training on the images alone, then on everything; resumed, shared between runs, and never overwritten."""

import os
import re
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mvae import Data, Objective, Term, UsageError
from mvae.run import checkpoint

import numpy as np
import pytest
import torch

from helpers import assert_ended, assert_same_run, run_warm, same, script, start_warm, stats

WEAK = ["--preset", "weak", "--limit", 100, "--n-val", 100, "--batch-size", 20, "--n-latents", 4, "--n-paired", 40]
WEAK += ["--images-first", 2, "--epochs", 2, "--rounds", 2, "--log-interval", 1, "--precision", "auto"]
"""A run of three times two epochs of five steps."""


class Started:
    """mnist/train.py as a process whose output is read while it runs."""

    def __init__(self, folder: Path, name: str, words: list[object]):
        self.out, self.err = folder / f"{name} out", folder / f"{name} err"
        self.out.write_text("")
        self.process: BaseProcess = start_warm("mnist/train.py", *words, logs=(self.out, self.err), cwd=folder)

    def wait_for(self, words: str, n: int = 1) -> None:
        while self.out.read_text().count(words) < n:
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


def test_run_that_is_stopped_and_killed_at_random_moments_is_resumed_bit_for_bit(
    flags: list[object], straight: Path, tmp_path: Path
) -> None:
    """After some lines of output; nothing depends on which they are."""
    words, rng = [*flags, "--out-dir", "run", "--resume", "--save-every", 1e-9], np.random.default_rng(0)
    for number in (signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL, signal.SIGUSR1):
        ended = Started(tmp_path, "ended", words)
        ended.wait_for("\n", int(rng.integers(2, 8)))
        ended.signal(number)
        ended.end(128 + signal.SIGUSR1, -number)  # between the stages a signal ends it at once
        if ended.process.exitcode == 128 + signal.SIGUSR1:
            said = r"train.py: stopped in epoch [12], step [0-5] of 5; the state is saved: continue with --resume\n"
            assert re.fullmatch(said, ended.err.read_text())
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
    other = ["--lambda-text", 7, "--n-paired", 20, "--reconstruct", "all", "--select", "joint", "--self-labels", 0.5]
    second = Started(tmp_path, "second", [*share, "--out-dir", "two", *other])
    second.wait_for("waiting for another run, which is training in images")
    first.signal(signal.SIGCONT)
    first.end()
    assert "nothing left to do: images holds a run of 2 epochs" in second.end()
    assert_same_run(tmp_path / "images", straight / "images")
    assert_same_run(tmp_path / "one", straight)
    assert len(stats(tmp_path / "two")) == 2


def test_what_does_not_follow_a_first_stage_is_refused_before_anything_is_written(
    flags: list[object],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shared stage and a run's own; and afterwards the right command still works."""
    before = contents(straight)
    shared = ["--images-dir", straight / "images", "--out-dir", tmp_path / "new"]
    own = ["--out-dir", straight]
    cases: list[tuple[list[object], str]] = [
        ([*shared, "--images-first", 1], "is of a run of 2 epochs, not 1, and other runs share it"),
        ([*shared, "--images-first", 3, "--lr-schedule", "constant"], "of 2 epochs, not 3, and other runs share it"),
        ([*shared, "--seed", 1], "seed was 0, now 1"),
        ([*shared, "--lambda-image", 2], "lambda_image was 1, now 2"),
        ([*own, "--resume", "--images-first", 3], "images_first was 2, now 3"),
        (own, f"{straight} holds a run: continue it with --resume"),
    ]

    def train(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*flags, *words])])
        with script("mnist/train.py") as module:
            module.main()

    for changed, said in cases:
        with pytest.raises(UsageError, match=re.escape(said)) as refused:
            train(*changed)
        assert str(straight) in str(refused.value)
    assert contents(straight) == before
    assert not (tmp_path / "new").exists()
    train(*own, "--resume")
    assert capsys.readouterr().out.count("nothing left to do") == 3  # the images, and two rounds with labels


def test_the_second_stage_starts_from_the_first(straight: Path) -> None:
    """Its β counts the epochs of the first, whose learning rate it doesn't continue; so does that of later rounds."""
    first, second, last = (stats(straight / name) for name in ("images", "round-1", "."))
    assert [record["beta"] for record in last] == [1, 1]
    assert [record["beta"] for record in (*first, *second)] == [0, 0.25, 0.5, 0.75]
    assert [record["lr"] for record in (*first, *second)] == [2e-3, 0, 2e-3, 0]
    images, all_ = (checkpoint.load(folder / checkpoint.LATEST, "mnist") for folder in (straight / "images", straight))
    assert not same(images["model"], all_["model"])
    assert images["settings"]["n_paired"] is None
    assert all_["settings"]["n_paired"] == 40


@pytest.mark.parametrize("experiment", ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19"])
def test_the_first_stage_has_the_images_alone_with_their_weight_and_its_own_length(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--images-first", "3", "--epochs", "5", "--lambda-image", "7", "--iw-samples", "2", "--n-latents", "4"]
    stages: list[Any] = []
    with script(f"{experiment}/train.py") as train:
        names = train.MODALITIES if experiment == "celeba19" else train.BOTH
        data = Data(tensors={name: torch.zeros(9) for name in names})
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--out-dir", str(tmp_path)])
        monkeypatch.setattr(train, "prepare", lambda *_: {}, raising=False)
        monkeypatch.setattr(train, "training_data", lambda *_, **__: (data, data))
        monkeypatch.setattr(train, "fit", lambda *some, before=0, **_: stages.append((*some[:4], before)))
        train.main()
    (first, objective, *parts, before), (second, _, *whole, after) = stages
    assert (first.epochs, before, second.epochs, after) == (3, 0, 5, 3)
    expected = Objective(
        objective.model, [Term(("image",), ("image",))], weights={"image": 7}, iw_samples=2, iw="image"
    )
    assert objective.checksum() == expected.checksum()
    for part in parts:
        assert {name: bool(here.any()) for name, here in part.present.items()} == {one: one == "image" for one in names}
        assert part.present["image"].all()
    assert [part.present for part in whole] == [None, None]
