"""Stopping and resuming: a resumed run is bit for bit the one that never stopped, and nothing is lost."""

import contextlib
import itertools
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mvae import MVAE, Objective, Run, Training, UsageError, UserError
from mvae.files import locked
from mvae.model import Batch
from mvae.run import checkpoint, signals
from mvae.run.run import Stopped

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers import SHORT, assert_ended, assert_same_run, at_call, run_small, run_warm, small_data, small_model


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


def assert_resumes(folder: Path, straight: Path) -> None:
    run_small(folder, resume=True)
    assert_same_run(folder, straight, "small")
    assert state(folder)["start"] == state(straight)["start"]


# Any moment


@pytest.mark.parametrize("step", [1, 4, 5, 8])
def test_run_stopped_after_a_step_is_resumed_bit_for_bit(step: int, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=f"epoch {(step + 3) // 4}, step {(step - 1) % 4 + 1} of 4"):
        run_small(tmp_path, **train(step))
    assert_resumes(tmp_path, straight)


def test_run_that_stops_again_and_again_is_resumed_bit_for_bit(straight: Path, tmp_path: Path) -> None:
    """Within an epoch, and twice within its validation."""
    for after in (1, 2, 1):
        with pytest.raises(Stopped):
            run_small(tmp_path, **train(after), resume=True)
    for _ in range(2):
        validation = small_data(10, seed=1, transform=at_call(1, signalled(signal.SIGTERM)))
        with pytest.raises(Stopped, match="epoch 1, step 4 of 4"):
            run_small(tmp_path, validation=validation, resume=True)
    assert_resumes(tmp_path, straight)


def sgd(weights: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr, momentum=0.9)


@pytest.mark.parametrize(
    "how",
    [{"n_subsets": 2, "iw_samples": 2, "precision": "bf16"}, {"optimizer": sgd}],
    ids=["subsets", "optimizer"],
)
def test_run_of_more_epochs_continues_a_shorter_one(how: dict[str, Any], tmp_path: Path) -> None:
    run_small(tmp_path / "straight", **how, epochs=3)
    for epochs in (1, 2, 3):
        run_small(tmp_path / "run", **how, epochs=epochs, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight", "small")


def test_what_a_run_keeps_must_be_the_same_when_it_is_resumed(tmp_path: Path) -> None:
    """That it is restored: see test_extending."""

    def train(*names: str, **how: Any) -> None:
        objective = Objective(small_model())
        optimizer = torch.optim.SGD(objective.parameters(), 0.1)
        with Run("small", objective, optimizer, Training(batch_size=24, out_dir=tmp_path, **how)) as run:
            run.keep(**{name: torch.optim.lr_scheduler.ConstantLR(optimizer) for name in names})
            next(run.epochs(1))
            run.save()

    train("one")
    with pytest.raises(UsageError, match=r"holds one: pass them to keep\(\)"):
        train(resume=True)
    with pytest.raises(UsageError, match=r"doesn't hold other, which keep\(\) names"):
        train("one", "other", resume=True)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_comes_twice_at_once_is_one_request(number: int, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with pytest.raises(Stopped) as stopped:
        run_small(tmp_path, **train(2, number, number))
    assert stopped.value.status == 128 + number
    assert state(tmp_path)["done"] == 2
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


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
    assert_resumes(tmp_path, straight)


@pytest.mark.parametrize(("minutes", "place"), [(1e-9, "epoch 1, step 2"), (10, "epoch 2, step 1")])
def test_second_ctrl_c_waits_for_a_save(
    minutes: float, place: str, twice: Callable, straight: Path, tmp_path: Path
) -> None:
    model, saves = small_model(), itertools.count()
    model.register_state_dict_pre_hook(lambda *_: None if next(saves) else twice(None))
    with pytest.raises(Stopped, match=place):
        run_small(tmp_path, model=model, save_every=minutes)
    assert_resumes(tmp_path, straight)


@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_stops_a_run_unless_it_ignores_that(ignored: bool, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)  # nohup ignores it
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(Stopped, match="epoch 1, step 2 of 4"):
            run_small(tmp_path, **train(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state(tmp_path)["epoch"] == (3 if ignored else 1)


def test_run_whose_output_nobody_reads_saves_and_stops(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader leaves after a line, which takes effect between two steps."""
    lines = itertools.count()

    def say(text: str, flush: bool) -> None:
        if next(lines) == 1:
            raise BrokenPipeError

    monkeypatch.setattr(signals, "print", say, raising=False)
    with pytest.raises(Stopped, match="epoch 1, step 2") as stopped:
        run_small(tmp_path, log_interval=1)
    assert stopped.value.status == 141
    assert_resumes(tmp_path, straight)


# Files


def test_state_is_saved_every_few_minutes_within_an_epoch(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances by a minute whenever it is read: at each step, and after a save."""
    run_small(tmp_path, epochs=1)
    clock = itertools.count(step=60)
    killed = small_data(24, seed=0, transform=at_call(4, die))
    clocks = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr("mvae.run.run.time", clocks)
    with pytest.raises(InterruptedError):
        run_small(tmp_path, train=killed, save_every=1.5, resume=True)
    assert (state(tmp_path)["epoch"], state(tmp_path)["done"]) == (2, 2)
    assert_resumes(tmp_path, straight)


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


def test_full_disk_keeps_the_last_state(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert_run_refused(tmp_path, "can't write .*pth.tar", resume=True, epochs=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


@pytest.mark.parametrize("left", ["no file", "no line", "more than a line"])
def test_stats_that_a_kill_left_are_repaired(left: str, straight: Path, tmp_path: Path) -> None:
    run_small(tmp_path, epochs=1)
    path = tmp_path / "stats.jsonl"
    first = path.read_text()
    path.write_text(first + first[:40] if left == "more than a line" else "")
    if left == "no file":
        path.unlink()
    assert_resumes(tmp_path, straight)
    assert path.read_text().startswith(first)


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
        ({"seed": 1}, r"settings: seed was 0, now 1\. Resume with the flags of its command: python "),
        (
            {"limit": 9, "batch_size": 12, "lr": 1, "compile": True, "log_interval": 9},
            "settings: limit was None, now 9; batch_size was 6, now 12; lr was 0.01, now 1; and 1 more",
        ),
        ({"lr_schedule": "late", "epochs": 2}, "lr_schedule was constant, now late"),
        ({"train": small_data(24, seed=3)}, "other training data"),
        ({"weights": {"label": 2.0}}, "other terms, weights or importance samples"),
        ({"optimizer": sgd}, "other optimizer options"),
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


def test_best_model_without_a_state_is_not_overwritten(straight: Path, tmp_path: Path) -> None:
    """A run that was killed between the first epoch's two files is repeated."""
    said = f"{checkpoint.BEST} would be overwritten.*out_dir"
    run_small(tmp_path, epochs=1)
    (tmp_path / checkpoint.LATEST).unlink()
    assert_run_refused(tmp_path, said)
    assert_resumes(tmp_path, straight)
    (tmp_path / checkpoint.LATEST).unlink()
    assert_run_refused(tmp_path, said, resume=True)


def test_epochs_of_a_run_whose_rate_ends_with_them_do_not_change(tmp_path: Path) -> None:
    run_small(tmp_path, lr_schedule="late")
    for epochs in (1, 3):
        said = f"is of a run of 2 epochs, not {epochs}.*lr_schedule late.*--init {tmp_path}"
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
        (lambda content: [content.pop(name) for name in ("optimizer", "kept")], "no state to resume from.*--init"),
        (lambda content: content["model"].pop("encoders.image.linear.bias"), "don't fit.*image.linear.bias"),
        (lambda content: content["optimizer"]["state"][0]["exp_avg"].resize_(1), "optimizer's state in .* doesn't fit"),
    ],
    ids=["unknown setting", "best model", "weights", "optimizer"],
)
def test_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, straight: Path, tmp_path: Path
) -> None:
    content = checkpoint.load(straight / checkpoint.LATEST, "small")
    change(content)
    checkpoint.save(tmp_path / checkpoint.LATEST, "small", content)
    assert_run_refused(tmp_path, said, resume=True, epochs=3)


def test_init_starts_a_new_run_from_old_weights(digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--limit", 100, "--epochs", 1, *SHORT]
    assert_ended(run_warm("mnist/train.py", *flags, "--out-dir", "old", cwd=tmp_path))
    flags += ["--lr", 1e-30, "--seed", 3, "--lambda-text", 7, "--init", tmp_path / "old" / checkpoint.BEST]
    assert_ended(run_warm("mnist/train.py", *flags, "--out-dir", "tuned", cwd=tmp_path))
    old, new = (checkpoint.load(tmp_path / folder / checkpoint.BEST, "mnist") for folder in ("old", "tuned"))
    torch.testing.assert_close(new["model"], old["model"])
