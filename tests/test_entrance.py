"""What enters the library is checked where it enters: one error, which names the culprit and what would be right."""

import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvae.data import Data
from mvae.errors import UsageError, UserError
from mvae.estimators import Quantity, evaluate, of_a_pair
from mvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from mvae.model import MVAE
from mvae.objective import Objective
from mvae.schedules import constant, cosine, late, linear
from mvae.training import Options, fit, train_step

from helpers import SmallEncoder, at_call, fit_small, small_data, small_model

# Data.


@pytest.mark.parametrize(
    ("tensors", "present", "said"),
    [
        ({}, None, "no examples in `tensors`"),
        ({"a": torch.zeros(0, 3)}, None, "no examples in `tensors`"),
        ({"a": torch.zeros(4), "b": torch.zeros(5)}, None, "a of `tensors` has 4, b of `tensors` has 5"),
        ({"a": torch.tensor(1.0)}, None, "a of `tensors` is a single number"),
        ({"a": np.zeros(4)}, None, "a of `tensors` is a ndarray.*torch.from_numpy"),
        ({"a": [1, 2]}, None, "a of `tensors` is a list, and a torch.Tensor"),
        ({"a": torch.zeros(4)}, {"a": torch.ones(3, dtype=torch.bool)}, "a of `present` has 3"),
        ({"a": torch.zeros(4)}, {"a": torch.ones(4)}, "a of `present` is torch.float32.*torch.bool"),
        ({"a": torch.zeros(4)}, {"a": torch.ones(4, 1, dtype=torch.bool)}, r"a of `present` .*\(4, 1\)"),
        ({"a": torch.zeros(4)}, {"a": np.ones(4, bool)}, "a of `present` is a ndarray"),
    ],
)
def test_data_that_are_no_examples_are_refused(tensors: Any, present: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Data(tensors=tensors, present=present)


def test_slice_without_examples_is_refused() -> None:
    with pytest.raises(UsageError, match="no examples"):
        small_data(4, seed=0)[4:]


def test_one_example_is_taken_by_a_slice() -> None:
    with pytest.raises(UsageError, match=r"slice such as \[:900\].*not by 3"):
        small_data(4, seed=0)[3]  # type: ignore[index]


# Options, weights, schedules.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "`epochs` is 0, and a whole number, 1 or more"),
        ({"epochs": 2.5}, "`epochs` is 2.5"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": -3}, "`batch_size` is -3"),
        ({"approx_m": -1}, "`approx_m` is -1, and a whole number, 0 or more"),
        ({"seed": -1}, "`seed` is -1"),
        ({"log_interval": 0}, "`log_interval` is 0"),
        ({"precision": "fp16"}, "`precision` is 'fp16', and fp32 or bf16"),
        ({"out_dir": 7}, "`out_dir` is 7"),
        ({"device": "gpu"}, "`device` is 'gpu'"),
        ({"device": None}, "`device` is None"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Options(**{"epochs": 1, "batch_size": 2, **options})


def test_options_take_strings_for_a_folder_and_a_device() -> None:
    options = Options(epochs=np.int64(3), batch_size=2, out_dir="folder", device="cpu")  # type: ignore[arg-type]
    assert (options.out_dir, options.device) == (Path("folder"), torch.device("cpu"))


def test_step_of_another_precision_is_refused() -> None:
    objective = Objective(small_model())
    with pytest.raises(UsageError, match="`precision` is 'fp16'"):
        train_step(
            objective,
            torch.optim.SGD(objective.parameters(), 0.1),
            small_data(4, seed=0).batch(torch.arange(4))[0],
            precision="fp16",  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weight_that_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="the weight of label in `weights`"):
        Objective(small_model(), weights={"label": weight})


@pytest.mark.parametrize("schedule", [lambda: linear(-1), lambda: cosine(0), lambda: late(-2)])
def test_schedule_over_no_epochs_is_refused(schedule: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="`epochs` of a schedule"):
        schedule()


def test_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(small_model().parameters(), 0.1)
    data = small_data(8, seed=0)
    with pytest.raises(UsageError, match="`optimizer` holds weights that aren't `objective`'s"):
        fit(Objective(small_model()), optimizer, data, data, Options(epochs=1, batch_size=4), beta=linear(1))


# Models and the batches that they are given.


class Poisson(Likelihood):
    """Counts, as docs/extending.md has them: it doesn't say which x it takes."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        log_rate = self.decode(z)
        return (x * log_rate - log_rate.exp() - (x + 1).lgamma()).flatten(z.dim() - 1).sum(dim=-1)

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z).exp()

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        return torch.poisson(self.mean(z))


class SumOfNothing(Poisson):
    """A likelihood whose log_prob forgets to sum over x."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        return x * self.decode(z)


class Bare(nn.Module):
    """An encoder that makes the wrong things."""

    def __init__(self, result: Callable[[Tensor], Any]):
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)


def one(likelihood: Likelihood, encoder: nn.Module | None = None) -> MVAE:
    """A model of the modality x: six values for the encoder; two latents."""
    return MVAE(encoders={"x": encoder or SmallEncoder(6)}, likelihoods={"x": likelihood}, n_latents=2)


SIX, GREY = torch.zeros(8, 6), torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
UNFIT = [
    pytest.param(one(Gaussian(nn.Linear(2, 6)), SmallEncoder(1)), torch.zeros(8, 1), r"\(8, 1\).*\(8, 6\)", id="wide"),
    pytest.param(one(Gaussian(nn.Linear(2, 6)), SmallEncoder(1)), torch.zeros(8), r"\(8,\).*\(8, 6\)", id="flat"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), 255 * GREY, "from .* 0 to 1.*divided by 255", id="0 to 255"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), GREY - 0.5, "from -0.*standardised", id="standardised"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), SIX.byte(), "torch.uint8.*floats from 0 to 1", id="uint8"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), SIX * math.nan, "from nan", id="nan"),
    pytest.param(one(Gaussian(nn.Linear(2, 6))), SIX.long(), "torch.int64.*floats", id="whole"),
    pytest.param(one(Poisson(nn.Linear(2, 6)), SmallEncoder(1)), torch.zeros(8, 1), r"\(8, 1\).*\(8, 6\)", id="own"),
    pytest.param(one(SumOfNothing(nn.Linear(2, 6))), SIX, r"log_prob is of shape \(8, 6\)", id="unsummed"),
    pytest.param(
        one(Categorical(nn.Linear(2, 3)), SmallEncoder(1)), torch.full((8,), 3), "labels from 3 .* 0 to 2", id="class"
    ),
    pytest.param(
        one(Categorical(nn.Linear(2, 3)), SmallEncoder(1)), torch.full((8,), -1), "labels from -1", id="negative"
    ),
    pytest.param(one(Categorical(nn.Linear(2, 3)), SmallEncoder(1)), torch.zeros(8), "torch.float32", id="floats"),
    pytest.param(
        one(Categorical(nn.Linear(2, 3)), SmallEncoder(3)), torch.zeros(8, 3).long(), r"\(8, 3\)", id="one-hot"
    ),
    pytest.param(
        one(Gaussian(nn.Linear(2, 6)), Bare(lambda x: (x[:, :4], x[:, :4]))), SIX, r"\(8, 4\).*`n_latents` is 2", id="4"
    ),
    pytest.param(one(Gaussian(nn.Linear(2, 6)), Bare(lambda x: x)), SIX, "encoder", id="no pair"),
    pytest.param(one(Gaussian(nn.Linear(3, 6))), SIX, "its likelihood fails on torch.float32", id="decoder"),
    pytest.param(
        one(Gaussian(nn.Linear(2, 6)), Bare(nn.Linear(6, 4))),
        SIX.double(),
        r"its encoder fails on torch.float64 of \(8, 6\): .*the weights are torch.float32",
        id="float64",
    ),
]


def fit_one(model: MVAE, train: Data, validation: Data, out_dir: Path) -> None:
    objective = Objective(model)
    optimizer = torch.optim.SGD(objective.parameters(), 0.0)
    fit(objective, optimizer, train, validation, Options(epochs=1, batch_size=8, out_dir=out_dir), beta=linear(1))


@pytest.mark.parametrize(("model", "x", "said"), UNFIT)
def test_first_batch_that_the_model_does_not_take_is_refused_before_anything_is_written(
    model: MVAE, x: Tensor, said: str, tmp_path: Path
) -> None:
    data = Data(tensors={"x": x})
    with pytest.raises(UsageError, match=rf"training examples \(the first batch.*\): x: .*{said}") as caught:
        fit_one(model, data, data, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_first_batch_of_validation_is_checked_before_the_first_step(tmp_path: Path) -> None:
    model = one(Bernoulli(nn.Linear(2, 6)))
    with pytest.raises(UsageError, match=r"validation examples \(the first batch.*\): x: it has values from"):
        fit_one(model, Data(tensors={"x": GREY}), Data(tensors={"x": 255 * GREY}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def last(x: Tensor, value: float) -> Tensor:
    """1,200 rows like those of x, the last of them with another value."""
    rows = x[:1].repeat(1200, *[1] * (x.dim() - 1))
    rows[-1] = value
    return rows


LATER = [
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), last(GREY, -0.5), r"1199\).*from -0.5", id="below"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), last(GREY, 2), r"1199\).*to 2,", id="above"),
    pytest.param(one(Bernoulli(nn.Linear(2, 6))), last(GREY, math.nan), r"1199\).*nan", id="nan"),
    pytest.param(
        one(Categorical(nn.Linear(2, 3)), SmallEncoder(1)), last(torch.zeros(8).long(), 3), r"1199\).*to 3,", id="class"
    ),
]


@pytest.mark.parametrize(("model", "x", "said"), LATER)
def test_value_that_the_model_does_not_take_is_found_in_the_last_example(
    model: MVAE, x: Tensor, said: str, tmp_path: Path
) -> None:
    good = Data(tensors={"x": x[:8]})
    for train, validation, which in (
        (Data(tensors={"x": x}), good, "training"),
        (good, Data(tensors={"x": x}), "vali"),
    ):
        with pytest.raises(UsageError, match=f"{which}.*{said}"):
            fit_one(model, train, validation, tmp_path / "run")
    with pytest.raises(UsageError, match="x: it has "):
        evaluate(model, Data(tensors={"x": x}), quantities={Quantity(("x",)): [("x",)]}, n_samples=2)
    assert not (tmp_path / "run").exists()


def test_value_of_an_absent_example_is_no_trouble(tmp_path: Path) -> None:
    here = torch.arange(1200) < 1199
    data = Data(tensors={"x": last(GREY, 7)}, present={"x": here})
    fit_one(one(Bernoulli(nn.Linear(2, 6))), data, data[:8], tmp_path / "run")
    assert data.extremes().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float16])
def test_extremes_are_found_in_numbers_of_any_type(dtype: torch.dtype) -> None:
    values = torch.full((2000, 3), 5.0)
    values[700, 1], values[1999, 2] = 1, 9
    assert Data(tensors={"x": values.to(dtype)}).extremes().tolist() == [700, 1999]


def test_evaluation_checks_its_data() -> None:
    with pytest.raises(UsageError, match="x: it has values from"):
        evaluate(
            one(Bernoulli(nn.Linear(2, 6))),
            Data(tensors={"x": 255 * GREY}),
            quantities={Quantity(("x",)): [("x",)]},
            n_samples=2,
        )


def test_modality_that_the_data_lack_is_named(tmp_path: Path) -> None:
    tensors = small_data(24, seed=0).tensors
    data = Data(tensors={name: tensor for name, tensor in tensors.items() if name != "label"})
    with pytest.raises(UsageError, match="there is no label in it: it has image, attrs"):
        fit_small(tmp_path, train=data)


def test_mask_of_no_modality_is_refused(tmp_path: Path) -> None:
    data = small_data(24, seed=0, present={"labl": torch.ones(24, dtype=torch.bool)})
    with pytest.raises(UsageError, match="no modality is called labl"):
        fit_small(tmp_path, train=data)


def test_label_that_is_no_class_is_named_in_a_later_batch_too(tmp_path: Path) -> None:
    def wrong(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**rows, "label": rows["label"] + 3}

    with pytest.raises(UsageError, match="label: it has labels from"):
        fit_small(tmp_path, train=small_data(24, seed=0, transform=at_call(3, wrong)))


def test_rows_of_absent_modalities_may_hold_anything(tmp_path: Path) -> None:
    here = torch.arange(24) % 2 == 0
    data = small_data(24, seed=0)
    label = torch.where(here, data.tensors["label"], -1)
    fit_small(tmp_path, epochs=1, train=Data(tensors={**data.tensors, "label": label}, present={"label": here}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_latents": 0}, "`n_latents` is 0"),
        ({"n_latents": 2.0}, "`n_latents` is 2.0"),
        ({"likelihoods": {"x": nn.Linear(2, 6)}}, "x of `likelihoods` is a Linear"),
        ({"encoders": {}, "likelihoods": {}}, "`encoders` are for"),
        ({"encoders": {"a.b": nn.Identity()}, "likelihoods": {"a.b": Bernoulli(nn.Identity())}}, "a.b"),
    ],
)
def test_model_that_cannot_be_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MVAE(
            **{
                "encoders": {"x": SmallEncoder(6)},
                "likelihoods": {"x": Bernoulli(nn.Linear(2, 6))},
                "n_latents": 2,
                **arguments,
            }
        )


# The posterior, and examples that lack modalities.


def test_posterior_given_an_unknown_name_is_refused() -> None:
    batch, _ = small_data(4, seed=0).batch(torch.arange(4))
    with pytest.raises(UsageError, match="no modality is called lable; there are image, attrs, label"):
        small_model().posterior({"image": batch["image"], "lable": batch["label"]})


def test_posterior_given_nothing_is_the_prior() -> None:
    mu, logvar = small_model().posterior({})
    assert mu.tolist() == logvar.tolist() == [[0.0, 0.0]]


def test_posterior_of_modalities_of_unequal_length_is_refused() -> None:
    batch, _ = small_data(4, seed=0).batch(torch.arange(4))
    with pytest.raises(UsageError, match="4 of image, 3 of label"):
        small_model().posterior({"image": batch["image"], "label": batch["label"][:3]})


def test_posterior_takes_masks() -> None:
    model, (batch, _) = small_model(), small_data(4, seed=0).batch(torch.arange(4))
    present = {"image": torch.tensor([True, True, False, False]), "label": torch.tensor([True, False, True, False])}
    spoiled = {**batch, "label": torch.where(present["label"], batch["label"], -1)}
    found = model.posterior({name: spoiled[name] for name in ("image", "label")}, present)
    for row in range(4):
        given = {name: batch[name][row : row + 1] for name in ("image", "label") if present[name][row]}
        for whole, own in zip(found, model.posterior(given), strict=True):
            torch.testing.assert_close(whole[row : row + 1], own)


@pytest.mark.parametrize("here", [torch.ones(4), torch.ones(3, dtype=torch.bool)])
def test_mask_that_does_not_fit_is_refused(here: Tensor) -> None:
    batch, _ = small_data(4, seed=0).batch(torch.arange(4))
    with pytest.raises(UsageError, match="label of `present`"):
        small_model().posterior({"label": batch["label"]}, {"label": here})


def test_evaluation_is_of_the_examples_that_have_what_a_quantity_takes() -> None:
    model, whole = small_model(), small_data(12, seed=0)
    image, label = torch.arange(12) % 3 != 0, torch.arange(12) < 7
    absent = {"label": torch.where(label, whole.tensors["label"], -1)}
    partly = Data(tensors={**whole.tensors, **absent}, present={"image": image, "label": label})
    how: Any = {
        "quantities": of_a_pair(("image",), ("label",)),
        "predictions": {"label": ("image",), "attrs": ("label",)},
        "n_samples": 5,
    }
    found, expected = evaluate(model, partly, **how), evaluate(model, whole, **how)
    having = {("image",): image, ("image", "label"): image & label, ("label",): label}
    assert found.estimates.keys() == expected.estimates.keys()
    for (quantity, proposal), estimate in found.estimates.items():
        names = tuple(sorted({*quantity.target, *quantity.given, *proposal}))
        rows = having[names].nonzero().flatten()
        assert torch.equal(found.examples[quantity, proposal], rows)
        for some, all_ in zip(estimate, expected.estimates[quantity, proposal], strict=True):
            torch.testing.assert_close(some, all_[rows])
    assert torch.equal(found.truth["label"], whole.tensors["label"][image & label])
    torch.testing.assert_close(found.predictions["attrs"], expected.predictions["attrs"][label])


def test_quantity_of_no_example_is_refused() -> None:
    data = small_data(4, seed=0, present={"label": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(UsageError, match=r"log p\(label\): no example of `data` has label"):
        evaluate(small_model(), data, quantities={Quantity(("label",)): [()]}, n_samples=2)


@pytest.mark.parametrize("quantity", [Quantity(("lable",)), Quantity(("label",), ("imge",)), Quantity(())])
def test_quantity_of_no_modality_is_refused(quantity: Quantity) -> None:
    with pytest.raises(UsageError, match=r"no modality is called|log p\(\) has no `target`"):
        evaluate(small_model(), small_data(4, seed=0), quantities={quantity: [()]}, n_samples=2)


# A run.


def test_run_goes_on_in_a_thread(tmp_path: Path) -> None:
    records: list[Any] = []
    thread = threading.Thread(target=lambda: records.extend(fit_small(tmp_path)))
    thread.start()
    thread.join()
    assert [record["epoch"] for record in records] == [1, 2]


def test_model_in_float64_is_trained_resumed_evaluated_and_drawn_from(tmp_path: Path) -> None:
    def double(data: Data) -> Data:
        tensors = {name: x.double() if x.is_floating_point() else x for name, x in data.tensors.items()}
        return Data(tensors=tensors)

    def model() -> MVAE:
        encoders = {
            "image": Bare(lambda x: x.flatten(1)[:, :4].chunk(2, dim=1)),
            "attrs": nn.Sequential(nn.Linear(4, 4), Bare(lambda h: h.chunk(2, dim=1))),
        }
        likelihoods = {name: small_model().likelihood(name) for name in encoders}
        return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=2).double()

    data = double(small_data(24, seed=0))
    fit_small(tmp_path, model=model(), train=data, validation=data, epochs=1)
    trained = model()
    records = fit_small(tmp_path, model=trained, train=data, validation=data, resume=True)
    assert [record["epoch"] for record in records] == [1, 2]
    assert trained.draw({}, 3, torch.device("cpu")).dtype == torch.float64
    found = evaluate(trained, data, quantities=of_a_pair(("image",), ("attrs",)), n_samples=3)
    assert all(estimate.log_p.isfinite().all() for estimate in found.estimates.values())


def test_run_that_diverges_without_a_nan_says_so_and_leaves_no_model(tmp_path: Path) -> None:
    model = one(Gaussian(nn.Linear(2, 6)), SmallEncoder(6))
    data = Data(tensors={"x": torch.randn(24, 6, generator=torch.Generator().manual_seed(0))})
    with pytest.raises(UserError, match=r"the run diverges: validation loss .*e\+.* at its start.*smaller `lr`"):
        fit_small(tmp_path, model=model, train=data, validation=data, lr=1e3)
    assert not (tmp_path / "model_best.pth.tar").exists()


def test_resumed_run_is_held_against_the_loss_of_its_first_epoch_as_the_straight_one_is(tmp_path: Path) -> None:
    """Its first epoch is so far off that the last one isn't said to diverge, though the second one had come close."""
    data = Data(tensors={"x": torch.randn(24, 6, generator=torch.Generator().manual_seed(0))})

    def fit(folder: str, epochs: int, **how: Any) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        decoder = nn.Linear(2, 6)
        nn.init.constant_(decoder.bias, 3e4)
        rate = {"lr": 4e3, "schedule": lambda t: 1.0 if t <= 2 else 0.0 if t <= 2.8 else 30.0, "beta": constant()}

        def bias_alone(weights: Iterable[nn.Parameter], lr: float, fused: bool) -> torch.optim.Optimizer:
            return torch.optim.Adam([{"params": [w for w in weights if w.shape == (6,)]}], lr, fused=fused)

        model = one(Gaussian(decoder), SmallEncoder(6))
        how = {**rate, "optimizer": bias_alone, "train": data, "validation": data, **how}
        return fit_small(tmp_path / folder, model=model, epochs=epochs, **how)

    straight = fit("straight", 3)
    start, close, far = (record["validation/loss"] for record in straight)
    assert far > 100 * max(100, close)
    fit("parts", 2)
    assert [record["validation/loss"] for record in fit("parts", 3, resume=True)] == [start, close, far]
