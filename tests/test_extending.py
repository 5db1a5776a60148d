"""docs/extending.md: its script and every change of it run, and resume bit for bit wherever they were stopped."""

import math
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mvae import MVAE, Objective, Run, UsageError
from mvae.run import checkpoint
from mvae.run.run import Stopped

import pytest
import torch

from helpers import ROOT, SmallEncoder, assert_ended, assert_same_run, run_warm, same

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), flags=re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SCRIPT = PYTHON[0]
CHANGES = [text for language, text in BLOCKS if language == "diff"]

Execute = Callable[[str, str], dict[str, Any]]
"""The fixture execute: from a script and a folder's name to the script's names."""

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
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs a script in a folder, as its user does, and returns its names."""

    def execute(script: str, folder: str) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        Path("waves.py").write_text(script)
        return runpy.run_path("waves.py", run_name="__main__")

    return execute


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


STOPS: list[dict[str, Any]] = [
    {"method": "validate", "n": 1},
    {"method": "backward", "n": 5},
    {"method": "validate", "n": 1, "kill": True},
    {"method": "backward", "n": N_STEPS},
]
"""In an epoch's validation, within an epoch, between two epochs, at the last step of all."""


def assert_resumes(script: str, tmp_path: Path, execute: Execute, thorough: bool = False) -> None:
    """Run a script straight through and with stops, and compare."""
    execute(script, "straight")
    for where in STOPS if thorough else STOPS[1:3]:
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, **where)
            with pytest.raises(Killed if where.get("kill") else Stopped):
                execute(script, "stopped")
    execute(script, "stopped")
    a, b = tmp_path / "straight/waves", tmp_path / "stopped/waves"
    assert_same_run(a, b, "waves")
    states = [checkpoint.load(folder / checkpoint.LATEST, "waves") for folder in (a, b)]
    assert same(states[0]["kept"], states[1]["kept"])


@pytest.mark.parametrize("name", [name for name in KEYS if name != "tracker"])
def test_changed_loop_resumes_bit_for_bit(name: str, tmp_path: Path, execute: Execute) -> None:
    thorough = name in ("scheduler", "averaged weights")  # their states are kept in the checkpoint
    assert_resumes(replaced(changed(SCRIPT, change(name)), SHORT), tmp_path, execute, thorough)


def test_scheduler_that_sets_the_rate_at_once_resumes_bit_for_bit(tmp_path: Path, execute: Execute) -> None:
    other = {
        "ExponentialLR(optimizer, gamma=0.9)": "OneCycleLR(optimizer, 0.01, total_steps=30)",
        "run.done == run.n_steps": "True",
    }
    assert_resumes(replaced(changed(SCRIPT, change("scheduler")), SHORT | other), tmp_path, execute)


def test_tracker_gets_each_epoch_once(tmp_path: Path, execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    tracker = SimpleNamespace(log=lambda record, step: logged.append((step, record)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: tracker))
    assert_resumes(replaced(changed(SCRIPT, change("tracker")), SHORT), tmp_path, execute)
    # The second run was killed after the first epoch's state was saved, and before it was logged.
    assert [step for step, _ in logged] == [record["epoch"] for _, record in logged] == [1, 2, 3, 2, 3]


def test_early_stopping_ends_a_run_for_good(execute: Execute) -> None:
    still = {"lr=3e-3": "lr=1e-30"}  # the first epoch stays the best
    script = replaced(changed(SCRIPT, change("early stopping")), {**SHORT, "epochs=10": "epochs=9", **still})
    for _ in range(2):
        assert [record["epoch"] for record in execute(script, "run")["run"].history] == [1, 2, 3, 4]


def test_averaged_weights_are_written_as_a_model(tmp_path: Path, execute: Execute) -> None:
    names = execute(replaced(changed(SCRIPT, change("averaged weights")), SHORT), "run")
    path = tmp_path / "run/waves/ema.pth.tar"
    averaged, _ = checkpoint.load_model(path, "waves", names["build_model"], torch.device("cpu"))
    assert same(averaged.state_dict(), names["ema"].module.state_dict())
    assert not same(averaged.state_dict(), names["model"].state_dict())


def test_script_runs_and_a_second_time_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "waves.py").write_text(replaced(SCRIPT, SHORT))
    first, second = (run_warm(str(tmp_path / "waves.py"), cwd=tmp_path) for _ in range(2))
    for done in (first, second):
        assert_ended(done)
    assert "nothing left to do" in second.stdout
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names of the page's Python: the script's, and those of the blocks after it."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.py"
    path.write_text("\n".join([replaced(SCRIPT, SHORT), *PYTHON[1:]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path(str(path))


@pytest.mark.parametrize(("name", "event"), [("one", ()), ("six", (6,))])
def test_poisson_trains(name: str, event: tuple[int, ...], names: dict[str, Any]) -> None:
    torch.manual_seed(0)
    likelihood, z, x = names[name], torch.randn(2, 5, 8), torch.randint(9, (5, *event)).float()
    expected = torch.distributions.Poisson(likelihood.mean(z)).log_prob(x).reshape(2, 5, -1).sum(dim=-1)
    torch.testing.assert_close(likelihood.log_prob(z, x), expected)
    assert likelihood.sample(z).shape == (2, 5, *event)
    encoder = SmallEncoder(math.prod(event), 8)
    model = MVAE(encoders={"count": encoder}, likelihoods={"count": likelihood}, n_latents=8)
    model.check({"count": x})
    for wrong in (x - 9, x + 0.5, x.unsqueeze(-1)):
        with pytest.raises(UsageError, match="count: "):
            model.check({"count": wrong})
    loss, _ = Objective(model)({"count": x})
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in likelihood.parameters())


def test_tempered_fusion_multiplies_precisions(names: dict[str, Any]) -> None:
    mu, logvar, present = torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.tensor([[[True], [False]]])
    found_mu, found_logvar = names["tempered"](mu, logvar, present)
    torch.testing.assert_close(found_logvar, torch.full((1, 3, 4), 1.5).log().neg())
    torch.testing.assert_close(found_mu, torch.full((1, 3, 4), 0.5 / 1.5))


def test_mixtures_are_sums_of_terms(names: dict[str, Any]) -> None:
    assert names["mmvae"].names == ("wave", "kind")
    assert names["mopoe"].names == ("wave", "kind", "joint")
    assert {term.reconstructs for term in names["mopoe"].terms} == {("wave", "kind")}


def test_folder_of_the_script_has_the_tools(tmp_path: Path) -> None:
    """The script is cut at its comments, and datasets.py gets the page's names; two scripts are copied from mnist."""
    imports, data, networks, training = re.split(r"^# (?:Data|Networks|Training): .*$", SCRIPT, flags=re.MULTILINE)
    (more,) = [block for block in PYTHON if "CONTROLS" in block]
    training = "from datasets import *\nfrom model import *\n" + training
    files = {"datasets.py": data + more, "model.py": networks, "train.py": replaced(training, SHORT)}
    for name, text in files.items():
        (tmp_path / name).write_text(imports + text)
    for name in ("sample.py", "loglike.py"):
        text = (ROOT / "mnist" / name).read_text()
        (tmp_path / name).write_text(re.sub("image", "wave", re.sub("text", "kind", text)))
    assert_ended(run_warm(str(tmp_path / "train.py"), cwd=tmp_path))
    best = "waves/model_best.pth.tar"
    (tmp_path / "embed.py").write_text("import runpy\nrunpy.run_module('mvae.tools.embed', run_name='__main__')")
    assert_ended(run_warm(str(tmp_path / "embed.py"), best, "--plot", "map.png", cwd=tmp_path))
    assert_ended(run_warm(str(tmp_path / "sample.py"), best, "--condition-on-kind", "saw,square", cwd=tmp_path))
    assert_ended(run_warm(str(tmp_path / "loglike.py"), best, "--limit", "20", "--n-samples", "10", cwd=tmp_path))
    assert {"latents.npz", "map.png", "sample_wave.png", "sample_kind.txt"} <= {
        path.name for path in tmp_path.iterdir()
    }
