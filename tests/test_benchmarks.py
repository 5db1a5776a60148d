"""Benchmarks run as their docstrings say, as short as possible."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace
from typing import Any

from mvae import Data, cli
from synthetic import __main__ as synthetic

import pytest

from helpers import ROOT, run_warm, script


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import the benchmarks as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def forked(command: list[str], env: dict[str, str], cwd: Path | None = None, **_: Any) -> CompletedProcess[str]:
    return run_warm(*command[1:], cwd=cwd, env=env)


FORKED = SimpleNamespace(run=forked, TimeoutExpired=TimeoutExpired)
"""In place of the module subprocess: what a benchmark runs is forked from a process that has torch."""


@pytest.mark.parametrize("name", ["mnist", "multimnist"])
def test_the_plain_reference_computes_our_loss(benchmarks: None, name: str) -> None:
    import step

    step.check(name, step.prepare(name, step.Setting()), step.Setting())


def test_a_step_of_a_gpu_asks_it_for_nothing_and_launches_little_around_the_objective(benchmarks: None) -> None:
    """On the meta device, where asking for a value fails."""
    import launches

    found = launches.count("celeba19")
    assert found["objective"] > 100
    assert (found["batch"], found["rest"], found["optimizer"]) == (5, 8, 2)


def test_gpu_py_measures_each_experiment_and_says_what_it_left_out(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the CPU, two of them with batches of four examples; of the scripts only mnist's."""
    import gpu

    def few(make: Callable[[], Data]) -> Callable[[], Data]:
        return lambda: make()[:40]

    monkeypatch.setattr(gpu, "NAMES", ("mnist", "celeba19"))
    for name in gpu.NAMES:
        experiment = gpu.EXPERIMENTS[name]
        monkeypatch.setitem(gpu.EXPERIMENTS, name, experiment._replace(data=few(experiment.data), batch_size=4))
    compare = gpu.resumed_difference
    monkeypatch.setattr(gpu, "resumed_difference", lambda name, *rest: compare(name, *rest) if name == "mnist" else 0.0)

    monkeypatch.setattr(gpu, "subprocess", FORKED)
    path = tmp_path / "gpu.json"
    words = ["gpu.py", "--device", "cpu", "--quick", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    found = json.loads(path.read_text())
    assert (found["left_out"], found["failed"]) == ([], {})
    assert found["scripts"] == dict.fromkeys(gpu.NAMES, 0.0)
    assert all(row["products_floor_ms"] < row["eager_ms"] for row in found["steps"].values())
    assert len(found["steps"]) == len(found["likelihoods"]) == 2
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "0"])
    gpu.main()
    found = json.loads(path.read_text())
    assert found["left_out"][0] == "scripts: mnist"
    assert (len(found["left_out"]), found["failed"]) == (5, {})


def test_methods_learn_from_few_labels_and_are_not_run_again(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weak_supervision

    monkeypatch.setattr(weak_supervision, "STEPS", 100)
    synthetic.main(["digits", str(tmp_path / "data"), "--train", "5300", "--test", "100"])
    methods = ["shifted", "graph_net"]
    words = ["mnist", "--n", 2000, "--seeds", 0, "--methods", *methods, "--data-dir", "data"]
    monkeypatch.setattr(sys, "argv", ["weak_supervision.py", *map(str, words)])
    monkeypatch.chdir(tmp_path)
    weak_supervision.main()
    for method in methods:
        path = tmp_path / "results" / "weak" / f"mnist-{method}-2000-0.json"
        found = json.loads(path.read_text())
        assert (found["n"], found["seed"], found["n_examples"]) == (2000, 0, 100)
        assert 0.5 < found["measures"]["accuracy"]["mean"] <= 1
        path.write_text("stays")
    weak_supervision.main()
    assert path.read_text() == "stays"


@pytest.mark.parametrize("folder", ["mnist", "celeba"])
def test_train_knows_the_flags_of_each_recipe(benchmarks: None, folder: str) -> None:
    import recipes

    with script(f"{folder}/train.py") as train:
        for name, grid in recipes.GRIDS.items():
            if folder == "mnist" or name in ("fast", "longer"):
                for flags in grid.recipes.values():
                    cli.parse("", train.PRESETS, [*grid.train, *flags])


def test_a_recipe_leaves_the_files_of_the_tables_once(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fast` itself, with an epoch of few examples and few draws."""
    import recipes

    synthetic.main(["digits", str(tmp_path / "data"), "--train", "300", "--test", "20"])
    short = {"mnist/train.py": ["--n-val", "100", "--epochs", "1"], "benchmarks/quality.py": ["--n-draws", "50"]}
    call = recipes.call
    monkeypatch.setattr(recipes, "subprocess", FORKED)
    monkeypatch.setattr(recipes, "call", lambda name, *words: call(name, *words, *short.get(name, [])))
    monkeypatch.chdir(tmp_path)
    config = recipes.Config(experiment="mnist", grid="fast", n_samples=3, flags="--data-dir data")
    recipes.run(config, "fast", seed=3)
    found: dict[str, Any] = json.loads(Path("results/mnist-fast-3.json").read_text())
    assert (found["n_examples"], found["n_samples"], found["training"]["settings"]["seed"]) == (20, 3, 3)
    assert len(Path("results/curves-mnist-fast-3.jsonl").read_text().splitlines()) == 1
    quality = json.loads(Path("results/quality-mnist-fast-3.json").read_text())
    assert quality["training"]["validation_loss"] == found["training"]["validation_loss"]
    assert (quality["split"], quality["n_real"]) == ("test", 20)
    Path("results/mnist-fast-3.json").write_text("stays")
    recipes.run(config, "fast", seed=3)
    assert Path("results/mnist-fast-3.json").read_text() == "stays"
