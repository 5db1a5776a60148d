"""Data are checked where they enter a run or an evaluation: an error names what is wrong and what would be right."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvae import (
    MVAE,
    Bernoulli,
    Categorical,
    Data,
    Gaussian,
    Likelihood,
    Objective,
    Quantity,
    Run,
    Training,
    UsageError,
    evaluate,
    of_a_pair,
)
from mvae.data import dataset
from mvae.data.supervision import share_pairs
from mvae.run import checkpoint

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import SmallEncoder, at_call, run_small, small_data, small_model


class Unsummed(Gaussian):
    """A likelihood whose log_prob forgets to sum over x."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        return x * self.decode(z)


class Bare(nn.Module):
    """An encoder that returns anything."""

    def __init__(self, result: Callable[[Tensor], Any]):
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)


def one(likelihood: Likelihood, encoder: nn.Module | None = None) -> MVAE:
    """Return a model of the modality x, by default of six values, with two latents."""
    return MVAE(encoders={"x": encoder or SmallEncoder(6)}, likelihoods={"x": likelihood}, n_latents=2)


def bernoulli() -> MVAE:
    return one(Bernoulli(nn.Linear(2, 6)))


def gaussian(encoder: nn.Module | None = None) -> MVAE:
    return one(Gaussian(nn.Linear(2, 6)), encoder)


def categorical(encoder: nn.Module | None = None) -> MVAE:
    return one(Categorical(nn.Linear(2, 3)), encoder or SmallEncoder(1))


SIX, GREY = torch.zeros(8, 6), torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
UNFIT = {
    "wide": (gaussian(SmallEncoder(1)), torch.zeros(8, 1), r"must have the decoder's shape \(1, 6\), got \(1, 1\)"),
    "one-hot": (categorical(SmallEncoder(3)), torch.zeros(8, 3).long(), r"of \(1,\), got .* of \(1, 3\): use argmax"),
    "0 to 255": (bernoulli(), 255 * GREY, "values must be from 0 to 1, got .*divide .* by 255"),
    "standardised": (bernoulli(), GREY - 0.5, "values must be from 0 to 1, got -0.*don't standardise"),
    "uint8": (bernoulli(), SIX.byte(), "must be floats from 0 to 1.*got torch.uint8"),
    "whole": (gaussian(), SIX.long(), "must be floats.*got torch.int64"),
    "floats": (categorical(), torch.zeros(8), "must be class numbers, torch.int64 of .*got torch.float32"),
    "unsummed": (one(Unsummed(nn.Linear(2, 6))), SIX, r"log_prob must have shape \(1,\), got \(1, 6\)"),
    "4": (gaussian(Bare(lambda x: (x[:, :4], x[:, :4]))), SIX, r"must return mu, logvar of \(1, 2\), got .*\(1, 4\)"),
    "decoder": (one(Gaussian(nn.Linear(3, 6))), SIX, "the likelihood fails on torch.float32"),
    "float64": (gaussian(Bare(nn.Linear(6, 4))), SIX.double(), "encoder fails on torch.float64 .*are torch.float32"),
}


def train_one(out_dir: Path, model: MVAE, train: Tensor, validation: Tensor) -> None:
    parts = Data(tensors={"x": train}), Data(tensors={"x": validation})
    run_small(out_dir, model=model, train=parts[0], validation=parts[1], epochs=1, batch_size=8, lr=1e-9)


@pytest.mark.parametrize(("model", "x", "said"), UNFIT.values(), ids=UNFIT)
def test_examples_that_do_not_fit_the_networks_are_refused(model: MVAE, x: Tensor, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^training data, example \d+: x: .*{said}") as caught:
        train_one(tmp_path, model, x, x)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / checkpoint.LATEST).exists()


def last(x: Tensor, value: float) -> Tensor:
    """Return 1,200 rows like the first of x, the last of them with another value."""
    rows = x[:1].repeat(1200, *[1] * (x.dim() - 1))
    rows[-1] = value
    return rows


@pytest.mark.parametrize(
    ("model", "good", "value", "said"),
    [
        (bernoulli(), GREY, 2, "got .* to 2:"),
        (bernoulli(), GREY, math.nan, "got nan"),
        (categorical(), torch.zeros(8).long(), -1, "labels must be from 0 to 2, got -1"),
        (categorical(), torch.zeros(8).long(), 3, "labels must be from 0 to 2, got .*3"),
    ],
)
def test_a_wrong_value_is_found_in_the_last_example(
    model: MVAE, good: Tensor, value: float, said: str, tmp_path: Path
) -> None:
    bad = last(good, value)
    for train, validation, which in ((bad, good, "training"), (good, bad, "validation")):
        with pytest.raises(UsageError, match=rf"^{which} data, example 1199: x: .*{said}"):
            train_one(tmp_path / which, model, train, validation)
    assert not (tmp_path / "training" / checkpoint.LATEST).exists()
    assert (tmp_path / "validation" / checkpoint.LATEST).exists()  # the epoch's steps are kept
    with pytest.raises(UsageError, match=f"x: .*{said}"):
        evaluate(model, Data(tensors={"x": bad}), quantities={Quantity(("x",)): [("x",)]}, n_samples=2)


def test_absent_examples_may_hold_any_value(tmp_path: Path) -> None:
    data = Data(tensors={"x": last(GREY, 7)}, present={"x": torch.arange(1200) < 1199})
    run_small(tmp_path, model=bernoulli(), train=data, validation=data[:8], epochs=1)
    assert data.extremes().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float16])
def test_extremes_are_found_in_numbers_of_any_type(dtype: torch.dtype) -> None:
    values = torch.full((2000, 3), 5.0)
    values[700, 1], values[1999, 2] = 1, 9
    assert Data(tensors={"x": values.to(dtype)}).extremes().tolist() == [700, 1999]


TENSORS = small_data(24, seed=0).tensors


def wrong_labels(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**rows, "label": rows["label"] + 3}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data(tensors={name: TENSORS[name] for name in ("image", "attrs")}), "the batch lacks label: it has image"),
        (small_data(24, seed=0, present={"labl": torch.ones(24).bool()}), "unknown modality labl"),
        (small_data(24, seed=0, transform=at_call(3, wrong_labels)), "label: labels must be from 0 to 2, got"),
    ],
)
def test_a_batch_that_lacks_a_modality_or_has_a_wrong_label_is_refused(data: Data, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run_small(tmp_path, train=data)


def test_a_large_set_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third part of a tensor of 2 to 3 times the limit is looked at."""
    values = torch.zeros(3 * 4096, dtype=torch.uint8)
    whole = Data(tensors={"x": values}).checksum()
    monkeypatch.setattr(dataset, "SAMPLED", 5000)
    changed = values.clone()
    changed[[4096, 8192]] = 9
    same, other = Data(tensors={"x": values}), Data(tensors={"x": changed})
    assert whole != same.checksum() == other.checksum()
    assert other.extremes().tolist() == same.extremes().tolist() == [0]
    changed[[0, 512 * 3]] = 9
    assert same.checksum() != Data(tensors={"x": changed}).checksum()


# What is given as data


def test_a_dataset_of_torchs_is_read() -> None:
    pairs = TensorDataset(GREY, torch.arange(8))
    found = Data.from_dataset(pairs, ("x", "label"))
    assert torch.equal(found.tensors["x"], GREY)
    assert torch.equal(found.tensors["label"], torch.arange(8))
    for wrong in (pairs, DataLoader(pairs), GREY):
        with pytest.raises(UsageError, match=f"must be a dict by modality, got a {type(wrong).__name__}; see Data"):
            Data(tensors=wrong)  # type: ignore[arg-type]


def test_a_label_may_be_a_mask_of_classes() -> None:
    """Of (4, 4) pixels with 3 classes; (batch, classes, 4, 4) logits must have the classes last."""
    decoder = nn.Sequential(nn.Linear(2, 48), nn.Unflatten(1, (4, 4, 3)))
    likelihood, z, x = Categorical(decoder), torch.randn(5, 7, 2), torch.randint(3, (7, 4, 4))
    expected = torch.distributions.Categorical(logits=decoder(z.flatten(0, 1)).unflatten(0, (5, 7))).log_prob(x)
    torch.testing.assert_close(likelihood.log_prob(z, x), expected.sum(dim=(2, 3)))
    likelihood.check(x, z[0])
    with pytest.raises(UsageError, match=r"class numbers, torch.int64 of \(7, 4, 4\), got torch.int64 of \(7, 16\)"):
        likelihood.check(x.flatten(1), z[0])


def test_validation_gets_at_most_a_fifth_of_few_labels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mvae")
    data = Data(tensors={"x": torch.zeros(500, 2), "y": torch.arange(500) % 10})
    for n_train, expected in ((300, "80 for training, 20 for validation"), (480, "96 for training, 4 for validation")):
        train, validation = share_pairs(data[:n_train], data[n_train:], 100, ("x", "y"), seed=0)
        assert f"complete examples: {expected}" in caplog.text
        assert sum(int(part.present["y"].sum()) for part in (train, validation) if part.present) == 100
    with pytest.raises(UsageError, match=r"complete examples must be from 2 to 500 .*got 0"):
        share_pairs(data[:300], data[300:], 0.001, ("x", "y"), seed=0)


# Where a model may run


def test_an_optimizer_that_computes_the_loss_itself_is_refused(tmp_path: Path) -> None:
    objective = Objective(small_model())
    with pytest.raises(UsageError, match="LBFGS computes the loss several times a step"):
        Run("small", objective, torch.optim.LBFGS(objective.parameters()), Training(out_dir=tmp_path))


def test_a_run_may_be_in_a_thread(tmp_path: Path) -> None:
    records: list[Any] = []
    thread = threading.Thread(target=lambda: records.extend(run_small(tmp_path).history))
    thread.start()
    thread.join()
    assert [record["epoch"] for record in records] == [1, 2]


def test_a_float64_model_is_trained_resumed_evaluated_and_drawn_from(tmp_path: Path) -> None:
    def model() -> MVAE:
        encoders = {
            "image": Bare(lambda x: x.flatten(1)[:, :4].chunk(2, dim=1)),
            "attrs": nn.Sequential(nn.Linear(4, 4), Bare(lambda h: h.chunk(2, dim=1))),
        }
        likelihoods = {name: small_model().likelihood(name) for name in encoders}
        return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=2).double()

    data = Data(tensors={name: x.double() if x.is_floating_point() else x for name, x in TENSORS.items()})
    run_small(tmp_path, model=model(), train=data, validation=data, epochs=1)
    trained = model()
    run = run_small(tmp_path, model=trained, train=data, validation=data, epochs=2, resume=True)
    assert [record["epoch"] for record in run.history] == [1, 2]
    assert trained.draw({}, 3).dtype == torch.float64
    found = evaluate(trained, data, quantities=of_a_pair(("image",), ("attrs",)), n_samples=3)
    assert all(estimate.log_p.isfinite().all() for estimate in found.estimates.values())
