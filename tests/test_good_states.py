"""A saved state is a good state: numbers that aren't finite and losses that diverge stop a run, and are never saved."""

import contextlib
import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvae import MVAE, Data, UsageError, UserError
from mvae.objective import Totals
from mvae.run import checkpoint
from mvae.run.resume import DIVERGED
from mvae.run.validation import check_good, check_means

import pytest
import torch
from torch import Tensor

from helpers import at_call, run_small, small_data, small_model

Rows = dict[str, Tensor]
SAVED = (checkpoint.LATEST, checkpoint.BEST, "stats.jsonl")


def spoiled(name: str) -> Callable[[Rows], Rows]:
    """Return a change of a batch: the first example of this modality becomes NaN."""

    def change(rows: Rows) -> Rows:
        changed = rows[name].clone()
        changed[0] = torch.nan
        return {**rows, name: changed}

    return change


def stop(rows: Rows) -> Rows:
    signal.raise_signal(signal.SIGTERM)
    return rows


def with_bad_gradient(step: int) -> MVAE:
    """Return the small model; at the n-th training step a gradient isn't finite, though the loss is."""
    model, steps = small_model(), itertools.count(1)
    weight = next(model.encoders["attrs"].parameters())
    weight.register_hook(lambda gradient: gradient * torch.nan if next(steps) == step else None)
    return model


def training(step: int, change: Callable[[Rows], Rows]) -> Data:
    return small_data(24, seed=0, transform=at_call(step, change))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"train": training(4, spoiled("attrs"))}, "step 4: not finite: training attrs/elbo"),
        ({"model": with_bad_gradient(4)}, r"step 4: not finite: the gradient of encoders\.attrs"),
        ({"model": with_bad_gradient(2), "train": training(2, stop)}, r"step 2: .* gradient of encoders\.attrs"),
        ({"validation": training(1, spoiled("attrs"))}, "step 4: not finite: validation attrs/elbo"),
        ({"rate": lambda t: 1e6 if t > 1.25 else 1.0}, "step [34]: (diverged|not finite): training "),
    ],
    ids=["last data", "last gradient", "signal", "validation", "diverging"],
)
def test_bad_numbers_are_named_and_not_saved(how: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Even if a signal arrives. The state of the first epoch is kept, and resuming says what happened."""
    run_small(tmp_path, epochs=1)
    before = [(tmp_path / name).read_bytes() for name in SAVED]
    with pytest.raises(UserError, match=f"epoch 2, {said}") as stopped:
        run_small(tmp_path, **how, resume=True, save_every=1e9)
    assert "\n" not in str(stopped.value)
    assert "the last good state is kept; try a smaller --lr" in str(stopped.value)
    assert [(tmp_path / name).read_bytes() for name in SAVED] == before
    with pytest.raises(UsageError, match=f"epoch 2, .*--init CHECKPOINT, .*delete .*{DIVERGED}"):
        run_small(tmp_path, resume=True)
    (tmp_path / DIVERGED).unlink()
    assert len(run_small(tmp_path, resume=True).history) == 2


def test_states_saved_at_each_step_are_good(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(diverged|not finite): "):
        run_small(tmp_path, epochs=9, rate=lambda t: 1e4, save_every=1e-9)
    saved = checkpoint.load(tmp_path / checkpoint.LATEST, "small")
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert saved["sums"][0] / saved["sums"][1] < 100 * max(100, saved["start"])


def test_first_step_that_is_bad_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / DIVERGED).write_text("of a run whose checkpoints were deleted")
    with pytest.raises(UserError, match="epoch 1, step 1"):
        run_small(tmp_path, train=training(1, spoiled("image")))
    assert not [name for name in (*SAVED[:2], DIVERGED) if (tmp_path / name).exists()]
    assert len(run_small(tmp_path, resume=True).history) == 2


@pytest.mark.parametrize(("start", "limit"), [(1.0, 1e4), (-3e4, 3e6)])
def test_a_loss_diverges_at_a_hundred_times_that_of_the_first_step(start: float, limit: float) -> None:
    zeros = torch.zeros(1, 1)
    for factor in (0.9, 1.1):
        loss = factor * limit
        last = Totals(("x",), ("x",), torch.tensor(2 * loss), torch.tensor(2), zeros, zeros, zeros[0], zeros[0])
        with pytest.raises(UserError, match="diverged: training loss") if factor > 1 else contextlib.nullcontext():
            check_good(small_model(), last, start)
        with pytest.raises(UserError, match="diverged: validation") if factor > 1 else contextlib.nullcontext():
            check_means({"loss": loss}, start, "validation")
