"""Stopping and resuming: a resumed run is bit for bit the one that never stopped, and nothing is lost."""

import contextlib
import itertools
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mvae import MVAE, Objective, Run, Training, UsageError, UserError
from mvae.files import locked
from mvae.model import Batch
from mvae.run import checkpoint, schedules, signals
from mvae.run.run import Stopped

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers import (
    SHORT,
    Trained,
    assert_ended,
    assert_refused,
    assert_same_run,
    at_call,
    run,
    run_small,
    run_warm,
    same,
    small_data,
    small_model,
    start_warm,
    stats,
    without_times,
)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, without TensorBoard's and the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def state(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / checkpoint.LATEST, "small")


def signalled(*numbers: int) -> Callable[[Any], Any]:
    """Return a function that sends this process signals, and returns its argument."""

    def change(rows: Any) -> Any:
        for number in numbers:
            signal.raise_signal(number)
        return rows

    return change


def train(step: int, *numbers: int) -> dict[str, Any]:
    """Return training data during whose n-th batch signals arrive."""
    return {"train": small_data(24, seed=0, transform=at_call(step, signalled(*numbers or (signal.SIGTERM,))))}


def die(rows: Any) -> Any:
    raise InterruptedError("as a kill does")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of two epochs that never stopped. Read-only."""
    folder = tmp_path_factory.mktemp("straight")
    run_small(folder)
    return folder


# Scripts


def start(words: list[object], folder: Path) -> tuple[BaseProcess, Path, Path]:
    """Start mnist/train.py; return the process and its two logs."""
    out, err = folder / "out", folder / "err"
    out.write_text("")
    return start_warm("mnist/train.py", *words, logs=(out, err), cwd=folder), out, err


def wait_for(words: str, process: BaseProcess, out: Path, err: Path) -> None:
    while words not in out.read_text():
        assert process.is_alive(), err.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_script_that_a_signal_stopped_is_resumed_bit_for_bit(
    number: signal.Signals, trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    flags = ["--data-dir", digits_dir, "--out-dir", "run", "--epochs", "3", *SHORT]
    process, out, err = start(flags, tmp_path)
    wait_for("epoch 2/3  step 5/20", process, out, err)
    os.kill(process.pid or 0, number)
    process.join(timeout=300)
    assert process.exitcode == 128 + number
    said = r"train.py: stopped in epoch [23], step \d+ of 20; the state is saved: continue with --resume\n"
    assert re.fullmatch(said, err.read_text())
    assert_ended(run_warm("mnist/train.py", *flags, "--resume", cwd=tmp_path))
    assert_same_run(tmp_path / "run", trained.out_dir)


def test_script_killed_at_random_moments_is_resumed_bit_for_bit(digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--n-val", "100", "--limit", "100", "--batch-size", "50", "--resume"]
    flags += ["--log-interval", "1", "--save-every", "1e-9"]
    killed, places, rng = tmp_path / "killed", [(1, 0)], np.random.default_rng(0)
    for _ in range(12):
        process, out, err = start([*flags, "--epochs", 10_000, "--out-dir", killed], tmp_path)
        if len(places) == 1 or rng.random() < 0.8:  # otherwise the kill may come before the first step
            wait_for("β", process, out, err)
        time.sleep(rng.uniform(0, 0.3))  # nothing depends on which moment this is
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, err.read_text()
        saved = checkpoint.load(killed / checkpoint.LATEST, "mnist")
        checkpoint.load(killed / checkpoint.BEST, "mnist")
        places.append((saved["epoch"], saved["done"]))
        reported = [record["epoch"] for record in stats(killed)]
        assert reported == list(range(1, len(reported) + 1))
        assert saved["epoch"] - 2 <= len(reported) <= saved["epoch"] - 1
    assert places == sorted(places)
    for out_dir in (killed, tmp_path / "straight"):
        words = [*flags, "--epochs", places[-1][0], "--out-dir", out_dir]
        assert_ended(run_warm("mnist/train.py", *words, cwd=tmp_path))
    assert_same_run(killed, tmp_path / "straight")


def test_full_disk_is_one_line_and_keeps_the_last_state(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained.out_dir, tmp_path / "copied"))
    before = contents(copied)
    flags = ["--data-dir", digits_dir, "--out-dir", copied, "--epochs", "4", *SHORT, "--resume"]
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))}
    assert_refused(run("mnist/train.py", *flags, cwd=tmp_path, **full), 1, "can't write", copied)
    assert contents(copied) == before


def test_resume_with_other_flags_names_each_with_both_values_and_the_command(
    trained: Trained, digits_dir: Path, tmp_path: Path
) -> None:
    before = contents(trained.out_dir)
    flags = ["--data-dir", digits_dir, "--out-dir", trained.out_dir, "--epochs", "4", *SHORT, "--resume"]
    changed = ["--lambda-text", "50", "--limit", "900", "--seed", "3", "--compile", "--log-interval", "9"]
    done = run_warm("mnist/train.py", *flags, *changed, cwd=tmp_path)
    assert_refused(done, 2, trained.out_dir / checkpoint.LATEST, "python mnist/train.py --data-dir", "; and 1 more")
    differ = ["lambda_text was 10, now 50.0", "limit was None, now 900", "seed was 0, now 3", "compile was False"]
    assert sum(words in done.stderr for words in differ) == 3
    assert not re.search("epochs was|out_dir was|log_interval was|resume was", done.stderr)
    assert contents(trained.out_dir) == before


# Any moment, in this process


@pytest.mark.parametrize("step", range(1, 9))
def test_run_stopped_after_any_step_is_resumed_bit_for_bit(step: int, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=f"epoch {(step + 3) // 4}, step {(step - 1) % 4 + 1} of 4") as stopped:
        run_small(tmp_path, **train(step, signal.SIGINT))
    assert stopped.value.status == 130
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


def test_run_that_stops_again_and_again_is_resumed_bit_for_bit(straight: Path, tmp_path: Path) -> None:
    """Within an epoch, and twice within its validation."""
    for after in (1, 2, 1):
        with pytest.raises(Stopped):
            run_small(tmp_path, **train(after), resume=True)
    for _ in range(2):
        validation = small_data(10, seed=1, transform=at_call(1, signalled(signal.SIGTERM)))
        with pytest.raises(Stopped, match="epoch 1, step 4 of 4"):
            run_small(tmp_path, validation=validation, resume=True)
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


def sgd(weights: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr, momentum=0.9)


@pytest.mark.parametrize(
    "how",
    [{}, {"n_subsets": 2, "iw_samples": 2, "precision": "bf16"}, {"optimizer": sgd}],
    ids=["plain", "subsets", "optimizer"],
)
def test_run_of_more_epochs_continues_a_shorter_one(how: dict[str, Any], tmp_path: Path) -> None:
    run_small(tmp_path / "straight", **how, epochs=3)
    for epochs in (1, 2, 3):
        run_small(tmp_path / "run", **how, epochs=epochs, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def run_kept(out_dir: Path, *names: str, stop: int = 99, **config: Any) -> dict[str, Any]:
    """Train with a scheduler and averaged weights, two batches a step; return the states of what it keeps."""
    settings = Training(**{"epochs": 2, "batch_size": 3, "lr": 1e-2, **config}, out_dir=out_dir)
    objective = Objective(small_model())
    optimizer = torch.optim.AdamW(objective.parameters(), settings.lr, fused=True)
    data = train(stop)["train"]
    with Run("small", objective, optimizer, settings) as run:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 0.1, total_iters=16)
        average = torch.optim.swa_utils.AveragedModel(objective.model)
        kept: dict[str, Any] = {"scheduler": scheduler, "average": average}
        run.keep(**{name: kept[name] for name in names})
        for _ in run.epochs(settings.epochs):
            for batch, present in run.batches(data, settings.batch_size):
                run.set(beta=schedules.linear(2)(run.t))
                run.backward(*run.objective(batch, run.beta, present=present))
                if run.done % 2 == 0:
                    run.step()
                    average.update_parameters(objective.model)
                    scheduler.step()
            run.validate(small_data(10, seed=1))
    return {name: value.state_dict() for name, value in kept.items()}


@pytest.mark.parametrize(("stop", "done"), [(1, 2), (8, 8), (13, 6)])
def test_what_a_run_keeps_is_restored_bit_for_bit(stop: int, done: int, tmp_path: Path) -> None:
    """A stop between two batches of one step waits for the step: gradients aren't saved."""
    expected = run_kept(tmp_path / "straight", "scheduler", "average")
    assert stats(tmp_path / "straight")[1]["lr"] == pytest.approx(1e-2 * (0.5 - 0.4 * 7 / 16))
    with pytest.raises(Stopped):
        run_kept(tmp_path / "run", "scheduler", "average", stop=stop, save_every=1e-9)
    assert state(tmp_path / "run")["done"] == done
    assert same(run_kept(tmp_path / "run", "scheduler", "average", resume=True), expected)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_what_a_run_keeps_must_be_the_same_when_it_is_resumed(tmp_path: Path) -> None:
    run_kept(tmp_path, "average", epochs=1)
    with pytest.raises(UsageError, match=r"holds average: pass them to keep\(\)"):
        run_kept(tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"doesn't hold scheduler, which keep\(\) names"):
        run_kept(tmp_path, "average", "scheduler", resume=True)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_comes_twice_at_once_is_one_request(number: int, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_small(tmp_path, **train(2, number, number))
    assert state(tmp_path)["done"] == 2


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Presses Ctrl-C twice, an hour apart."""
    clock = itertools.count(step=3600)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    return signalled(signal.SIGINT, signal.SIGINT)


def test_second_ctrl_c_ends_a_step_that_hangs(twice: Callable, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path, train=small_data(24, seed=0, transform=at_call(2, twice)))
    assert not (tmp_path / checkpoint.LATEST).exists()


def test_second_ctrl_c_in_validation_keeps_the_epochs_steps(twice: Callable, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path, metrics={"label": lambda model, batch: twice(batch["label"])})
    assert state(tmp_path)["done"] == 4
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


def test_second_ctrl_c_waits_for_a_save(twice: Callable, straight: Path, tmp_path: Path) -> None:
    model, saves = small_model(), itertools.count()
    model.register_state_dict_pre_hook(lambda *_: None if next(saves) else twice(None))
    with pytest.raises(Stopped, match="epoch 2, step 1"):
        run_small(tmp_path, model=model)
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_stops_a_run_unless_it_ignores_that(ignored: bool, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)  # nohup ignores it
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(Stopped, match="epoch 1, step 2 of 4"):
            run_small(tmp_path, **train(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state(tmp_path)["epoch"] == (3 if ignored else 1)


def test_signals_are_handled_as_before_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    run_small(tmp_path)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


@pytest.mark.parametrize(("n", "place"), [(0, (1, 1)), (3, (1, 4)), (5, (2, 1))])
def test_run_whose_output_nobody_reads_saves_and_stops(
    n: int, place: tuple[int, int], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader leaves after n lines, which takes effect between two steps."""
    lines = itertools.count()

    def say(text: str, flush: bool) -> None:
        if next(lines) >= n:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(signals, "print", say, raising=False)
        with pytest.raises(Stopped) as stopped:
            run_small(tmp_path, log_interval=1)
    assert stopped.value.status == 141
    assert (state(tmp_path)["epoch"], state(tmp_path)["done"]) == place
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


# Files


@pytest.mark.parametrize(("minutes", "done"), [(1e-9, 2), (10, 0)])
def test_state_is_saved_within_an_epoch_when_it_is_time(
    minutes: float, done: int, straight: Path, tmp_path: Path
) -> None:
    run_small(tmp_path, epochs=1)
    killed = small_data(24, seed=0, transform=at_call(3, die))
    with pytest.raises(InterruptedError):
        run_small(tmp_path, train=killed, save_every=minutes, resume=True)
    assert (state(tmp_path)["epoch"], state(tmp_path)["done"]) == (2, done)
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


def test_time_of_an_epochs_steps_before_a_stop_counts(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_small(tmp_path, **train(3))
    before = state(tmp_path)["seconds"]
    record = run_small(tmp_path, resume=True).history[0]
    assert record["seconds"] > before > 0
    assert record["seconds"] * record["examples_per_second"] == pytest.approx(24)


def test_latest_state_is_never_ahead_of_the_best_model(tmp_path: Path) -> None:
    """If the best model can't be written, its epoch must be repeated."""

    def spoil(model: MVAE, batch: Batch) -> Tensor:
        if (tmp_path / checkpoint.BEST).is_file():
            (tmp_path / checkpoint.BEST).unlink()
            (tmp_path / checkpoint.BEST).mkdir()
        return torch.zeros(len(batch["label"]))

    with pytest.raises(UserError, match=f"can't write .*{checkpoint.BEST}"):
        run_small(tmp_path, metrics={"zero": spoil})
    assert (state(tmp_path)["epoch"], state(tmp_path)["done"]) == (2, 0)


def test_finished_run_and_missing_run_are_said(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(straight)
    assert len(run_small(straight, resume=True, epochs=1).history) == 2
    assert contents(straight) == before
    assert capsys.readouterr().out == f"nothing left to do: {straight} holds a run of 2 epochs\n"
    run_small(tmp_path, resume=True)
    assert f"no checkpoint in {tmp_path} yet: starting from the beginning" in capsys.readouterr().out.splitlines()[0]
    assert_same_run(tmp_path, straight, "small")


@pytest.mark.parametrize("left", ["", '{"epoch": 1}\n', "half", None])
def test_stats_that_a_kill_left_are_repaired(left: str | None, straight: Path, tmp_path: Path) -> None:
    """left: what it left of the file; "half": a whole epoch and a torn one; None: no file."""
    run_small(tmp_path, epochs=1)
    path = tmp_path / "stats.jsonl"
    first = path.read_text()
    path.write_text(first + first[:40] if left == "half" else left or "")
    if left is None:
        path.unlink()
    run_small(tmp_path, resume=True)
    assert path.read_text().startswith(first)
    assert without_times(stats(tmp_path)) == without_times(stats(straight))


def test_tensorboard_has_each_epoch_once(tmp_path: Path) -> None:
    """Even if a kill came before an epoch was saved, or the folder was not copied."""

    def steps() -> dict[str, list[int]]:
        found = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
        scalars = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
        return {**scalars, **{name: [event.step for event in found.Images(name)] for name in found.Tags()["images"]}}

    run_small(tmp_path, epochs=1)
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    run_small(tmp_path, epochs=2, resume=True)
    (tmp_path / checkpoint.LATEST).write_bytes(before)
    record = run_small(tmp_path, epochs=3, resume=True).history[0]
    shown = ["reconstruction/image", "given_attrs/image", "given_label/image", "latents/image"]
    assert steps() == {name: [1, 2, 3] for name in [*record, *shown] if name != "epoch"}
    shutil.rmtree(tmp_path / "tensorboard")
    run_small(tmp_path, epochs=4, resume=True)
    assert steps()["validation/loss"] == [1, 2, 3, 4]


# What is refused, before anything is written


def assert_run_refused(folder: Path, said: str, **how: Any) -> None:
    before = contents(folder)
    with pytest.raises(UserError, match=said) as refused:
        run_small(folder, **how)
    assert "\n" not in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resume": False}, "holds a run: continue it with --resume, or use another --out-dir"),
        ({"seed": 1}, "seed was 0, now 1.*Resume with the flags of its command"),
        ({"batch_size": 12}, "batch_size was 6, now 12"),
        ({"lr": 1e-3}, "lr was 0.01, now 0.001"),
        ({"lr_schedule": "late", "epochs": 2}, "lr_schedule was constant, now late"),
        ({"train": small_data(24, seed=3)}, "other training data"),
        ({"train": small_data(18, seed=0)}, "other training data"),
        ({"weights": {"label": 2.0}}, "other terms, weights or importance samples"),
        ({"optimizer": sgd}, "other optimizer options"),
        (
            {"optimizer": lambda weights, lr, fused: torch.optim.Adam(weights, lr, (0.5, 0.9))},
            "other optimizer options",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_resume_with_something_else_is_refused(
    changed: dict[str, Any], said: str, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    assert_run_refused(tmp_path, said, **{"epochs": 3, "resume": True, **changed})


@pytest.mark.parametrize("resume", [False, True])
def test_folder_that_another_run_writes_to_is_refused(resume: bool, straight: Path) -> None:
    with locked(straight / ".lock"):
        assert_run_refused(straight, f"another run is writing to {straight}.*out_dir", resume=resume, epochs=3)


def test_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("not a folder")
    with pytest.raises(UserError, match=r"can't write .*file/run"):
        run_small(tmp_path / "file" / "run", train=small_data(24, seed=0, transform=at_call(1, die)))
    with pytest.raises(UserError, match=r"can't write .*tensorboard"):
        run_small(tmp_path / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_best_model_without_a_state_is_not_overwritten(resume: bool, straight: Path, tmp_path: Path) -> None:
    content = checkpoint.load(straight / checkpoint.BEST, "small")
    checkpoint.save(tmp_path / checkpoint.BEST, "small", {**content, "epoch": 2})
    assert_run_refused(tmp_path, f"{checkpoint.BEST} would be overwritten.*out_dir", resume=resume)


def test_run_killed_between_the_first_epochs_two_files_starts_again(straight: Path, tmp_path: Path) -> None:
    run_small(tmp_path, epochs=1)
    (tmp_path / checkpoint.LATEST).unlink()
    run_small(tmp_path, resume=True)
    assert_same_run(tmp_path, straight, "small")


def test_epochs_of_a_run_whose_rate_ends_with_them_do_not_change(tmp_path: Path) -> None:
    run_small(tmp_path, lr_schedule="late")
    for epochs in (1, 3):
        said = f"is of a run over 2 epochs, not {epochs}.*lr_schedule late.*--init {tmp_path}"
        assert_run_refused(tmp_path, said, lr_schedule="late", epochs=epochs, resume=True)


def test_setting_that_an_older_checkpoint_lacks_means_its_default(straight: Path, tmp_path: Path) -> None:
    content = checkpoint.load(straight / checkpoint.LATEST, "small")
    del content["settings"]["select"]
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", content)
    assert_run_refused(tmp_path, "select was loss, now joint", select="joint", resume=True)
    assert len(run_small(tmp_path, resume=True, epochs=3).history) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["settings"].update(speed=1), "settings that this version doesn't know: speed"),
        (lambda content: [content.pop(name) for name in ("facts", "kept")], "no state to resume from.*--init"),
        (lambda content: [content.pop(name) for name in ("optimizer", "kept")], "no state to resume from.*--init"),
        (lambda content: content["model"].pop("encoders.image.linear.bias"), "don't fit.*image.linear.bias"),
        (lambda content: content["optimizer"]["state"][0]["exp_avg"].resize_(1), "optimizer's state in .* doesn't fit"),
        (lambda content: content["optimizer"]["state"][0].pop("exp_avg"), "optimizer's state in .* doesn't fit"),
    ],
    ids=["unknown setting", "older version", "best model", "weights", "shape of the optimizer's", "optimizer's"],
)
def test_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, straight: Path, tmp_path: Path
) -> None:
    content = checkpoint.load(straight / checkpoint.LATEST, "small")
    change(content)
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", content)
    assert_run_refused(tmp_path, said, resume=True, epochs=3)


def test_resume_from_a_damaged_or_foreign_state_is_refused(straight: Path, trained: Trained, tmp_path: Path) -> None:
    for source, n, said in ((straight, 10_000, "damaged"), (trained.out_dir, None, "of 'mnist', not of 'small'")):
        (tmp_path / checkpoint.LATEST).write_bytes((source / checkpoint.LATEST).read_bytes()[:n])
        assert_run_refused(tmp_path, f"{checkpoint.LATEST}.*{said}", resume=True, epochs=3)


# A new run from a checkpoint's weights


def test_init_starts_a_new_run_from_old_weights(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--epochs", 1, *SHORT, "--lr", 1e-30, "--seed", 3, "--lambda-text", 10]
    flags += ["--init", trained.out_dir / checkpoint.BEST]
    assert_ended(run_warm("mnist/train.py", *flags, "--out-dir", "tuned", cwd=tmp_path))
    old, new = (checkpoint.load(folder / checkpoint.BEST, "mnist") for folder in (trained.out_dir, tmp_path / "tuned"))
    for name, weight in old["model"].items():
        torch.testing.assert_close(new["model"][name], weight)
    assert new["epoch"] == 1
    done = run_warm("mnist/train.py", *flags, "--n-latents", 5, cwd=tmp_path)
    assert_refused(done, 1, f"the weights of {flags[-1]} don't fit this model", "encoders.image.")
