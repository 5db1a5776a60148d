"""loglike.py in parts: array jobs. The parts of a split join to the numbers of the whole, bit for bit."""

import json
import shlex
from pathlib import Path

from mvae import Data
from mvae.errors import UserError
from mvae.run.evaluate import evaluate, mean_and_error, of_a_pair, shown
from mvae.tools import report

import numpy as np
import pytest
import torch

from helpers import ROOT, Trained, assert_ended, assert_refused, run_warm, small_data, small_model

N_SAMPLES = 200  # 6 examples in a batch


@pytest.fixture(scope="module")
def parts(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole split, `whole`, and of its parts of other sizes: .npz and .json."""
    folder = tmp_path_factory.mktemp("parts")
    slices = {"whole": [], "1": ["--limit", 100], "2": ["--offset", 100, "--limit", 1], "3": ["--offset", 101]}
    for name, rows in slices.items():
        files = ["--per-example", f"{name}.npz", "--json", f"{name}.json"]
        words = ["model_best.pth.tar", "--data-dir", digits_dir, "--n-samples", N_SAMPLES, *files, *rows]
        words[0] = trained.out_dir / str(words[0])
        done = run_warm("mnist/loglike.py", *words, cwd=folder)
        assert_ended(done)
        (folder / f"{name}.txt").write_text(done.stdout)
    return folder


def test_parts_join_to_the_whole_bit_for_bit(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command of docs/cluster.md, in any order."""
    page = (ROOT / "docs/cluster.md").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("python -m mvae.tools.report")]
    monkeypatch.chdir(parts)
    monkeypatch.setattr("sys.argv", ["report", *(f"{i}.npz" for i in (3, 1, 2)), *shlex.split(command)[-2:]])
    report.main()
    whole, joined = json.loads(Path("whole.json").read_text()), json.loads(Path("joined.json").read_text())
    assert joined["n_examples"] == whole["n_examples"] == 300
    assert joined["log_likelihood"] == whole["log_likelihood"]
    printed, said = capsys.readouterr().out, Path("whole.txt").read_text()
    assert said[said.index("quantity") :].splitlines()[:-1] == printed[printed.index("quantity") :].splitlines()
    files = [np.load(f"{name}.npz") for name in ("whole", "1", "2", "3")]
    for name in ("example", "log_p", "log_weight_variance"):
        assert np.array_equal(files[0][name], np.concatenate([file[name] for file in files[1:]]))


def test_files_that_do_not_join_are_refused(parts: Path) -> None:
    with pytest.raises(UserError, match="100 examples are in more than one"):
        report.join([parts / "1.npz", parts / "whole.npz"])
    with pytest.raises(UserError, match=r"absent\.npz is missing, or not an \.npz file"):
        report.join([parts / "1.npz", parts / "absent.npz"])
    with pytest.raises(UserError, match=r"1\.json is missing, or not an \.npz file"):
        report.join([parts / "1.json"])


def test_one_example_has_no_standard_error(parts: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert mean_and_error(torch.tensor([3.0])) == (3, None)
    assert shown(*mean_and_error(torch.tensor([3.0])), digits=2) == "3.00 ± –"
    assert not recwarn.list
    found = json.loads((parts / "2.json").read_text())
    assert {one["standard_error"] for one in [*found["log_likelihood"], *found["measures"].values()]} == {None}
    assert (parts / "2.txt").read_text().count(" ± –") == 11


def test_parts_of_data_that_lack_modalities_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch holds 4 examples that lack the same."""
    monkeypatch.setattr("mvae.run.evaluate.VALUES_PER_CALL", (3 * 4 * 36, 0))
    data = small_data(50, seed=0, present={"attrs": torch.arange(50) % 3 > 0})
    quantities = of_a_pair(("image",), ("attrs",))

    def found(data: Data, rows: range | None = None) -> list[torch.Tensor]:
        how = {"n_samples": 3, "predictions": {"label": ("image",)}, "rows": rows}
        got = evaluate(small_model(), data, quantities=quantities, **how)  # type: ignore[arg-type]
        return [*(one.log_p for one in got.estimates.values()), *got.examples.values(), got.predictions["label"]]

    for whole, *some in zip(found(data), found(data, range(21)), found(data, range(21, 50)), strict=True):
        assert torch.equal(whole, torch.cat(some))


def test_wrong_slices_are_refused(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    best = trained.out_dir / "model_best.pth.tar"
    done = run_warm("mnist/loglike.py", best, "--data-dir", digits_dir, "--offset", 300, cwd=tmp_path)
    assert_refused(done, 2, "offset must be below 300, the number of examples, got 300")
    assert_refused(run_warm("mnist/loglike.py", best, "--limit", 0, cwd=tmp_path), 2, "limit must be an integer >= 1")
