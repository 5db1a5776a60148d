"""The importance-weighted estimators against closed forms: a linear-Gaussian model, whose log p is known exactly."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mvae import MVAE, Data, Gaussian, Objective, Quantity, UsageError, evaluate, log_likelihood, of_a_pair
from mvae.estimators import Estimate, estimate_and_predict
from mvae.model import Batch
from mvae.run.evaluate import Evaluation, mean_and_error

import pytest
import torch
from torch import Tensor, distributions, nn

from helpers import small_data as three_modalities
from helpers import small_model as three_modal_model
from reference import LATENTS, distribution, plain_product, small_batch, small_model

STD, N_LATENTS, N_EXAMPLES, N_SEEDS, N_SAMPLES = 0.8, 2, 8, 16, 2000
Modalities = tuple[str, ...]


class LinearExpert(nn.Module):
    """The exact expert of x = W z + b + STD * noise with orthogonal columns of W: N(z; x) ∝ p(x | z).

    With `inflate`, a factor of its variance, and `shift`, added to its mean, it is imperfect.
    """

    def __init__(self, decoder: nn.Linear, inflate: float, shift: float):
        super().__init__()
        self.decoder, self.inflate, self.shift = decoder, inflate, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = self.decoder.weight.square().sum(dim=0)
        mu = (x - self.decoder.bias) @ self.decoder.weight / squares
        return mu + self.shift, (self.inflate * STD**2 / squares).log().expand_as(mu)


def linear_gaussian(*, inflate: float = 1.4, shift: float = 0.15) -> MVAE:
    """Return p(x_i | z) = N(W_i z + b_i, STD²) for modalities x, y, w of 3, 2 and 4 values, in float64."""
    generator = torch.Generator().manual_seed(0)
    decoders = {}
    for name, size in {"x": 3, "y": 2, "w": 4}.items():
        decoder = nn.Linear(N_LATENTS, size)
        columns, _ = torch.linalg.qr(torch.randn(size, N_LATENTS, generator=generator, dtype=torch.float64))
        decoder.weight.data = columns * torch.tensor([1.1, 0.7])
        decoder.bias.data = torch.randn(size, generator=generator, dtype=torch.float64)
        decoders[name] = decoder
    return MVAE(
        encoders={name: LinearExpert(decoder, inflate, shift) for name, decoder in decoders.items()},
        likelihoods={name: Gaussian(decoder, std=STD) for name, decoder in decoders.items()},
        n_latents=N_LATENTS,
    ).requires_grad_(False)


def decoder_of(model: MVAE, name: str) -> nn.Linear:
    """Return W and b of a modality."""
    return cast(nn.Linear, model.likelihood(name).decoder)


def joint(model: MVAE, names: Sequence[str]) -> distributions.MultivariateNormal:
    """Return p(x_1, x_2, ...) of concatenated modalities: N(b, W W^T + STD² I)."""
    weight = torch.cat([decoder_of(model, name).weight for name in names])
    bias = torch.cat([decoder_of(model, name).bias for name in names])
    return distributions.MultivariateNormal(bias, weight @ weight.T + STD**2 * torch.eye(len(bias)))


def exact_log_p(model: MVAE, batch: Batch, quantity: Quantity) -> Tensor:
    """Return the exact value, (batch,), in nats."""

    def log_p(names: Modalities) -> Tensor:
        return joint(model, names).log_prob(torch.cat([batch[name] for name in names], dim=1))

    return log_p(quantity.target + quantity.given) - (log_p(quantity.given) if quantity.given else 0)


def examples(model: MVAE, n: int = N_EXAMPLES) -> dict[str, Tensor]:
    """Draw examples from the model, in float64."""
    torch.manual_seed(0)
    x = joint(model, model.modalities).sample(torch.Size([n]))
    sizes = [decoder_of(model, name).out_features for name in model.modalities]
    return dict(zip(model.modalities, x.split(sizes, dim=1), strict=True))


QUANTITIES: Mapping[Quantity, Sequence[Modalities]] = {
    Quantity(("x",)): [("x",), ("x", "y"), ("x", "y", "w"), ()],
    Quantity(("w", "y", "x")): [("x",), ("x", "y"), ("x", "y", "w"), ()],
    Quantity(("x",), given=("y",)): [("x",), ("x", "y")],
    Quantity(("x",), given=("w", "y"), given_proposal=("w",)): [("x",), ("x", "y", "w")],
    Quantity(("x", "w"), given=("y",), given_proposal=("y",)): [("x",), ("x", "y", "w")],
}


def test_estimates_and_predictions_agree_with_the_exact_values() -> None:
    """Within 4 standard errors, which repeated seeds tell."""
    model = linear_gaussian()
    batch = examples(model)
    data = Data(tensors={name: x.float() for name, x in batch.items()})
    how: Any = {"quantities": QUANTITIES, "predictions": {"y": ("x",)}, "n_samples": N_SAMPLES}
    found = [evaluate(copy.deepcopy(model).float(), data, **how, seed=seed) for seed in range(N_SEEDS)]
    for quantity, proposal in found[0].estimates:
        what = f"{quantity.name} under {proposal}"
        off = torch.stack([e.estimates[quantity, proposal].log_p for e in found]) - exact_log_p(model, batch, quantity)
        mean, error = mean_and_error(off.mean(dim=1))
        assert 0 < error < 0.01, what
        assert abs(mean) < 4 * error, what
        errors = off.std(dim=0) / math.sqrt(N_SEEDS)
        assert (off.mean(dim=0).abs() < (4 * errors).clamp(min=0.05)).all(), what  # example by example
    mu, _ = model.posterior({"x": batch["x"]})
    predicted = torch.stack([e.predictions["y"] for e in found])
    error_of_mean = predicted.std(dim=0) / math.sqrt(N_SEEDS)
    assert ((predicted.mean(dim=0) - model.likelihood("y").mean(mu)).abs() < 4 * error_of_mean).all()


def test_the_exact_posterior_gives_weights_without_variance() -> None:
    model = linear_gaussian(inflate=1, shift=0)
    batch, noise = examples(model), torch.randn(50, N_EXAMPLES, N_LATENTS, dtype=torch.float64)
    for target in (("x",), ("x", "y"), ("x", "y", "w")):
        found = log_likelihood(model, batch, proposal=target, targets=[target], noise=noise)[target]
        torch.testing.assert_close(found.log_p, exact_log_p(model, batch, Quantity(target)))
        assert (found.log_weight_variance < 1e-24).all()


PROPOSALS: list[Modalities] = [(), ("m0",), ("m1", "m2"), ("m0", "m1", "m2")]
TARGETS: list[Modalities] = [("m0",), ("m1",), ("m2", "m0"), ("m0", "m1", "m2")]


def mixed(n: int, n_draws: int) -> tuple[MVAE, dict[str, Tensor], Tensor]:
    """Return a model of a Bernoulli, a Categorical and a Gaussian modality, n examples, and noise."""
    noise = torch.randn(n_draws, n, LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return small_model(3).eval(), small_batch(3, n), noise


@torch.no_grad()
def test_estimates_and_predictions_are_those_of_a_loop_over_examples() -> None:
    model, batch, noise = mixed(5, 7)
    prior = distributions.Normal(torch.zeros(LATENTS, dtype=torch.float64), 1.0)
    for proposal in PROPOSALS:
        found = log_likelihood(model, batch, proposal=proposal, targets=TARGETS, noise=noise)
        predicted = estimate_and_predict(model, batch, proposal, (), ["m1"], noise, 4096)[1]["m1"]
        for i in range(5):
            one = {name: x[i : i + 1] for name, x in batch.items()}
            encoded = [model.encoders[name](one[name]) for name in proposal]
            q = plain_product([(mu[0], logvar[0]) for mu, logvar in encoded]) if proposal else prior
            z = q.mean + q.stddev * noise[:, i]
            ratio = (prior.log_prob(z) - q.log_prob(z)).sum(dim=1)
            for target in TARGETS:
                log_w = ratio + sum(distribution(model.likelihood(m), z).log_prob(one[m]) for m in target)
                torch.testing.assert_close(found[target].log_p[i], log_w.exp().mean().log())
                torch.testing.assert_close(found[target].log_weight_variance[i], log_w.var())
            torch.testing.assert_close(predicted[i], model.likelihood("m1").decoder(z).softmax(dim=1).mean(dim=0))


def test_max_rows_bounds_the_decoded_rows_and_changes_no_result() -> None:
    model, batch, noise = mixed(7, 13)
    targets: Any = {"targets": TARGETS, "noise": noise}
    expected = [log_likelihood(model, batch, proposal=proposal, **targets) for proposal in PROPOSALS]
    rows = list[int]()
    predicted = estimate_and_predict(model, batch, ("m0", "m2"), (), model.modalities, noise, 4096)[1]
    assert tuple(predicted) == model.modalities
    model.likelihood("m0").decoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for max_rows in (1, 5, 40, 100):
        for proposal, whole in zip(PROPOSALS, expected, strict=True):
            rows.clear()
            found = log_likelihood(model, batch, proposal=proposal, **targets, max_rows=max_rows)
            torch.testing.assert_close(found, whole)
            assert max(rows) <= max(max_rows, 7)
            assert sum(rows) == 7 * 13
        again = estimate_and_predict(model, batch, ("m0", "m2"), (), model.modalities, noise, max_rows)[1]
        torch.testing.assert_close(again, predicted)


# evaluate


def small_evaluation(model: MVAE, data: Data, **options: Any) -> Evaluation:
    quantities: dict[Quantity, list[Modalities]] = {
        Quantity(("m0",)): [("m0",), ("m0", "m1")],
        Quantity(("m0",), given=("m1",)): [("m0",), ("m0", "m1")],
        Quantity(("m1",)): [()],
    }
    return evaluate(model, data, quantities=quantities, predictions={"m1": ("m0",)}, n_samples=11, **options)


def small_data(n: int) -> Data:
    batch = small_batch(2, n)
    return Data(tensors={name: x.float() if x.is_floating_point() else x for name, x in batch.items()})


def test_an_evaluation_prints_as_a_table_that_marks_bad_variances() -> None:
    few = small_evaluation(small_model(2).float(), small_data(9)[:4])
    key = next(iter(few.estimates))
    estimates = {which: Estimate(one.log_p, one.log_p * 0 + 2) for which, one in few.estimates.items()}
    good = few._replace(estimates=estimates)
    bad = good._replace(estimates={**estimates, key: Estimate(estimates[key].log_p, estimates[key].log_p * 0 + 9)})
    header, first, *_ = str(good).splitlines()
    assert header.split() == ["quantity", "proposal", "log-likelihood", "variance"]
    assert f"{few.estimates[key].log_p.mean():.3f} ±" in first
    assert "*" not in str(good)
    assert "9.00*" in str(bad)
    assert "* above 4.8: a few of the 11 samples" in str(bad)  # 2 ln 11


def test_an_examples_evaluation_does_not_depend_on_batch_size_or_other_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = small_model(2).float(), small_data(9)
    whole = small_evaluation(model, data)
    size = max(x[0].numel() for x in data.tensors.values())
    for max_rows in (1, 30, 11):
        monkeypatch.setattr("mvae.run.evaluate.VALUES_PER_CALL", (max_rows * size, 0))
        torch.testing.assert_close(small_evaluation(model, data), whole, rtol=1e-5, atol=1e-5)
    few = small_evaluation(model, data[:4])
    for key, estimate in few.estimates.items():
        torch.testing.assert_close(estimate.log_p, whole.estimates[key].log_p[:4])
    torch.testing.assert_close(few.predictions["m1"], whole.predictions["m1"][:4])
    assert torch.equal(few.truth["m1"], data.tensors["m1"][:4])


def test_evaluation_depends_on_its_seed_and_each_example_has_its_own_noise() -> None:
    model, key = small_model(2).float(), (Quantity(("m0",)), ("m0",))
    data = Data(tensors={name: x[:1].expand(3, *x.shape[1:]) for name, x in small_data(1).tensors.items()})
    found: list[Tensor] = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        found.append(small_evaluation(model, data, seed=seed).estimates[key].log_p)
    assert torch.equal(found[0], found[1])
    assert (found[0] != found[2]).all()
    assert len(found[0].unique()) == 3


def test_evaluation_is_in_evaluation_mode_and_without_weights() -> None:
    model, data = small_model(2, batch_norm=True).float().train(), small_data(9)
    before = copy.deepcopy(dict(model.named_buffers()))
    expected = small_evaluation(model, data)
    torch.testing.assert_close(dict(model.named_buffers()), before)
    weighted = Objective(model.train(), weights={"m0": 3.0, "m1": 50.0}).model
    torch.testing.assert_close(small_evaluation(weighted, data), expected, rtol=0, atol=0)


def test_bfloat16_changes_log_p_little_and_sums_are_float64() -> None:
    model, data, key = small_model(2).float(), small_data(9), (Quantity(("m0",)), ("m0",))
    found, expected = (small_evaluation(model, data, precision=one).estimates[key] for one in ("bf16", "fp32"))
    assert found.log_p.dtype == torch.float64
    assert not torch.equal(found.log_p, expected.log_p)
    torch.testing.assert_close(found.log_p, expected.log_p, rtol=0.01, atol=0.01)


def test_a_conditional_is_its_joint_less_what_is_given_and_has_the_joints_variance() -> None:
    quantities = of_a_pair(("image",), ("label",))
    found = evaluate(three_modal_model(), three_modalities(6, seed=0), quantities=quantities, n_samples=5).estimates
    conditionals = [key for key in found if key[0].given]
    assert len(conditionals) == 4
    for quantity, proposal in conditionals:
        joint = found[Quantity(("image", "label")), proposal]
        given = found[Quantity(quantity.given), quantity.given_proposal]
        assert torch.equal(found[quantity, proposal].log_p, joint.log_p - given.log_p)
        assert torch.equal(found[quantity, proposal].log_weight_variance, joint.log_weight_variance)


def test_examples_that_lack_modalities_are_left_out_of_their_quantities() -> None:
    model, whole = three_modal_model(), three_modalities(12, seed=0)
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


def test_wrong_evaluation_and_noise_are_refused() -> None:
    data = three_modalities(4, seed=0, present={"attrs": torch.zeros(4, dtype=torch.bool)})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"n_samples": 1}, "n_samples must be >= 2, got 1"),
        ({"quantities": {Quantity(("label",), ("imge",)): [()]}}, "unknown modality imge"),
        ({"quantities": {Quantity(("label",)): [("imge",)]}}, "unknown modality imge"),
        ({"quantities": {Quantity(()): [()]}}, r"log p\(\) must have a target"),
        ({"predictions": {"imge": ("label",)}}, "unknown modality imge"),
        ({"quantities": {Quantity(("attrs",)): [()]}}, r"log p\(attrs\): no example has all of attrs"),
        ({"predictions": {"attrs": ("label",)}}, "attrs predicted from label: no example has all of attrs, label"),
    ]
    for change, said in wrong:
        with pytest.raises(UsageError, match=said):
            evaluate(
                three_modal_model(), data, **{"quantities": {Quantity(("label",)): [()]}, "n_samples": 2, **change}
            )
    model, batch, noise = mixed(5, 1)
    with pytest.raises(UsageError, match=r"noise must have shape \(draws >= 2, batch, 3\)"):
        estimate_and_predict(model, batch, ("m0",), (), ["m1"], noise, 4096)


# Quantities


def test_names_of_quantities() -> None:
    assert Quantity(("image",)).name == "log p(image)"
    assert Quantity(("image", "text")).name == "log p(image, text)"
    assert Quantity(("image",), given=("text",)).name == "log p(image | text)"
    assert Quantity(("a", "b", "c"), given=("d", "e", "f", "g")).name == "log p(a, b, c | d, e, ..., g)"


def test_quantities_of_a_pair_and_their_proposals() -> None:
    x, y = ("image",), ("hat", "hair")
    prior, posterior = of_a_pair(x, y), of_a_pair(x, y, y_proposal=y)
    targets = [(quantity.target, quantity.given) for quantity in prior]
    assert targets == [(x, ()), (x + y, ()), (x, y), (y, x), (y, ())]
    assert [quantity.given_proposal for quantity in prior] == [(), (), (), x, ()]
    assert [quantity.given_proposal for quantity in posterior] == [(), (), y, x, ()]
    assert list(posterior.values()) == [[x, x + y]] * 4 + [[(), y]]


def test_mean_and_its_standard_error() -> None:
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
