"""Benchmarks run as their docstrings say, here as short as they can be."""

import json
import sys
from pathlib import Path

from mvae.synthetic import __main__ as synthetic

import pytest

from helpers import ROOT, assert_ended, environment, run


def test_threads_are_compared_beside_other_processes(tmp_path: Path) -> None:
    words = ["--experiments", "mnist", "--busy", 0, 1, "--rounds", 1, "--seconds", 0.01, "--json", "threads.json"]
    assert_ended(run("benchmarks/threads.py", *words, cwd=tmp_path))
    rows = json.loads((tmp_path / "threads.json").read_text())["rows"]
    assert [(row["busy"], row["way"]) for row in rows[:2]] == [(0, "1 thread"), (0, "1 thread, memory kept")]
    assert rows[0]["rate"] == [1.0, 1.0, 1.0]
    assert len(rows) == 10
    assert all(row["rate"][1] > 0 for row in rows)


def test_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "multivae.py").write_text("raise ImportError(name='multivae')")
    done = run("benchmarks/peer.py", cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stderr) == (1, "peer.py: multivae is missing: pip install multivae\n")


def test_methods_learn_from_few_pairs_and_are_not_run_again(tmp_path: Path) -> None:
    synthetic.main(["digits", str(tmp_path / "data"), "--train", "5300", "--test", "100"])
    words = ["mnist", "--n", 2000, "--seeds", 0, "--methods", "dropout", "logistic", "--data-dir", "data"]
    assert_ended(run("benchmarks/weak_supervision.py", *words, cwd=tmp_path))
    for method in ("dropout", "logistic"):
        path = tmp_path / "results" / "weak" / f"mnist-{method}-2000-0.json"
        found = json.loads(path.read_text())
        assert (found["n"], found["seed"], found["n_examples"]) == (2000, 0, 100)
        assert 0.5 < found["measures"]["accuracy"]["mean"] <= 1
        path.write_text("stays")
    assert_ended(run("benchmarks/weak_supervision.py", *words, cwd=tmp_path))
    assert path.read_text() == "stays"


def test_a_recipe_leaves_what_the_tables_are_made_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` itself, with an epoch of few examples."""
    synthetic.main(["digits", str(tmp_path / "data"), "--train", "5200", "--test", "20"])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipes

    fast = recipes.GRIDS["fast"]
    monkeypatch.setitem(recipes.GRIDS, "fast", fast._replace(train=[*fast.train, "--epochs", "1"]))
    monkeypatch.chdir(tmp_path)
    words = ["recipes.py", "mnist", "fast", "--seeds", "3", "--n-samples", "3", "--flags=--data-dir data"]
    monkeypatch.setattr(sys, "argv", words)
    recipes.main()
    found = json.loads(Path("results/mnist-fast-3.json").read_text())
    assert (found["n_examples"], found["n_samples"], found["training"]["settings"]["seed"]) == (20, 3, 3)
    assert len(Path("results/curves-mnist-fast-3.jsonl").read_text().splitlines()) == 1
    coherence = json.loads(Path("results/coherence-mnist-fast-3.json").read_text())
    assert coherence["training"]["validation_loss"] == found["training"]["validation_loss"]
    Path("results/mnist-fast-3.json").write_text("stays")
    recipes.main()
    assert Path("results/mnist-fast-3.json").read_text() == "stays"
