"""A run of several processes: it trains, reports and resumes as one process does, and a lost one is an error."""

import itertools
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mvae.run.run
from mvae import MVAE, Data, Objective, Term, UsageError, UserError
from mvae.data.dataset import permuted_rows, seed_of
from mvae.model import Batch
from mvae.run import checkpoint
from mvae.run.distributed import Processes
from mvae.run.validation import measured

import pytest
import torch
from torch import Tensor, nn

from helpers import (
    FORKED,
    SHORT,
    SmallEncoder,
    assert_same_run,
    at_call,
    command,
    run_small,
    run_two,
    same,
    small_data,
    small_model,
    start_warm,
    stats,
    torchruns_variables,
    without_times,
)


def label_value(model: MVAE, batch: Batch) -> Tensor:
    return batch["label"].float()


def normed_model() -> MVAE:
    """Return the small model with batch norm, whose running statistics the processes have each for itself."""
    model = small_model()
    model.encoders["attrs"] = nn.Sequential(nn.BatchNorm1d(4), SmallEncoder(4))
    return model


def run_as(
    variables: dict[str, str],
    folder: Path,
    *,
    n: int = 24,
    normed: bool = False,
    present: dict[str, Tensor] | None = None,
    stop: tuple[int, int] | None = None,
    lost: int | None = None,
    seeds: tuple[int, int] = (0, 0),
    hasty: int | None = None,
    **how: Any,
) -> None:
    """Be one process of a small run on a disk of its own; save what it has seen, drawn and made.

    stop: the rank of a process that gets SIGTERM, and the step; 0 is in the first validation. lost: the rank of one
    that ends without a word in its third step. seeds: one of each process. hasty: the rank of one whose clock advances
    by an hour whenever it is read.
    """
    os.environ.update(variables)
    torch.set_num_threads(1)
    rank = int(variables.get("RANK", "0"))
    (folder / f"disk {rank}").mkdir(exist_ok=True)
    os.chdir(folder / f"disk {rank}")
    if hasty == rank:
        clock = itertools.count(step=3600).__next__
        vars(mvae.run.run)["time"] = SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter)
    seen: list[list[int]] = []
    drawn: list[int] = []
    records: list[Any] = []
    refused = ""

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(rows["number"].tolist())
        drawn.append(torch.initial_seed())
        if stop == (rank, len(seen) - 1) and len(seen) > 1:  # the first call checks the data
            signal.raise_signal(signal.SIGTERM)
        if lost == rank and len(seen) == 4:
            os._exit(0)
        return {name: tensor for name, tensor in rows.items() if name != "number"}

    def signalled(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return rows

    model = normed_model() if normed else small_model()
    tensors = {**small_data(n, seed=0).tensors, "number": torch.arange(n)}
    train = Data(tensors=tensors, transform=transform, present=present)
    validation = small_data(14, seed=1, transform=at_call(1, signalled) if stop == (rank, 0) else dict)
    how = {"batch_size": 5, "seed": seeds[rank], "metrics": {"value": label_value}, **how}
    try:
        records = run_small(Path("run"), train=train, validation=validation, model=model, **how).history
    except UserError as error:
        refused = f"{type(error).__name__}: {error}"
    found = {"seen": seen[1:], "drawn": drawn[1:], "records": without_times(records), "refused": refused}
    torch.save({**found, "model": model.state_dict()}, folder / f"{rank}.pt")


def run_in(n_processes: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train the small model in several processes; return what each has seen, drawn and made."""
    folder.mkdir(exist_ok=True)
    variables = torchruns_variables(n_processes)
    group = [FORKED.Process(target=run_as, args=(some, folder), kwargs=options) for some in variables]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=300)
        process.kill()  # if it hasn't ended
    assert [process.exitcode for process in group] == [0] * n_processes
    assert not list(folder.glob("disk [1-9]/*"))
    found = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]
    for path in folder.glob("*.pt"):
        path.unlink()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A run of two processes with unequal shares of each batch: its folder, and what each has seen. Read-only."""
    folder = tmp_path_factory.mktemp("two")
    first, second = run_in(2, folder, n_subsets=1)
    return folder / "disk 0/run", first, second


# What each process does


def test_two_processes_share_each_batch_and_draw_nothing_alike(two: Any) -> None:
    _, *found = two
    numbers = Data(tensors={"number": torch.arange(24)})
    batches = [rows.tolist() for epoch in (1, 2) for rows in permuted_rows(numbers, 5, seed_of(0, epoch))]
    assert len(batches) == 8
    for rows, first, second in zip(batches, *(process["seen"] for process in found), strict=True):
        assert (rows[::2], rows[1::2]) == (first, second)
    drawn = {seed for process in found for seed in process["drawn"][:8]}
    assert len(drawn) == 16
    assert not drawn & {seed_of(0, epoch, step, 0) for epoch in (1, 2) for step in range(4)}


def test_two_processes_make_the_run_of_one(two: Any, tmp_path: Path) -> None:
    """To rounding: gradients of unequal shares, noise, subsets, validation and metrics. Their number may change."""
    folder, first, second = two
    (one,) = run_in(1, tmp_path / "one", n_subsets=1)
    run_in(2, tmp_path / "first", epochs=1, n_subsets=1)
    (resumed,) = run_in(1, tmp_path / "first", resume=True, n_subsets=1)
    for found in (first, second, resumed):
        torch.testing.assert_close(found["model"], one["model"], rtol=1e-4, atol=1e-5)
        for record, expected in zip(found["records"], one["records"], strict=True):
            assert record == pytest.approx(expected, rel=1e-4)
            assert "validation/value" in record
    assert same(first["model"], second["model"])
    assert first["records"] == second["records"] == without_times(stats(folder))


@pytest.mark.parametrize(("rank", "step"), [(0, 0), (1, 6)])
def test_two_processes_of_which_one_gets_a_signal_stop_and_resume_as_one(
    rank: int, step: int, two: Any, tmp_path: Path
) -> None:
    """In the first validation, or within the second epoch."""
    place = "epoch 1, step 4 of 4" if step == 0 else "epoch 2, step [23] of 4"  # they don't agree after each step
    first, second = run_in(2, tmp_path, stop=(rank, step), n_subsets=1)
    assert re.match(f"Stopped: stopped in {place}; the state is saved", first["refused"])
    assert first["refused"] == second["refused"]
    run_in(2, tmp_path, resume=True, n_subsets=1)
    assert_same_run(tmp_path / "disk 0/run", two[0], "small")


def test_two_processes_save_when_one_of_them_finds_it_due(two: Any, tmp_path: Path) -> None:
    run_in(2, tmp_path / "lost", hasty=1, lost=1, n_subsets=1)
    assert checkpoint.load(tmp_path / "lost/disk 0/run" / checkpoint.LATEST, "small")["done"] == 2
    run_in(2, tmp_path / "whole", hasty=1, n_subsets=1)
    assert_same_run(tmp_path / "whole/disk 0/run", two[0], "small")


def test_two_processes_validate_the_model_that_is_saved(tmp_path: Path) -> None:
    """The examples are fewer than a batch. Each process has its own running statistics of batch norm."""
    first, second = run_in(2, tmp_path, n=5, batch_size=8, normed=True)
    assert [len(rows) for rows in first["seen"]] == [3, 3]
    assert [len(rows) for rows in second["seen"]] == [2, 2]
    assert same(first["model"], second["model"])
    objective = Objective(normed_model())
    objective.model.load_state_dict(checkpoint.load(tmp_path / "disk 0/run" / checkpoint.LATEST, "small")["model"])
    found = measured(
        objective, small_data(14, seed=1), {"value": label_value}, batch_size=8, seed=0, precision="fp32",
        processes=Processes(0, 1), between=lambda: None,
    )  # fmt: skip
    for record in (first["records"][-1], second["records"][-1]):
        assert {name: record[f"validation/{name}"] for name in found} == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"present": {"label": torch.arange(24) % 6 == 0}},
        {"terms": [Term(("image",), ("image",)), Term(("attrs", "label"), ("label",))]},
    ],
    ids=["missing labels", "unused networks"],
)
def test_two_processes_train_where_a_network_has_no_gradient(how: dict[str, Any], tmp_path: Path) -> None:
    (alone,) = run_in(1, tmp_path / "one", **how, epochs=1)
    first, second = run_in(2, tmp_path / "two", **how, epochs=1)
    assert same(first["model"], second["model"])
    torch.testing.assert_close(first["model"], alone["model"], rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"batch_size": 1}, ["a batch needs at least 1 examples per process, got 1, 24"] * 2),
        ({"seeds": (0, 1)}, ["another process of this run is gone", "need the same settings; seed differ"]),
        ({"lost": 0}, ["UserError: another process of this run is gone .*the last saved state is kept$"]),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_processes_that_do_not_fit_or_are_lost_are_one_error(
    how: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    for process, words in zip(run_in(2, tmp_path, **how), said, strict=True):
        assert re.search(words, process["refused"]), process["refused"]
        assert "\n" not in process["refused"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE=4, RANK=\(not set\), MASTER_ADDR=\(not set\)"),
        ({"RANK": "2"}, r"WORLD_SIZE=\(not set\), RANK=2"),
        ({"WORLD_SIZE": "2", "RANK": "first", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=first"),
    ],
)
def test_some_of_torchruns_variables_are_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{said}.*must be as torchrun sets them"):
        Processes.join(torch.device("cpu"))


def test_process_whose_torchrun_is_gone_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    asked = [Processes(0, 2, launcher).abandoned() for launcher in (None, parent, parent + 1)]
    assert asked == [0, 0, signal.SIGTERM]
    monkeypatch.setattr(Processes, "abandoned", lambda self: signal.SIGTERM)
    with pytest.raises(UserError, match="stopped in epoch 1, step 1 of 4"):
        run_small(tmp_path)


# The script under torchrun


def test_torchrun_is_stopped_and_resumed_bit_for_bit(digits_dir: Path, tmp_path: Path) -> None:
    """In the second of two stages. Two processes that are started one by one continue; two others never stop."""
    flags = ["--data-dir", str(digits_dir), *SHORT, "--images-first", "1", "--epochs", "1", "--n-paired", "300"]
    resume = [*flags, "--out-dir", "run", "--resume"]
    said, of_second = run_two("mnist/train.py", *flags, "--out-dir", "straight", cwd=tmp_path)
    assert said.count("epochs of 1,000 examples") == said.count("2 x cpu (1 thread)") == 2
    assert said.count("(validation ") == 2
    assert of_second == ""
    (record,) = stats(tmp_path / "straight")
    assert record["seconds"] * record["examples_per_second"] == pytest.approx(1000)

    (tmp_path / "torchrun.py").write_text("from torch.distributed.run import main\nmain()")
    words = ["--standalone", "--nproc_per_node", "2", *command("mnist/train.py")[1:], *resume]
    out, err = tmp_path / "out", tmp_path / "err"
    out.touch()
    torchrun = start_warm(str(tmp_path / "torchrun.py"), *words, logs=(out, err), cwd=tmp_path)
    while "step 5/20" not in out.read_text().partition("writing to run\n")[2]:
        assert torchrun.is_alive(), err.read_text()
        time.sleep(0.05)
    torchrun.terminate()
    torchrun.join(timeout=300)
    (line,) = {line for line in err.read_text().splitlines() if line.startswith("train.py: ")}
    assert re.fullmatch(r"train.py: stopped in epoch 1, step \d+ of 20; the state is saved: .*", line)
    run_two("mnist/train.py", *resume, cwd=tmp_path)
    assert_same_run(tmp_path / "run/images", tmp_path / "straight/images")
    assert_same_run(tmp_path / "run", tmp_path / "straight")
