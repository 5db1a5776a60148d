"""Run, the plumbing of the open loop: what a step does, what an epoch measures, records and prints."""

import functools
import itertools
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mvae import MVAE, Objective, Run, Term, Training, UsageError
from mvae.data.dataset import permuted_rows, seed_of
from mvae.model import Batch
from mvae.objective import random_subsets
from mvae.run import checkpoint, config, reports, schedules

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import run_small, same, small_data, small_model, stats


def weights(out_dir: Path, name: str = checkpoint.LATEST) -> dict[str, Tensor]:
    return checkpoint.load(out_dir / name, "small")["model"]


def value(model: MVAE, batch: Batch) -> Tensor:
    return batch["label"].float()


# Steps


def test_a_run_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    """With random subsets, β and rates that change at each step, groups of weights, and a metric that draws."""
    train, beta, rate = small_data(24, seed=0), schedules.linear(3), schedules.warmed_up(1, schedules.late(3))
    metrics = {"noisy": lambda model, batch: torch.randn(len(batch["label"]))}

    def groups(weights: Iterable[Tensor], lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [weight]} for weight in weights], lr, fused=fused)

    how: dict[str, Any] = {"epochs": 3, "seed": 5, "n_subsets": 2, "beta": beta, "rate": rate, "optimizer": groups}
    run = run_small(tmp_path, train=train, metrics=metrics, **how)

    objective = Objective(small_model())
    optimizer = torch.optim.Adam(objective.parameters(), fused=True)
    for epoch in (1, 2, 3):
        losses = []
        for step, rows in enumerate(permuted_rows(train, 6, seed_of(5, epoch))):
            subsets = random_subsets(3, 2, np.random.default_rng(seed_of(5, epoch, step)))
            t = epoch - 1 + (step + 1) / 4
            optimizer.param_groups[0]["lr"] = 1e-2 * rate(t)
            torch.manual_seed(seed_of(5, epoch, step, 0))
            loss, _ = objective(train.batch(rows)[0], beta(t), subsets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        record = run.history[epoch - 1]
        assert record["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert (record["beta"], record["lr"]) == (beta(t), 1e-2 * rate(t))
    assert same(run.model.state_dict(), objective.model.state_dict())


def loop(out_dir: Path, batch_size: int = 12, every: int = 1, forgotten: str = "") -> list[Tensor]:
    """Train without noise, and take a step of SGD every few batches; `forgotten` is what the loop leaves out."""
    model, data = small_model(), small_data(24, seed=0)
    for name, weight in model.encoders.named_parameters():
        weight.data[2:] = -100 if name.endswith("bias") else 0  # log-variances
    objective = Objective(model)
    settings = Training(epochs=2, batch_size=batch_size, out_dir=out_dir)
    with Run("small", objective, torch.optim.SGD(objective.parameters(), 0.1), settings) as run:
        for _ in run.epochs(2):
            for batch, _ in run.batches(data, batch_size) if forgotten != "batches" else ():
                loss, parts = run.objective(batch, run.beta)
                run.backward(loss / every, parts)
                if run.done % every == 0 and forgotten != "step":
                    run.step()
            if forgotten != "validate":
                run.validate(data)
    return list(model.parameters())


def test_gradients_of_several_batches_accumulate_until_a_step(tmp_path: Path) -> None:
    torch.testing.assert_close(loop(tmp_path / "whole", 24), loop(tmp_path / "parts", 8, every=3))


@pytest.mark.parametrize("forgotten", ["validate", "step", "batches"])
def test_a_loop_that_leaves_something_out_is_refused(forgotten: str, tmp_path: Path) -> None:
    needs_step = r"run\.validate needs run\.backward\(\.\.\.\), then run\.step\(\)"
    with pytest.raises(UsageError, match="end in run.validate" if forgotten == "validate" else needs_step):
        loop(tmp_path, forgotten=forgotten)


@pytest.mark.parametrize("kind", ["new", "loaded", "frozen"])
def test_networks_are_trained_in_training_mode_and_validated_in_evaluation_mode(kind: str, tmp_path: Path) -> None:
    """A loaded model is in evaluation mode as a whole; a part that alone is in it is frozen, and stays so."""
    model, modes = small_model(), list[bool]()
    encoder = model.encoders["label"]
    encoder.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    {"new": model.train, "loaded": model.eval, "frozen": encoder.eval}[kind]()
    run_small(tmp_path, model=model, batch_size=12)
    expected = [False] if kind == "frozen" else [False, True, False, True, False]
    assert [mode for mode, _ in itertools.groupby(modes)] == expected
    assert model.encoders["image"].training


MISSING = {"image": torch.arange(24) > 7, "label": torch.arange(24) % 5 > 0, "attrs": torch.arange(24) < 23}


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    train = small_data(24, seed=0, present=MISSING)
    single, half = (
        run_small(tmp_path / precision, train=train, precision=precision, n_subsets=1, lr=1e-30).history[-1]
        for precision in ("fp32", "bf16")
    )
    for loss in ("train/loss", "validation/loss"):
        assert single[loss] != half[loss] == pytest.approx(single[loss], rel=0.02)


def test_a_compiled_run_has_the_losses_and_weights_of_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are captured as for torch's default backend, whose code takes a minute to generate."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train = small_data(24, seed=0, present=MISSING)
    plain, compiled = (
        run_small(tmp_path / str(flag), train=train, compile=flag, n_subsets=1) for flag in (False, True)
    )
    for record, expected in zip(compiled.history, plain.history, strict=True):
        for loss in ("train/loss", "validation/loss"):
            assert record[loss] == pytest.approx(expected[loss], rel=1e-5)
    for weight, other in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"compile needs a C\+\+ compiler.*CXX"):
        run_small(tmp_path / "run", compile=True)


# Validation


def test_validation_draws_the_same_noise_in_each_epoch_and_other_noise_for_another_batch_or_seed(
    tmp_path: Path,
) -> None:
    """The model doesn't change, and the second batch repeats the first."""
    six = torch.arange(6)
    twice = small_data(6, seed=1)[torch.cat([six, six])]
    found = [
        [
            record["validation/loss"]
            for record in run_small(tmp_path / str(i), validation=data, seed=seed, lr=1e-30).history
        ]
        for i, (data, seed) in enumerate([(twice[:6], 0), (twice, 0), (twice[:6], 1)])
    ]
    assert all(first == second for first, second in found)
    assert len({first for first, _ in found}) == 3
    objective = Objective(small_model())
    torch.manual_seed(seed_of(0, 0, 0))
    assert found[0][0] == pytest.approx(objective(twice.batch(six)[0], 1.0)[0].item())


@pytest.mark.parametrize(
    ("present", "complete"),
    [
        (None, list(range(10))),
        ({"image": torch.arange(10) != 3, "attrs": torch.arange(10) < 7}, [0, 1, 2, 4, 5, 6]),
        ({"image": torch.arange(10) < 0}, []),
    ],
    ids=["complete", "some", "none"],
)
def test_a_metric_is_the_mean_over_the_complete_examples(present: Any, complete: list[int], tmp_path: Path) -> None:
    validation = small_data(10, seed=1, present=present)
    run = run_small(tmp_path, validation=validation, metrics={"value": value})
    for record in (*run.history, *stats(tmp_path)):
        expected = validation.tensors["label"][complete].double().mean().item() if complete else None
        assert record.get("validation/value") == pytest.approx(expected)
        assert "train/value" not in record


def test_a_metric_that_is_not_finite_is_null_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"bad": lambda model, batch: value(model, batch) / 0, "good": value}
    records = run_small(tmp_path, metrics=metrics).history
    assert [record["validation/bad"] for record in (*records, *stats(tmp_path))] == [None] * 4
    assert all(math.isfinite(record["validation/good"]) for record in records)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "not finite in epoch 1, recorded as null: bad" in caplog.text
    assert len(run_small(tmp_path, metrics=metrics, epochs=3, resume=True).history) == 3


@pytest.mark.parametrize(("select", "best"), [("loss", 4), ("joint", 3)])
def test_the_best_model_has_the_least_loss_or_the_greatest_joint_elbo(select: str, best: int, tmp_path: Path) -> None:
    """The learning rate is so high that the loss falls and rises. The run is resumed after its best epoch."""
    how: dict[str, Any] = {"lr": 0.3, "seed": 11, "beta": lambda t: 1.0, "weights": {"label": 10.0}}
    run_small(tmp_path, **how, select=select, epochs=best)
    then = weights(tmp_path)
    run = run_small(tmp_path, **how, select=select, epochs=5, resume=True)
    losses = [record["validation/loss"] for record in run.history]
    scores = {"loss": losses, "joint": [-record["validation/joint/elbo"] for record in run.history]}
    assert [int(np.argmin(scores[name])) + 1 for name in ("loss", "joint")] == [4, 3]
    content = checkpoint.load(tmp_path / checkpoint.BEST, "small")
    assert (content["epoch"], content["validation_loss"], run.best_epoch) == (best, losses[best - 1], best)
    assert same(content["model"], then)


# Reports


def test_an_epochs_line_has_as_many_metrics_as_fit() -> None:
    record = {"epoch": 10, "beta": 0.5, "seconds": 3600.0, "train/loss": 13440.731, "validation/loss": 13440.731}
    record |= {f"validation/{name}_accuracy": 0.91234 for name in ("label", "attribute", "string")}
    record["validation/joint/elbo"] = -6400.0
    text = reports.line(record, 100, ["joint"], best=True)
    assert len(text) < 100
    assert "label_accuracy 0.9123" in text
    assert text.endswith("90.0 h left  best")
    del record["validation/joint/elbo"]  # no validation example has a modality of the term
    assert reports.line(record, 100, ["joint"], best=True) == text


def test_a_run_prints_what_it_trains_and_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"value": value, "bad": lambda model, batch: value(model, batch) / 0}
    records = run_small(tmp_path, log_interval=2, n_subsets=3, metrics=metrics).history
    header, *lines = capsys.readouterr().out.splitlines()
    machine = r"cpu \(\d+ threads?\), fp32"
    assert re.fullmatch(rf"small: 2 epochs of 24 examples, 0\.00M parameters, {machine}, writing to {tmp_path}", header)
    assert max(map(len, lines)) < 100
    steps = [line for line in lines if "  step " in line]
    assert [line.split("  loss")[0] for line in steps] == [f"epoch {i}/2  step {j}/4" for i in (1, 2) for j in (2, 4)]
    assert all(re.search(r"loss \d+\.\d\d  \d+ examples/s  < 1 min left$", line) for line in steps)
    first, note, second = [line for line in lines if line not in steps]
    assert "validation loss is at β = 1" in note
    for line, record in zip([first, second], records, strict=True):
        assert f"epoch {record['epoch']}/2  β {record['beta']:.2f}" in line
        assert f"loss {record['train/loss']:.2f} (validation {record['validation/loss']:.2f})" in line
        assert f"value {record['validation/value']:.4f}  bad –" in line
        assert ("< 1 min left" in line) == (record["epoch"] == 1)
        terms = ["joint", "image", "attrs", "label"]
        elbos = [f"train/{name}/elbo" for name in [*terms, "subset"]] + [f"validation/{name}/elbo" for name in terms]
        assert [name for name in record if name.endswith("/elbo")] == elbos


def test_a_terminal_gets_a_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_small(tmp_path, log_interval=1)
    said = capsys.readouterr()
    assert "epoch 1/2:" in said.err
    assert "  step " not in said.out


# What is refused


def normed_model() -> MVAE:
    model = small_model()
    model.encoders["image"] = nn.Sequential(nn.BatchNorm2d(1), model.encoders["image"])
    return model


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"optimizer": lambda *_, **__: torch.optim.SGD(small_model().parameters(), 1)}, "build the optimizer from"),
        ({"terms": [Term(("image",), ("image",))], "select": "joint"}, "select joint needs a term"),
        ({"validation": small_data(10, seed=1, present={"label": torch.arange(10) < 0}), "select": "joint"}, "every"),
        ({"metrics": {"loss": value, "x/y": value}}, "must not be named 'loss' or contain '/', got loss, x/y"),
        ({"model": normed_model(), "batch_size": 1}, r"at least 2 examples per process \(.*batch norm\), got 1, 24"),
        ({"train": small_data(24, seed=0, pairs=torch.arange(24) < 3), "pairs_per_batch": 2}, "pairs_per_batch needs"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_a_wrong_call_is_refused(how: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run_small(tmp_path, **how)
    assert not (tmp_path / checkpoint.BEST).exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
        ({"lr": 0}, "lr must be > 0, got 0"),
        ({"seed": 2**63}, "seed must be an integer from 0"),
        ({"threads": 10**6}, "threads must be from 1 to 1024"),
        ({"paired_fraction": 1.5}, r"paired_fraction must be in \(0, 1\]"),
        ({"paired_fraction": 0.5, "n_paired": 5}, "without n_paired"),
        ({"unpaired": "both"}, "unpaired needs n_paired or paired_fraction"),
        ({"images_first": 1, "self_labels": 2}, "self_labels must be from 0 to 1, got 2"),
        ({"self_labels": 0.5}, "self_labels and images_dir need images_first"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x.items())),
)
def test_a_config_refuses_a_value_that_is_not_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config.TwoStages(**fields)


def test_a_third_of_each_batch_is_complete_by_default_where_examples_lack_something() -> None:
    cases: list[dict[str, Any]] = [{}, {"n_paired": 5}, {"paired_fraction": 0.5}, {"n_paired": 5, "pairs_per_batch": 0}]
    assert [Training(batch_size=30, **how).pairs for how in cases] == [0, 10, 10, 0]
