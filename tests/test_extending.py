"""docs/extending.md: its script and every change of it run, and resume bit for bit wherever they were stopped."""

import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mvae import Run
from mvae.run import checkpoint
from mvae.run.run import Stopped

import pytest
import torch

from helpers import ROOT, assert_same_run, environment, same, stats, without_times

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), flags=re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SCRIPT = PYTHON[0]
CHANGES = [text for language, text in BLOCKS if language == "diff"]

KEYS = {
    "optimizer": "NAdam",
    "clipping": "clip_grad_norm_",
    "accumulation": "loss / 4",
    "early stopping": "best_epoch",
    "scheduler": "lr_scheduler",
    "averaged weights": "AveragedModel",
    "tracker": "wandb",
    "metric": "confidence",
    "missing modalities": "present={",
}
"""What tells a change of the page from the others."""

SHORT = {"3000": "200", "500, seed=1": "60, seed=1", "batch_size=50": "batch_size=20", "epochs=10": "epochs=3"}
"""Replacements that make the script short: ten steps an epoch."""

N_STEPS = 10


def change(name: str) -> str:
    (found,) = [text for text in CHANGES if KEYS[name] in text]
    return found


def changed(script: str, diff: str) -> str:
    """Apply a block of the page: its unchanged and removed lines are found in the script, in their order."""
    left, found = script.splitlines(), []
    for line in diff.splitlines():
        if line.startswith("+"):
            found.append(line[1:])
            continue
        assert line[1:] in left, f"not in the script after the lines before it: {line}"
        at = left.index(line[1:])
        found += left[: at if line.startswith("-") else at + 1]
        left = left[at + 1 :]
    return "\n".join([*found, *left]) + "\n"


def replaced(script: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a script in a folder, as its user does, and returns its names."""

    def execute(script: str, folder: str) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        Path("waves.py").write_text(script)
        return runpy.run_path("waves.py", run_name="__main__")

    return execute


class Tracker:
    """Stands in for the module wandb, and for a run of it."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **options: Any) -> "Tracker":
        return self

    def log(self, record: dict[str, Any], step: int) -> None:
        self.logged.append((step, record))


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    found = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


class Killed(BaseException):
    pass


def stop(monkeypatch: pytest.MonkeyPatch, method: str, n: int, *, kill: bool = False) -> None:
    """Have the n-th call of a method of Run bring a signal; or, when it is done, end the process without a word."""
    original, calls = getattr(Run, method), 0

    def called(run: Run, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == n and not kill:
            signal.raise_signal(signal.SIGTERM)
        original(run, *arguments)
        if calls == n and kill:
            raise Killed

    monkeypatch.setattr(Run, method, called)


STOPS: dict[str, dict[str, Any]] = {
    "within an epoch": {"method": "backward", "n": N_STEPS + 5},
    "at an epoch's last step": {"method": "backward", "n": 2 * N_STEPS},
    "in validation": {"method": "validate", "n": 1},
    "killed after validation": {"method": "validate", "n": 2, "kill": True},
}


@pytest.mark.parametrize("where", STOPS)
@pytest.mark.parametrize("name", KEYS)
def test_changed_loop_that_was_stopped_is_the_one_that_never_was(
    name: str, where: str, tmp_path: Path, execute: Callable, tracker: Tracker
) -> None:
    script = replaced(changed(SCRIPT, change(name)), SHORT)
    straight = execute(script, "straight")
    logged = tracker.logged.copy()
    tracker.logged.clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed if STOPS[where].get("kill") else Stopped):
        stop(patch, **STOPS[where])
        execute(script, "stopped")
    resumed = execute(script, "stopped")
    assert_same_run(tmp_path / "stopped/waves", tmp_path / "straight/waves", "waves")
    states = [checkpoint.load(tmp_path / folder / "waves/checkpoint.pth.tar", "waves") for folder in ("straight", "stopped")]
    assert same(states[0]["kept"], states[1]["kept"])
    assert same(straight["model"].state_dict(), resumed["model"].state_dict())
    if where != "killed after validation":  # that comes between the state and the tracker
        assert [step for step, _ in tracker.logged] == [step for step, _ in logged]
        assert without_times([record for _, record in tracker.logged]) == without_times([record for _, record in logged])
