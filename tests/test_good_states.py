"""A saved state is a good state: numbers that aren't finite and losses that diverge stop a run, and are never saved."""

import dataclasses
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mvae import MVAE, Bernoulli, Data, Gaussian, UsageError, UserError
from mvae.run import checkpoint, schedules
from mvae.run.resume import DIVERGED

import pytest
import torch
from torch import Tensor, nn

from helpers import SHORT, SmallEncoder, assert_refused, at_call, run_small, run_warm, small_data, small_model

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


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient that isn't finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


class SpoiledEncoder(SmallEncoder):
    """An encoder whose gradient isn't finite at the n-th training step, though its output is."""

    def __init__(self, n_inputs: int, step: int):
        super().__init__(n_inputs)
        self.steps_left = step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = super().forward(x)
        self.steps_left -= self.training
        return (NanGradient.apply(mu) if self.training and self.steps_left == 0 else mu), logvar


def with_bad_gradient(step: int) -> MVAE:
    model = small_model()
    model.encoders["attrs"] = SpoiledEncoder(4, step)
    return model


def training(step: int, change: Callable[[Rows], Rows]) -> Data:
    return small_data(24, seed=0, transform=at_call(step, change))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"train": training(1, spoiled("image"))}, "step 1: not finite: log p of image in term image"),
        ({"train": training(4, spoiled("attrs"))}, "step 4: not finite: log p of attrs in term attrs"),
        ({"model": with_bad_gradient(1)}, r"step [12]: not finite: the gradient of encoders\.attrs"),
        ({"model": with_bad_gradient(4)}, r"step 4: not finite: the gradient of encoders\.attrs"),
        (
            {"model": with_bad_gradient(2), "train": training(2, stop)},
            r"step 2: not finite: the gradient of encoders\.attrs",
        ),
        (
            {"validation": small_data(10, seed=1, transform=at_call(1, spoiled("attrs")))},
            "step 4: not finite: validation joint/elbo",
        ),
        ({"rate": lambda t: 1e6 if t > 1.25 else 1.0}, "step [34]: (diverged: loss|not finite: log p of image)"),
        (
            {"rate": lambda t: 1e6 if t > 1.25 else 1.0, "train": training(3, stop)},
            "step 3: (diverged: loss|not finite: log p of image)",
        ),
    ],
    ids=["data", "last data", "gradient", "last gradient", "signal", "validation", "diverging", "diverging, signal"],
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
    with pytest.raises(UserError, match="epoch 1, step 1"):
        run_small(tmp_path, train=training(1, spoiled("image")))
    assert not [name for name in (*SAVED[:2], DIVERGED) if (tmp_path / name).exists()]
    assert len(run_small(tmp_path, resume=True).history) == 2


def test_culprit_among_many_modalities_is_named(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(8)]
    model = MVAE(
        encoders={name: SmallEncoder(2) for name in names},
        likelihoods={name: Bernoulli(nn.Linear(2, 2)) for name in names},
        n_latents=2,
    )
    examples = Data(tensors={name: torch.ones(6, 2) for name in names})
    train = dataclasses.replace(examples, transform=at_call(1, spoiled("m7")))
    with pytest.raises(UserError, match="not finite: log p of m7 in term m7"):
        run_small(tmp_path, model=model, train=train, validation=examples)


def test_a_run_is_compared_with_its_first_step_even_when_it_is_resumed(tmp_path: Path) -> None:
    """It begins so far off that its last epoch isn't said to diverge, though the second one came close."""
    data = Data(tensors={"x": torch.randn(24, 6, generator=torch.Generator().manual_seed(0))})

    def train(folder: str, epochs: int, **how: Any) -> list[float]:
        torch.manual_seed(0)
        decoder = nn.Linear(2, 6)
        nn.init.constant_(decoder.bias, 3e4)

        def bias_alone(weights: Iterable[nn.Parameter], lr: float, fused: bool) -> torch.optim.Optimizer:
            return torch.optim.Adam([{"params": [w for w in weights if w.shape == (6,)]}], lr, fused=fused)

        model = MVAE(encoders={"x": SmallEncoder(6)}, likelihoods={"x": Gaussian(decoder)}, n_latents=2)
        rate = lambda t: 1.0 if t <= 2 else 0.0 if t <= 2.8 else 30.0  # noqa: E731
        run = run_small(
            tmp_path / folder, epochs=epochs, model=model, train=data, validation=data, optimizer=bias_alone,
            rate=rate, beta=schedules.constant(), lr=4e3, **how,
        )  # fmt: skip
        return [record["validation/loss"] for record in run.history]

    straight = train("straight", 3)
    assert straight[2] > 100 * max(100, straight[1])
    train("parts", 2)
    assert train("parts", 3, resume=True) == straight


def test_script_whose_loss_is_not_finite_ends_with_one_line(digits_dir: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", digits_dir, "--limit", 100, *SHORT, "--lr", 1e20, "--out-dir", "run"]
    done = run_warm("mnist/train.py", *flags, cwd=tmp_path)
    assert_refused(done, 1, "train.py: epoch 1, step 2: not finite: log p of image in term image", "a smaller --lr")
    assert not (tmp_path / "run" / checkpoint.LATEST).exists()
