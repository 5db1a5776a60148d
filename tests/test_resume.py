"""What a run leaves and survives: resuming, signals, kills, full disks, settings, numbers that aren't finite."""

import contextlib
import dataclasses
import functools
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from mvae import checkpoint
from mvae.data import Data
from mvae.errors import UsageError, UserError
from mvae.files import locked
from mvae.likelihoods import Bernoulli
from mvae.model import MVAE, Batch
from mvae.objective import Objective, Term
from mvae.schedules import constant, late
from mvae.training import Options, Stopped, fit

from helpers import (
    SHORT,
    SmallEncoder,
    Trained,
    assert_ended,
    assert_refused,
    assert_same_run,
    at_call,
    command,
    environment,
    fit_small,
    run,
    run_warm,
    same,
    small_data,
    small_model,
    start_warm,
    stats,
    without_times,
)

WHICH = ("train", "validation")


def part(record: dict[str, Any], which: str) -> dict[str, Any]:
    """Of an epoch's record, what is about training or validation, by the names of `Totals.means`."""
    return {name.removeprefix(f"{which}/"): value for name, value in record.items() if name.startswith(f"{which}/")}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, less TensorBoard's and the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the folder of three trained epochs, to be written to."""
    return Path(shutil.copytree(trained.out_dir, tmp_path / "copied"))


# Stopping and resuming the script.


def run_until(line: str, number: signal.Signals, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs mnist/train.py, and sends it a signal when it prints a line with these words."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("mnist/train.py", *arguments), cwd=cwd, env=environment(), **pipes) as process:
        assert process.stdout
        said = next((said for said in process.stdout if line in said), "the run ended before")
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert line in said, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_that_a_signal_stopped_is_resumed_bit_for_bit(
    number: signal.Signals, status: int, trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    flags = ["--data-dir", digits_dir, "--out-dir", tmp_path / "run", "--epochs", "3", *SHORT]
    stopped = run_until("epoch 2  step 5/20", number, *flags, cwd=tmp_path)
    assert_refused(stopped, status, "stopped at epoch 2, step", "saved", "--resume")
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "mnist")["step"] >= 5
    assert_ended(run_warm("mnist/train.py", *flags, "--resume", cwd=tmp_path))
    assert_same_run(tmp_path / "run", trained.out_dir)


def test_run_killed_at_random_moments_goes_on_to_be_the_straight_run(digits_dir: Path, tmp_path: Path) -> None:
    """The processes are forked from one that has imported torch, so that 12 of them start in a moment each."""
    log, killed = tmp_path / "log", tmp_path / "killed"
    flags = ["--data-dir", digits_dir, "--n-val", "100", "--limit", "100", "--batch-size", "50", "--resume"]

    def start(out_dir: Path, epochs: int) -> BaseProcess:
        log.write_text("")
        arguments = [*flags, "--out-dir", out_dir, "--epochs", epochs, "--log-interval", "1"]
        return start_warm("mnist/train.py", *arguments, logs=(log, tmp_path / "errors"), cwd=tmp_path)

    def said() -> str:
        return log.read_text() + (tmp_path / "errors").read_text()

    def wait_for(words: str, process: BaseProcess) -> None:
        while words not in log.read_text():
            assert process.is_alive(), said()
            time.sleep(0.01)

    def kill(process: BaseProcess) -> None:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, said()

    process = start(killed, epochs=10_000)
    wait_for("epoch 1  beta", process)
    started = time.monotonic()
    wait_for("epoch 4  beta", process)
    epoch_seconds = (time.monotonic() - started) / 3
    kill(process)

    epoch, rng = 0, np.random.default_rng(0)
    for _ in range(12):
        saved = checkpoint.load(killed / checkpoint.LATEST, "mnist")
        checkpoint.load(killed / checkpoint.BEST, "mnist")
        assert saved["epoch"] >= epoch
        epoch = saved["epoch"]
        reported = [record["epoch"] for record in stats(killed)]
        assert reported == list(range(1, len(reported) + 1))
        assert epoch - 2 <= len(reported) <= epoch - 1  # a kill between the two files leaves the last epoch unreported
        process = start(killed, epochs=10_000)
        if rng.random() < 0.8:  # else the kill may come before the first step
            wait_for("step", process)
        time.sleep(rng.uniform(0, 2 * epoch_seconds))
        kill(process)

    epochs = checkpoint.load(killed / checkpoint.LATEST, "mnist")["epoch"]
    for out_dir in (killed, tmp_path / "straight"):
        process = start(out_dir, epochs)
        process.join()
        assert process.exitcode == 0, said()
    assert_same_run(killed, tmp_path / "straight")


# Stopping and resuming at any step, in this process.


@pytest.mark.parametrize("step", range(1, 9))
def test_run_stopped_after_any_step_is_resumed_bit_for_bit(step: int, tmp_path: Path) -> None:
    def stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        return rows

    fit_small(tmp_path / "straight")
    with pytest.raises(Stopped) as stopped:
        fit_small(tmp_path / "run", train=small_data(24, seed=0, transform=at_call(step, stop)))
    assert stopped.value.status == 130
    assert f"epoch {(step + 3) // 4}, step {(step - 1) % 4 + 1} of 4" in str(stopped.value)
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


@pytest.mark.parametrize("options", [{}, {"approx_m": 2}, {"precision": "bf16"}])
def test_run_that_is_given_more_epochs_is_the_straight_run(options: dict[str, Any], tmp_path: Path) -> None:
    fit_small(tmp_path / "straight", **options)
    fit_small(tmp_path / "run", epochs=1, **options)
    fit_small(tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_signal_that_comes_twice_at_once_is_one_request(tmp_path: Path) -> None:
    def stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return rows

    with pytest.raises(Stopped) as stopped:
        fit_small(tmp_path, train=small_data(24, seed=0, transform=at_call(2, stop)))
    assert stopped.value.status == 143
    assert checkpoint.load(tmp_path / checkpoint.LATEST, "small")["step"] == 2


def test_signal_that_comes_again_later_ends_a_step_that_hangs(tmp_path: Path) -> None:
    def hang(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        return rows

    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path, train=small_data(24, seed=0, transform=at_call(2, hang)))


def test_signal_in_validation_stops_at_its_next_batch_and_keeps_the_epochs_steps(tmp_path: Path) -> None:
    def stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return rows

    batches: list[int] = []

    def count(model: MVAE, batch: Batch) -> Tensor:
        batches.append(len(batch["label"]))
        return torch.zeros(batches[-1])

    validation = small_data(18, seed=1)
    fit_small(tmp_path / "straight", validation=validation, metrics={"zero": count})
    batches.clear()
    stopping = dataclasses.replace(validation, transform=at_call(2, stop))
    with pytest.raises(Stopped, match="epoch 1, step 4 of 4"):
        fit_small(tmp_path / "run", validation=stopping, metrics={"zero": count})
    assert batches == [6, 6]
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")["step"] == 4
    fit_small(tmp_path / "run", validation=validation, metrics={"zero": count}, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_second_signal_in_validation_keeps_the_epochs_steps(tmp_path: Path) -> None:
    def hang(model: MVAE, batch: Batch) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(batch["label"]))

    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path / "run", metrics={"zero": hang})
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")["step"] == 4
    fit_small(tmp_path / "straight")
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_signal_that_comes_again_while_the_state_is_saved_waits_for_it(tmp_path: Path) -> None:
    saves: list[int] = []

    def again(*_: object) -> None:
        saves.append(len(saves))
        if len(saves) == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.1)
            signal.raise_signal(signal.SIGINT)

    model = small_model()
    model.register_state_dict_pre_hook(again)
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", model=model)
    saved = checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")
    assert (saved["epoch"], saved["step"]) == (2, 1)
    fit_small(tmp_path / "run", resume=True)
    fit_small(tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_stops_a_run_unless_it_is_to_be_ignored(ignored: bool, tmp_path: Path) -> None:
    def hang_up(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGHUP)
        return rows

    train = small_data(24, seed=0, transform=at_call(2, hang_up))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)  # nohup ignores it
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(Stopped, match="epoch 1, step 2 of 4"):
            fit_small(tmp_path, train=train)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.load(tmp_path / checkpoint.LATEST, "small")["epoch"] == (3 if ignored else 1)


def die(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    raise InterruptedError("as a kill")


@pytest.mark.parametrize(("minutes", "step"), [(1e-9, 2), (10, 0)])
def test_state_is_saved_within_an_epoch_by_time(minutes: float, step: int, tmp_path: Path) -> None:
    fit_small(tmp_path / "straight")
    fit_small(tmp_path / "run", epochs=1)
    train = small_data(24, seed=0, transform=at_call(3, die))
    with pytest.raises(InterruptedError):
        fit_small(tmp_path / "run", train=train, save_every=minutes, resume=True)
    saved = checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")
    assert (saved["epoch"], saved["step"]) == (2, step)
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_state_is_saved_once_in_that_time(tmp_path: Path) -> None:
    """The first step of eight takes longer than a second, and the others less."""
    saves: list[str] = []

    def slow(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(1.1)
        return rows

    model = small_model()
    model.register_state_dict_pre_hook(lambda *_: saves.append("saved"))
    fit_small(tmp_path, model=model, train=small_data(24, seed=0, transform=at_call(1, slow)), save_every=1 / 60)
    assert 1 + 2 <= len(saves) < 8


def test_time_of_an_epochs_steps_before_a_stop_counts(tmp_path: Path) -> None:
    def slow_and_stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(0.3)
        signal.raise_signal(signal.SIGTERM)
        return rows

    with pytest.raises(Stopped):
        fit_small(tmp_path, train=small_data(24, seed=0, transform=at_call(1, slow_and_stop)))
    record, _ = fit_small(tmp_path, resume=True)
    assert record["seconds"] > 0.3
    assert record["seconds"] * record["examples_per_second"] == pytest.approx(24)


def test_latest_state_is_not_ahead_of_the_best_model(tmp_path: Path) -> None:
    """Where the best model can't be written, a resumed run is to make its epoch again."""

    def spoil(model: MVAE, batch: Batch) -> Tensor:
        if (tmp_path / checkpoint.BEST).is_file():
            (tmp_path / checkpoint.BEST).unlink()
            (tmp_path / checkpoint.BEST).mkdir()
        return torch.zeros(len(batch["label"]))

    with pytest.raises(UserError, match=f"can't write .*{checkpoint.BEST}"):
        fit_small(tmp_path, metrics={"zero": spoil})
    saved = checkpoint.load(tmp_path / checkpoint.LATEST, "small")
    assert (saved["epoch"], saved["step"]) == (2, 0)


def test_signals_are_as_before_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit_small(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_a_finished_run_changes_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = fit_small(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    assert fit_small(tmp_path, resume=True, epochs=1) == records
    assert contents(tmp_path) == before
    assert capsys.readouterr().out == f"nothing is left to do: {tmp_path} holds a run of 2 epochs\n"


def test_tensorboard_has_every_epoch_once_after_a_kill(tmp_path: Path) -> None:
    """A kill may come after an epoch is saved and before it is reported; or TensorBoard's folder was not copied."""

    def steps() -> dict[str, list[int]]:
        found = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
        scalars = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
        return {**scalars, **{name: [event.step for event in found.Images(name)] for name in found.Tags()["images"]}}

    fit_small(tmp_path, epochs=1)
    shutil.copytree(tmp_path / "tensorboard", tmp_path / "kept")
    fit_small(tmp_path, epochs=2, resume=True)
    assert steps()["validation/loss"] == [1, 2]
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "kept").rename(tmp_path / "tensorboard")
    (record, *_) = fit_small(tmp_path, epochs=3, resume=True)
    shown = ["reconstruction/image", "given_attrs/image", "given_label/image", "latents/image"]
    assert steps() == {name: [1, 2, 3] for name in [*record, *shown] if name != "epoch"}
    shutil.rmtree(tmp_path / "tensorboard")
    fit_small(tmp_path, epochs=4, resume=True)
    assert steps()["validation/loss"] == [1, 2, 3, 4]
    train = small_data(24, seed=0, transform=at_call(3, die))
    with pytest.raises(InterruptedError):
        fit_small(tmp_path, epochs=5, resume=True, train=train, save_every=1e-9)
    shutil.rmtree(tmp_path / "tensorboard")
    fit_small(tmp_path, epochs=5, resume=True)
    assert steps()["validation/loss"] == [1, 2, 3, 4, 5]


def test_stats_that_a_kill_left_behind_are_made_good(tmp_path: Path) -> None:
    records = fit_small(tmp_path)
    (tmp_path / "stats.jsonl").write_text("")
    fit_small(tmp_path, resume=True)
    assert stats(tmp_path) == records


def test_resume_without_a_run_starts_from_the_beginning_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = fit_small(tmp_path / "new", resume=True)
    assert "starting from the beginning" in capsys.readouterr().out.splitlines()[0]
    assert without_times(records) == without_times(fit_small(tmp_path / "other"))


# What is refused before anything is written.


def test_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    fit_small(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} holds a run: .*`resume`.*`out_dir`") as refused:
        fit_small(tmp_path, epochs=3)
    assert refused.value.status == 2
    assert contents(tmp_path) == before


def test_folder_that_another_run_writes_into_is_refused(tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    for resume in (False, True):
        with locked(tmp_path / ".lock"), pytest.raises(UsageError, match=f"another process.*{tmp_path}.*`out_dir`"):
            fit_small(tmp_path, epochs=2, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_best_model_alone_is_not_written_over(resume: bool, tmp_path: Path) -> None:
    fit_small(tmp_path / "run")
    (tmp_path / "run" / checkpoint.LATEST).unlink()
    content = checkpoint.load(tmp_path / "run" / checkpoint.BEST, "small")
    checkpoint.save(tmp_path / "run" / checkpoint.BEST, "small", {**content, "epoch": 2})
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=f"{checkpoint.BEST} would be written over.*`out_dir`"):
        fit_small(tmp_path / "run", resume=resume)
    assert contents(tmp_path / "run") == before


def test_kill_between_the_first_epochs_two_files_is_gone_on_from(tmp_path: Path) -> None:
    fit_small(tmp_path / "straight")
    fit_small(tmp_path / "run", epochs=1)
    (tmp_path / "run" / checkpoint.LATEST).unlink()
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


# What may change from an epoch on.


def test_rate_and_batch_size_may_change_from_the_start_of_an_epoch_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_small(tmp_path, epochs=1)
    capsys.readouterr()
    records = fit_small(tmp_path, resume=True, lr=1e-3, batch_size=12)
    assert capsys.readouterr().out.splitlines()[0] == (
        "from the start of epoch 2 on: lr 0.001 in place of 0.01, batch_size 12 in place of 6"
    )
    assert [record["lr"] for record in records] == [1e-2, 1e-3]
    assert "changed" not in records[0]
    assert records[1]["changed"] == {"lr": [1e-2, 1e-3], "batch_size": [6, 12]}
    assert stats(tmp_path) == records
    saved = checkpoint.load(tmp_path / checkpoint.LATEST, "small")
    assert saved["optimizer"]["state"][0]["step"] == 4 + 2
    assert saved["settings"]["batch_size"] == 12
    capsys.readouterr()
    records = fit_small(tmp_path, resume=True, lr=1e-3, batch_size=12, epochs=3)
    assert "in place of" not in capsys.readouterr().out
    assert "changed" not in records[2]


def test_rate_that_changes_within_an_epoch_changes_at_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return rows

    fit_small(tmp_path / "straight", epochs=1)
    fit_small(tmp_path / "straight", resume=True, lr=1e-3, batch_size=12)
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", train=small_data(24, seed=0, transform=at_call(2, stop)))
    capsys.readouterr()
    fit_small(tmp_path / "run", resume=True, lr=1e-3, batch_size=12)
    assert capsys.readouterr().out.startswith("from the start of epoch 2 on: ")
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"precision": "bf16"}, "precision was fp32, now bf16"),
        ({"approx_m": 1}, "approx_m was 0, now 1"),
        ({"pairs_per_batch": 1}, "pairs_per_batch was 0, now 1"),
        ({"compile": True}, "compile was False, now True"),
        ({"train": small_data(24, seed=3)}, "data_crc32"),
        ({"beta": constant()}, "`beta` at the end of epoch 1 was 0.5, now 1.0"),
        ({"schedule": late(1)}, "`lr` at the end of epoch 1 was 0.01, now 0"),
        ({"weights": {"label": 2.0}}, "objective_crc32"),
        ({"optimizer": torch.optim.SGD}, "optimizer was Adam, now SGD"),
        ({"optimizer": functools.partial(torch.optim.Adam, betas=(0.5, 0.9))}, "the optimiser's betas was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_change_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="`resume`") as refused:
        fit_small(tmp_path, resume=True, **changed)
    assert said in str(refused.value)
    assert contents(tmp_path) == before


def test_resume_with_other_settings_names_each_with_both_values(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    before = contents(trained.out_dir)
    flags = ["--data-dir", digits_dir, "--out-dir", trained.out_dir, "--epochs", "4", *SHORT, "--resume"]
    done = run_warm("mnist/train.py", *flags, "--compile", "--lambda-text", "50", "--limit", "900", cwd=tmp_path)
    differ = ["compile was False, now True", "lambda_text was 10.0, now 50.0", "limit was None, now 900"]
    assert_refused(done, 2, trained.out_dir / checkpoint.LATEST, *differ)
    for same_as_before in ("epochs", "out_dir", "seed", "batch_size"):
        assert f"{same_as_before} was" not in done.stderr
    assert contents(trained.out_dir) == before


def test_resume_of_another_number_of_examples_is_refused(tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    with pytest.raises(UsageError, match="n_train was 24, now 18"):
        fit_small(tmp_path, resume=True, train=small_data(18, seed=0))


def test_resume_from_a_damaged_checkpoint_is_refused_and_keeps_it(tmp_path: Path) -> None:
    fit_small(tmp_path)
    latest = tmp_path / checkpoint.LATEST
    latest.write_bytes(latest.read_bytes()[:10_000])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=checkpoint.LATEST):
        fit_small(tmp_path, resume=True, epochs=3)
    assert contents(tmp_path) == before


def test_resume_from_a_best_model_is_refused(tmp_path: Path) -> None:
    fit_small(tmp_path)
    shutil.copy(tmp_path / checkpoint.BEST, tmp_path / checkpoint.LATEST)
    with pytest.raises(UserError, match=checkpoint.LATEST):
        fit_small(tmp_path, resume=True, epochs=3)


def test_resume_of_another_network_is_refused(tmp_path: Path) -> None:
    fit_small(tmp_path)
    model = small_model()
    model.encoders["image"].linear = nn.Sequential(nn.Linear(36, 5), nn.Linear(5, 4))
    with pytest.raises(UserError, match=checkpoint.LATEST):
        fit_small(tmp_path, resume=True, epochs=3, model=model)


def test_resume_of_another_experiment_is_refused(trained: Trained) -> None:
    with pytest.raises(UserError, match="is a checkpoint of 'mnist', not of 'small'"):
        fit_small(trained.out_dir, resume=True)


@pytest.mark.parametrize("script", ["sample.py", "loglike.py"])
def test_scripts_refuse_what_is_no_checkpoint_in_one_line(script: str, digits_dir: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    path = tmp_path / "bad.pth.tar"
    torch.save(Malicious() if script == "sample.py" else {"state_dict": torch.zeros(2)}, path)
    assert_refused(run_warm(f"mnist/{script}", path, "--data-dir", digits_dir, cwd=tmp_path), 1, path)
    assert set(os.listdir(tmp_path)) == {"bad.pth.tar"}


# Disks and folders.


def test_full_disk_is_one_error_and_keeps_the_last_checkpoint(copied: Path, digits_dir: Path, tmp_path: Path) -> None:
    before = contents(copied)
    flags = ["--data-dir", digits_dir, "--out-dir", copied, "--epochs", "4", *SHORT, "--resume"]
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))}
    done = run("mnist/train.py", *flags, cwd=tmp_path, **full)
    assert_refused(done, 1, "can't write", str(copied), "what was there before is unchanged")
    assert contents(copied) == before
    assert checkpoint.load(copied / checkpoint.LATEST, "mnist")["epoch"] == 4


def test_folder_that_cannot_be_written_is_one_error_before_the_first_step(tmp_path: Path) -> None:
    def step(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("a step was made")

    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"can't write .*file/run"):
        fit_small(tmp_path / "file" / "run", train=small_data(24, seed=0, transform=at_call(1, step)))


def test_tensorboard_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    with pytest.raises(UserError, match=r"can't write .*tensorboard"):
        fit_small(tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.LATEST, "small")["epoch"] == 2


# Numbers that aren't finite.


def test_loss_that_is_not_finite_stops_the_script(digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--out-dir", tmp_path / "run", "--lr", "1e30", "--epochs", "2", *SHORT]
    done = run_warm("mnist/train.py", *flags, cwd=tmp_path)
    assert_refused(done, 1, "not finite", "log p of image in term image", "a smaller --lr")
    assert not (tmp_path / "run" / checkpoint.LATEST).exists()


def spoiled(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Makes the first example's modality `name` NaN."""

    def change(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = rows[name].clone()
        changed[0] = torch.nan
        return {**rows, name: changed}

    return change


@pytest.mark.parametrize("name", ["image", "attrs"])
@pytest.mark.parametrize("step", [5, 7, 8])
def test_data_that_is_not_finite_is_named_and_the_checkpoint_kept(name: str, step: int, tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    train = small_data(24, seed=0, transform=at_call(step - 4, spoiled(name)))
    with pytest.raises(UserError) as stopped:
        fit_small(tmp_path, train=train, resume=True)
    assert f"not finite by epoch 2, step {step - 4}" in str(stopped.value)
    assert f"log p of {name} in term {name}" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert contents(tmp_path) == before


def test_culprit_among_many_modalities_is_named(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(8)]
    model = MVAE(
        encoders={name: SmallEncoder(2) for name in names},
        likelihoods={name: Bernoulli(nn.Linear(2, 2)) for name in names},
        n_latents=2,
    )
    examples = Data(tensors={name: torch.ones(6, 2) for name in names})
    train = dataclasses.replace(examples, transform=at_call(1, spoiled("m7")))
    with pytest.raises(UserError, match="log p of m7 in term m7"):
        fit_small(tmp_path, model=model, train=train, validation=examples)


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient that isn't finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


class SpoiledEncoder(SmallEncoder):
    """An encoder whose gradient isn't finite at the `step`-th training step, though its output is."""

    def __init__(self, n_inputs: int, step: int):
        super().__init__(n_inputs)
        self.steps_left = step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = super().forward(x)
        self.steps_left -= self.training
        return (NanGradient.apply(mu) if self.training and self.steps_left == 0 else mu), logvar


@pytest.mark.parametrize("step", [1, 2, 4])
def test_gradient_that_is_not_finite_is_named_and_the_checkpoint_kept(step: int, tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    model = small_model()
    model.encoders["attrs"] = SpoiledEncoder(4, step)
    with pytest.raises(
        UserError, match=rf"not finite by epoch 2, step [{step}{step + 1}].*the gradient of encoders.attrs"
    ):
        fit_small(tmp_path, model=model, resume=True)
    assert contents(tmp_path) == before


def test_signal_does_not_save_weights_that_are_not_finite(tmp_path: Path) -> None:
    def stop(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return rows

    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    model = small_model()
    model.encoders["attrs"] = SpoiledEncoder(4, step=2)
    with pytest.raises(UserError, match=r"the gradient of encoders\.attrs"):
        fit_small(tmp_path, model=model, resume=True, train=small_data(24, seed=0, transform=at_call(2, stop)))
    assert contents(tmp_path) == before


def test_validation_that_is_not_finite_is_named_and_the_checkpoint_kept(tmp_path: Path) -> None:
    fit_small(tmp_path, epochs=1)
    before = contents(tmp_path)
    validation = small_data(10, seed=1, transform=at_call(3, spoiled("attrs")))  # two are for TensorBoard
    with pytest.raises(UserError, match=r"not finite.*validation"):
        fit_small(tmp_path, validation=validation, resume=True)
    assert contents(tmp_path) == before


# What fit does and reports.


def test_best_model_is_that_of_the_epoch_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    records = fit_small(tmp_path / "run", epochs=12, lr=0.2, beta=constant())
    losses = [record["validation/loss"] for record in records]
    best = int(np.argmin(losses)) + 1
    assert 1 < best < 12
    assert any(after < before for before, after in itertools.pairwise(losses[best:]))  # better, and not the best
    content = checkpoint.load(tmp_path / "run" / checkpoint.BEST, "small")
    assert (content["epoch"], content["validation_loss"]) == (best, losses[best - 1])
    fit_small(tmp_path / "shorter", epochs=best, lr=0.2, beta=constant())
    assert same(content["model"], checkpoint.load(tmp_path / "shorter" / checkpoint.LATEST, "small")["model"])
    (*_, record) = fit_small(tmp_path / "shorter", epochs=best + 1, lr=0.2, beta=constant(), resume=True)
    assert record["validation/loss"] > losses[best - 1]
    again = checkpoint.load(tmp_path / "shorter" / checkpoint.BEST, "small")
    assert again["epoch"] == best
    assert same(content["model"], again["model"])


def test_best_model_by_the_joint_elbo_leaves_lambda_out(tmp_path: Path) -> None:
    how: dict[str, Any] = {"lr": 0.2, "beta": constant(), "weights": {"label": 100.0}, "select": "joint"}
    records = fit_small(tmp_path, epochs=12, **how)
    elbos = [record["validation/joint/elbo"] for record in records]
    losses = [record["validation/loss"] for record in records]
    best = int(np.argmax(elbos)) + 1
    assert best != int(np.argmin(losses)) + 1
    content = checkpoint.load(tmp_path / checkpoint.BEST, "small")
    assert (content["epoch"], content["validation_loss"]) == (best, losses[best - 1])
    (*_, record) = fit_small(tmp_path, epochs=13, **how, resume=True)
    again = checkpoint.load(tmp_path / checkpoint.BEST, "small")
    assert again["epoch"] == (13 if record["validation/joint/elbo"] > max(elbos) else best)


def test_select_that_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`select` is 'elbo', and loss or joint is wanted"):
        fit_small(tmp_path, select="elbo")
    model = small_model()
    alone = Objective(model, terms=[Term(("image",), ("image",))])
    adam = torch.optim.Adam(alone.parameters())
    data, options = small_data(24, seed=0), Options(epochs=1, batch_size=6, select="joint", out_dir=tmp_path / "run")
    with pytest.raises(UsageError, match="no term that is given every modality"):
        fit(alone, adam, data, data, options, beta=constant())
    fit_small(tmp_path / "joint", select="joint")
    with pytest.raises(UsageError, match="select was joint, now loss"):
        fit_small(tmp_path / "joint", resume=True)
    fit_small(tmp_path / "older")
    path = tmp_path / "older" / checkpoint.LATEST
    older = checkpoint.load(path, "small")
    del older["settings"]["select"]
    checkpoint.save(path, "small", older)
    with pytest.raises(UsageError, match="select was loss, now joint"):
        fit_small(tmp_path / "older", select="joint", resume=True)
    assert len(fit_small(tmp_path / "older", epochs=3, resume=True)) == 3


def test_joint_elbo_needs_a_complete_validation_example(tmp_path: Path) -> None:
    for present, complete in ((torch.arange(10) < 1, True), (torch.arange(10) < 0, False)):
        validation = small_data(10, seed=1, present={"label": present})
        if complete:
            fit_small(tmp_path / "some", validation=validation, select="joint")
            assert (tmp_path / "some" / checkpoint.BEST).exists()
        else:
            with pytest.raises(UsageError, match="no validation example has every modality"):
                fit_small(tmp_path / "none", validation=validation, select="joint")


def test_metric_takes_no_name_of_the_objectives(tmp_path: Path) -> None:
    for name in ("loss", "joint/elbo"):
        with pytest.raises(UsageError, match=f"{name} in `metrics`"):
            fit_small(tmp_path, metrics={name: lambda model, batch: torch.zeros(10)})


def test_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (fit_small(tmp_path / name, seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)])
    assert without_times(first) == without_times(again)
    assert without_times(first) != without_times(other)


def test_validation_draws_the_same_noise_in_every_epoch(tmp_path: Path) -> None:
    records = fit_small(tmp_path, lr=1e-30)
    assert part(records[0], "validation") == part(records[1], "validation")
    assert part(records[0], "train") != part(records[1], "train")


def test_training_draws_other_noise_in_another_epoch_and_by_another_seed(tmp_path: Path) -> None:
    """Of weights that don't move, and examples that are all the same."""
    train = small_data(1, seed=0)[torch.zeros(24, dtype=torch.long)]
    records = [fit_small(tmp_path / str(seed), train=train, lr=1e-30, seed=seed) for seed in (0, 1)]
    assert len({record["train/loss"] for run in records for record in run}) == 4


def test_subsets_are_drawn_anew_in_every_step_and_epoch_and_by_the_seed(tmp_path: Path) -> None:
    """A modality is scored in its term, the joint one, and where the subset of a step has it."""

    def subsets(seed: int) -> list[tuple[bool, ...]]:
        model = small_model()
        there: dict[str, list[bool]] = {name: [] for name in model.modalities}

        def watch(name: str) -> None:
            decoder = model.likelihood(name).decoder
            decoder.register_forward_hook(
                lambda module, inputs, output: there[name].append(len(output) > 2 * 6) if module.training else None
            )

        for name in model.modalities:
            watch(name)
        fit_small(tmp_path / str(seed), model=model, approx_m=1, epochs=3, seed=seed)
        return list(zip(*there.values(), strict=True))

    first, other = subsets(0), subsets(1)
    assert len(first) == 12
    assert {sum(some) for some in first} == {2}
    epochs = [tuple(first[i : i + 4]) for i in (0, 4, 8)]
    assert len(set(epochs)) > 1
    assert all(len(set(epoch)) > 1 for epoch in epochs)
    assert first != other


def test_validation_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    one = fit_small(tmp_path / "one", validation=small_data(10, seed=1))
    other = fit_small(tmp_path / "other", validation=small_data(7, seed=2))
    assert [part(record, "train") for record in one] == [part(record, "train") for record in other]


def missing() -> dict[str, Tensor]:
    """Of 24 examples, a third lack the picture, another the label, and the last example both and the attributes."""
    image, label, attrs = torch.ones(3, 24, dtype=torch.bool)
    image[:8], label[8:16], attrs[-1] = False, False, False
    image[-1] = label[-1] = False
    return {"image": image, "label": label, "attrs": attrs}


def test_rows_of_missing_modalities_have_no_part_in_a_run(tmp_path: Path) -> None:
    train = small_data(24, seed=0, present=missing())
    tensors = dict(train.tensors)
    tensors["image"] = torch.where(missing()["image"].view(-1, 1, 1, 1), tensors["image"], 100.0)
    tensors["label"] = torch.where(missing()["label"], tensors["label"], 0)
    fit_small(tmp_path / "one", train=train)
    fit_small(tmp_path / "other", train=small_data(24, seed=0, present=missing(), transform=lambda rows: rows))
    other = fit_small(tmp_path / "filled", train=type(train)(tensors=tensors, present=missing()))
    assert all(np.isfinite(record["train/loss"]) for record in other)
    assert_same_run(tmp_path / "filled", tmp_path / "one", "small")


@pytest.mark.parametrize("present", [None, missing()], ids=["complete", "missing"])
def test_bf16_is_near_fp32(present: dict[str, Tensor] | None, tmp_path: Path) -> None:
    train = small_data(24, seed=0, present=present)
    found = [
        fit_small(tmp_path / precision, train=train, precision=precision, approx_m=1, lr=1e-30)[-1]
        for precision in ("fp32", "bf16")
    ]
    for loss in ("train/loss", "validation/loss"):
        single, half = (record[loss] for record in found)
        assert single != half
        assert half == pytest.approx(single, rel=0.02)


def test_modality_that_a_whole_batch_lacks_is_no_trouble_in_bf16(tmp_path: Path) -> None:
    present = {"image": torch.zeros(24, dtype=torch.bool)}
    (record,) = fit_small(tmp_path, train=small_data(24, seed=0, present=present), precision="bf16", epochs=1)
    assert not any(name.startswith("train/image/") for name in record)
    assert {name for name in record if name.startswith("train/joint/log_prob/")} == {
        "train/joint/log_prob/attrs",
        "train/joint/log_prob/label",
    }


def test_random_subsets_are_reported_as_one_term(tmp_path: Path) -> None:
    record = fit_small(tmp_path, approx_m=3)[-1]
    terms = {which: [name.split("/")[0] for name in part(record, which) if "/elbo" in name] for which in WHICH}
    assert terms["train"] == ["joint", "image", "attrs", "label", "subset"]
    assert terms["validation"] == ["joint", "image", "attrs", "label"]


def test_terminal_gets_a_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit_small(tmp_path, log_interval=1)
    said = capsys.readouterr()
    assert "epoch 1:" in said.err
    assert "  step " not in said.out


def test_compiled_step_gives_the_same_losses(tmp_path: Path) -> None:
    plain, compiled = (fit_small(tmp_path / str(flag), compile=flag, epochs=1, approx_m=1) for flag in (False, True))
    assert compiled[0]["validation/loss"] == pytest.approx(plain[0]["validation/loss"], rel=0.05)


# Several processes.


def test_two_processes_share_every_batch_and_one_writes(digits_dir: Path, tmp_path: Path, trained: Trained) -> None:
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--data-dir", str(digits_dir), "--out-dir", str(tmp_path / "run"), "--epochs", "2", *SHORT]
    train = [*several, *command("mnist/train.py")[1:], *flags]
    done = subprocess.run(
        train, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    records = stats(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2]
    assert done.stdout.count("validation loss") == 2
    assert len(os.listdir(tmp_path / "run" / "tensorboard")) == 1
    for record, alone in zip(records, stats(trained.out_dir), strict=False):
        assert record["seconds"] * record["examples_per_second"] == pytest.approx(1000)
        assert record["train/loss"] == pytest.approx(alone["train/loss"], rel=0.1)
        assert record["validation/loss"] == pytest.approx(alone["validation/loss"], rel=0.2)
