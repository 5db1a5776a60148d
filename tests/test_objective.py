"""The training objective against its plain form, what it computes to get there, and what it reports."""

import copy
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvae.errors import UsageError
from mvae.likelihoods import Gaussian
from mvae.model import MVAE
from mvae.objective import Objective, Term, random_subsets
from mvae.stats import Totals

from helpers import SmallEncoder
from reference import LATENTS, distribution, plain_objective, plain_product, small_batch, small_model

N_EXAMPLES = 6
SUBSETS = {2: [], 6: [("m1", "m4"), ("m0", "m2", "m3", "m5")], 19: [("m0", "m7", "m12", "m18"), ("m3", "m4")]}


def weights_of(n_modalities: int) -> dict[str, float]:
    """λ that differ, exact in float32; 1 where absent."""
    return {f"m{m}": [50.0, 0.25, 3.0, 2.0][m % 4] for m in range(n_modalities) if m % 5 != 2}


def noise_of(n_modalities: int, n: int = N_EXAMPLES) -> Tensor:
    """Standard normal, (terms, n, latents)."""
    n_terms = 1 + n_modalities + len(SUBSETS[n_modalities])
    return torch.randn(n_terms, n, LATENTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def presence_of(n_modalities: int, n: int = N_EXAMPLES) -> dict[str, Tensor]:
    """Example 0 has every modality, the last none, the others some; of more than two modalities, m5 is nobody's."""
    present = torch.rand(n_modalities, n, generator=torch.Generator().manual_seed(1)) < 0.6
    present[:, 0], present[:, -1], present[5:6] = True, False, False
    return {f"m{m}": present[m] for m in range(n_modalities)}


def spoilt(batch: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with numbers in the absent rows that would be noticed: NaN, or a class that doesn't exist."""
    wrong = {name: math.nan if x.is_floating_point() else -1 for name, x in batch.items()}
    shapes = {name: (-1, *[1] * (x.dim() - 1)) for name, x in batch.items()}
    return {name: torch.where(present[name].view(shapes[name]), x, wrong[name]) for name, x in batch.items()}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_near(found: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Equal to a relative error in the Euclidean norm; zero only if zero."""
    error = (found.double() - expected.double()).norm().item()
    assert error <= relative * expected.double().norm().item(), f"{what} is {error} off"


def assert_same(
    model: MVAE, plain: MVAE, found: tuple[Tensor, Totals], expected: tuple[Tensor, Totals], relative: float
) -> None:
    """The same loss, gradients of all parameters, and totals."""
    assert_near(found[0], expected[0], relative, "loss")
    assert found[1][:2] == expected[1][:2]
    for field, part, expected_part in zip(Totals._fields[2:], found[1][2:], expected[1][2:], strict=True):
        assert_near(part, expected_part, relative, field)
    expected_gradients = gradients(expected[0], plain)
    assert any(gradient.any() for gradient in expected_gradients.values())
    for name, gradient in gradients(found[0], model).items():
        assert_near(gradient, expected_gradients[name], relative, name)


@pytest.mark.parametrize("n_modalities", [2, 6, 19])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("reconstruct", ["given", "all", ("m1",)])
def test_objective_is_the_plain_one(n_modalities: int, missing: bool, reconstruct: str | Sequence[str]) -> None:
    model, batch = small_model(n_modalities), small_batch(n_modalities, N_EXAMPLES)
    noise, subsets, weights = noise_of(n_modalities), SUBSETS[n_modalities], weights_of(n_modalities)
    present = presence_of(n_modalities) if missing else None
    objective = Objective(model, weights=weights, reconstruct=reconstruct)
    found = objective(spoilt(batch, present) if present else batch, 0.3, subsets, present, noise)
    expected = plain_objective(
        model, batch, noise, weights=weights, reconstruct=reconstruct, subsets=subsets, beta=0.3, present=present
    )
    assert_same(model, model, found, expected, 1e-10)


@pytest.mark.parametrize("n_modalities", [2, 6, 19])
@pytest.mark.parametrize("missing", [False, True])
def test_objective_in_float32_is_the_plain_one_to_one_in_100000(n_modalities: int, missing: bool) -> None:
    plain, batch = small_model(n_modalities), small_batch(n_modalities, N_EXAMPLES)
    model = copy.deepcopy(plain).float()
    noise, subsets, weights = noise_of(n_modalities).float(), SUBSETS[n_modalities], weights_of(n_modalities)
    present = presence_of(n_modalities) if missing else None
    single = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    double = {name: x.double() if x.is_floating_point() else x for name, x in single.items()}
    plain.load_state_dict(model.state_dict())  # the same weights, rounded
    found = Objective(model, weights=weights)(single, 0.3, subsets, present, noise)
    expected = plain_objective(
        plain, double, noise.double(), weights=weights, subsets=subsets, beta=0.3, present=present
    )
    assert found[0].dtype == torch.float32
    assert_same(model, plain, found, expected, 1e-5)


def presence_with_batch_norm() -> dict[str, Tensor]:
    """Of 8 examples; whatever a term scores is there for two or more. m2 isn't named: all have it."""
    rows = {"m0": "11110000", "m1": "11101110", "m3": "01111110", "m4": "11111100", "m5": "11000011"}
    return {name: torch.tensor([digit == "1" for digit in digits]) for name, digits in rows.items()}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("reconstruct", ["given", "all", ("m1",)])
def test_objective_is_the_plain_one_with_batch_norm(missing: bool, reconstruct: str | Sequence[str]) -> None:
    model, batch, noise = small_model(6, batch_norm=True).train(), small_batch(6, 8), noise_of(6, 8)
    plain = copy.deepcopy(model)
    present = presence_with_batch_norm() if missing else None
    objective = Objective(model, weights=weights_of(6), reconstruct=reconstruct)
    found = objective(batch, 0.3, SUBSETS[6], present, noise)
    expected = plain_objective(
        plain,
        batch,
        noise,
        weights=weights_of(6),
        reconstruct=reconstruct,
        subsets=SUBSETS[6],
        beta=0.3,
        present=present,
    )
    assert_same(model, plain, found, expected, 1e-10)
    # The decoders' running statistics too; the encoders', which the plain form updates in every term, are tested below.
    for name, buffer in model.decoders.named_buffers():
        torch.testing.assert_close(buffer, plain.decoders.get_buffer(name), msg=name)


@pytest.mark.parametrize("missing", [False, True])
def test_decoders_batch_norm_sees_all_that_is_scored_at_once(missing: bool) -> None:
    model, batch, noise = small_model(6, batch_norm=True).train(), small_batch(6, 8), noise_of(6, 8)
    present = presence_with_batch_norm() if missing else None
    calls: dict[str, list[Tensor]] = {name: [] for name in model.modalities}
    for name in model.modalities:
        model.likelihood(name).decoder.register_forward_hook(
            lambda module, inputs, output, some=calls[name]: some.append(inputs[0])
        )
    _, totals = Objective(model, reconstruct="all")(batch, 1.0, SUBSETS[6], present, noise)
    n_scored = dict(zip(model.modalities, totals.n_log_prob.sum(dim=0).tolist(), strict=True))
    assert {name: [len(z) for z in some] for name, some in calls.items()} == {n: [k] for n, k in n_scored.items()}


@pytest.mark.parametrize("missing", [False, True])
def test_decoders_batch_norm_scores_as_evaluation_does(missing: bool) -> None:
    model, batch, noise = small_model(6, batch_norm=True).train(), small_batch(6, 8), noise_of(6, 8)
    present = presence_with_batch_norm() if missing else None
    for module in model.decoders.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.0  # the running statistics are those of the last call
    objective = Objective(model, reconstruct="all")
    _, trained = objective(batch, 1.0, SUBSETS[6], present, noise)
    model.decoders.eval()
    _, evaluated = objective(batch, 1.0, SUBSETS[6], present, noise)
    # Up to the variance's n - 1, of at least 30 rows, that the running statistics have.
    torch.testing.assert_close(evaluated.log_prob, trained.log_prob, rtol=0.02, atol=0)


@pytest.mark.parametrize("missing", [False, True])
def test_encoders_batch_norm_sees_each_present_example_once(missing: bool) -> None:
    model, batch = small_model(6, batch_norm=True).train(), small_batch(6, 8)
    plain = copy.deepcopy(model)
    present = presence_with_batch_norm() if missing else {}
    Objective(model)(batch, 1.0, SUBSETS[6], present or None)
    for name in plain.modalities:
        plain.encoders[name](batch[name][present[name]] if name in present else batch[name])
    for name, buffer in model.encoders.named_buffers():
        torch.testing.assert_close(buffer, plain.encoders.get_buffer(name), msg=name)


def test_batch_norm_of_one_present_example_takes_its_running_statistics() -> None:
    model, batch = small_model(6, batch_norm=True).train(), small_batch(6, 8)
    before = copy.deepcopy(model)
    present = {"m1": torch.arange(8) == 3}
    mu, _ = model.encode(batch, torch.stack([present.get(name, torch.ones(8).bool()) for name in model.modalities]))
    expected, _ = before.encoders["m1"].eval()(batch["m1"][3:4])
    torch.testing.assert_close(mu[1, 3:4], expected)
    loss, _ = Objective(model)(batch, 1.0, (), present)
    assert loss.isfinite()
    assert all(module.training for module in model.modules())


def rows_run(model: MVAE, *arguments: Any, **settings: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The rows of each call of each encoder, and of each decoder, in one forward of Objective(model, **settings)."""
    encoded: dict[str, list[int]] = {name: [] for name in model.modalities}
    decoded: dict[str, list[int]] = {name: [] for name in model.modalities}

    def hook(calls: list[int]) -> Any:
        return lambda module, inputs, output: calls.append(len(inputs[0]))

    for name in model.modalities:
        model.encoders[name].register_forward_hook(hook(encoded[name]))
        model.likelihood(name).decoder.register_forward_hook(hook(decoded[name]))
    Objective(model, **settings)(*arguments)
    return encoded, decoded


@pytest.mark.parametrize("n_modalities", [2, 6, 19])
def test_each_modality_is_encoded_once(n_modalities: int) -> None:
    model, batch = small_model(n_modalities), small_batch(n_modalities, N_EXAMPLES)
    encoded, _ = rows_run(model, batch, 1.0, SUBSETS[n_modalities], reconstruct="all")
    assert all(calls == [N_EXAMPLES] for calls in encoded.values())


def test_each_modality_is_encoded_once_where_it_is_present() -> None:
    model, present = small_model(6), presence_of(6)
    encoded, _ = rows_run(model, small_batch(6, N_EXAMPLES), 1.0, SUBSETS[6], present)
    assert present["m5"].sum() == 0
    assert encoded == {name: [int(here.sum())] if here.any() else [] for name, here in present.items()}


@pytest.mark.parametrize("size", [2, 9, 18])
def test_decoders_run_just_where_a_term_scores(size: int) -> None:
    model, batch = small_model(19), small_batch(19, N_EXAMPLES)
    _, decoded = rows_run(model, batch, 1.0, [model.modalities[:size]])
    assert sum(map(sum, decoded.values())) == (19 + 19 + size) * N_EXAMPLES


@pytest.mark.parametrize(("reconstruct", "decodings"), [("given", 12), ("all", 42), (("m1",), 17), ((), 12)])
def test_decoders_run_for_what_every_term_scores(reconstruct: str | Sequence[str], decodings: int) -> None:
    _, decoded = rows_run(small_model(6), small_batch(6, N_EXAMPLES), reconstruct=reconstruct)
    assert sum(map(sum, decoded.values())) == decodings * N_EXAMPLES
    assert all(len(calls) == 1 for calls in decoded.values())


@pytest.mark.parametrize("missing", [False, True])
def test_a_modality_that_no_term_is_given_is_not_encoded(missing: bool) -> None:
    model, batch = small_model(3), small_batch(3, N_EXAMPLES)
    present = {"m1": torch.arange(N_EXAMPLES) < 3} if missing else None
    terms = [Term(("m1",), ("m0", "m1")), Term(("m2",), ("m2",))]
    encoded, _ = rows_run(model, batch, 1.0, (), present, terms=terms)
    assert encoded == {"m0": [], "m1": [3 if missing else N_EXAMPLES], "m2": [N_EXAMPLES]}
    noise, rows = torch.randn(1, N_EXAMPLES, model.n_latents).double(), torch.arange(N_EXAMPLES)
    _, found = Objective(model, terms=terms[1:])(batch, 1.0, (), present, noise)
    mu, logvar = model.posterior({"m2": batch["m2"]})
    z = mu + (logvar / 2).exp() * noise[0]
    torch.testing.assert_close(found.log_prob[0, 2], model.likelihood("m2").log_prob(z, batch["m2"])[rows].sum())


def test_absent_examples_are_not_decoded() -> None:
    model, present = small_model(6), presence_of(6)
    _, decoded = rows_run(model, small_batch(6, N_EXAMPLES), 1.0, (), present)
    assert {name: sum(calls) for name, calls in decoded.items()} == {
        name: 2 * int(here.sum()) for name, here in present.items()
    }


def test_an_example_with_nothing_given_adds_exactly_zero() -> None:
    model, batch = small_model(6), small_batch(6, 1)
    loss, totals = Objective(model)(batch, 1.0, SUBSETS[6], {name: torch.tensor([False]) for name in batch})
    assert loss == 0
    assert totals.n == 1
    assert all((part == 0).all() for part in (totals.log_prob, totals.n_log_prob, totals.kl, totals.n_kl))


@pytest.mark.parametrize("reconstruct", ["given", "all"])
def test_a_term_with_nothing_given_adds_exactly_zero(reconstruct: str) -> None:
    model, batch = small_model(6), small_batch(6, N_EXAMPLES)
    present = {"m1": torch.zeros(N_EXAMPLES, dtype=torch.bool)}
    objective = Objective(model, reconstruct=reconstruct)
    _, totals = objective(batch, 1.0, [("m1", "m2", "m3")], present)
    term = [term.given for term in objective.terms].index(("m1",))
    assert all((part[term] == 0).all() for part in (totals.log_prob, totals.n_log_prob, totals.kl, totals.n_kl))
    assert (np.delete(totals.kl.numpy(), term) > 0).all()


def test_the_bound_of_an_example_with_one_modality_counts_once() -> None:
    model, batch, noise = small_model(6), small_batch(6, N_EXAMPLES), noise_of(6)
    present = {name: torch.full((N_EXAMPLES,), name == "m2") for name in batch}
    found, totals = Objective(model)(batch, 0.3, [("m2", "m4"), ("m1", "m2")], present, noise)
    alone = Objective(model, terms=[Term(("m2",), ("m2",))])
    expected, _ = alone(batch, 0.3, (), None, noise[3:4])
    assert found.item() == pytest.approx(expected.item())
    assert totals.n_kl.tolist() == [0, 0, 0, N_EXAMPLES, 0, 0, 0, 0, 0]


def test_terms_that_are_the_same_by_intent_count_each() -> None:
    model, batch = small_model(6), small_batch(6, N_EXAMPLES)
    _, totals = Objective(model)(batch, 0.3, [("m1", "m2")] * 2, {"m3": torch.zeros(N_EXAMPLES).bool()})
    assert totals.n_kl[-2:].tolist() == [N_EXAMPLES] * 2


# Several importance samples.


def weighted(k: int, missing: bool = False) -> tuple[MVAE, Objective, tuple[Any, ...], Tensor]:
    """A model of six modalities, its objective with k importance samples, a batch's arguments, and noise (k, ...)."""
    model, present = small_model(6), presence_of(6) if missing else None
    objective = Objective(model, weights=weights_of(6), reconstruct=("m1",), iw_samples=k)
    noise = torch.randn(k, 7, N_EXAMPLES, LATENTS, generator=torch.Generator().manual_seed(5)).double()
    return model, objective, (small_batch(6, N_EXAMPLES), 0.3, (), present), noise


def plain_bound(objective: Objective, batch: dict[str, Tensor], beta: float, noise: Tensor) -> Tensor:
    """The loss as it is written, from the model's own posteriors: log 1/K sum_k w_k where the first modality is given,
    and elsewhere the mean of the K draws.
    """
    model, total = objective.model, torch.zeros((), dtype=torch.float64)
    for t, term in enumerate(objective.terms):
        mu, logvar = model.posterior({name: batch[name] for name in term.given})
        q, prior = distributions.Normal(mu, (0.5 * logvar).exp()), distributions.Normal(0.0, 1.0)
        z = q.mean + q.stddev * noise[:, t]
        scores = torch.zeros(())
        for name in term.scored:
            weight = objective.weights[model.modalities.index(name)]
            scores = scores + weight * model.likelihood(name).log_prob(z, batch[name])
        log_w = scores + beta * (prior.log_prob(z) - q.log_prob(z)).sum(dim=-1)
        elbo = scores.mean(dim=0) - beta * distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum(dim=-1)
        bound = log_w.logsumexp(dim=0) - math.log(len(noise)) if "m0" in term.given else elbo
        total = total - bound.mean()
    return total


def test_the_loss_of_several_samples_is_the_importance_weighted_bound() -> None:
    _, objective, arguments, noise = weighted(4)
    loss, totals = objective(*arguments, noise)
    assert loss.item() == pytest.approx(plain_bound(objective, arguments[0], arguments[1], noise).item(), rel=1e-6)
    assert totals.means()["joint/kl"] == pytest.approx(Objective(objective.model)(*arguments)[1].means()["joint/kl"])


def test_decoders_get_the_gradient_of_the_importance_weighted_bound() -> None:
    model, objective, arguments, noise = weighted(4)
    weights = list(model.decoders.parameters())
    found = torch.autograd.grad(objective(*arguments, noise)[0], weights)
    expected = torch.autograd.grad(plain_bound(objective, arguments[0], arguments[1], noise), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "beta"), [("m0", 0.3), ("m0", 1.0), ("m1", 0.3)])
def test_encoders_get_that_gradient_in_expectation(name: str, beta: float) -> None:
    model, objective, (batch, *_), _ = weighted(4)
    weights = [*model.encoders[name].parameters()][-1:]
    torch.manual_seed(0)
    draws: list[list[Tensor]] = [[], []]
    for _ in range(400):
        noise = torch.randn(4, 7, N_EXAMPLES, LATENTS).double()
        losses = objective(batch, beta, (), None, noise)[0], plain_bound(objective, batch, beta, noise)
        for some, loss in zip(draws, losses, strict=True):
            some.append(torch.autograd.grad(loss, weights)[0])
    found, expected = (torch.stack(some) for some in draws)
    error = (found - expected).std(dim=0) / 20
    assert error.max() < 0.05 * expected.mean(dim=0).abs().max()
    assert ((found.mean(dim=0) - expected.mean(dim=0)).abs() < 4 * error).all()


def test_examples_that_lack_modalities_have_a_bound_of_what_they_have() -> None:
    _, objective, (batch, beta, subsets, present), noise = weighted(3, missing=True)
    whole = objective(batch, beta, subsets, present, noise)[0]
    wrong = objective(spoilt(batch, present), beta, subsets, present, noise)[0]
    assert whole.isfinite()
    assert whole == wrong


def test_more_samples_tighten_the_bound() -> None:
    losses = []
    for k in (1, 5, 50):
        _, objective, (batch, _, *rest), _ = weighted(k)
        torch.manual_seed(0)
        losses.append(sum(objective(batch, 1.0, *rest)[0].item() for _ in range(20)))
    assert losses[0] > losses[1] > losses[2]


def test_modalities_that_all_have_may_be_named_or_not() -> None:
    model, batch, noise = small_model(6), small_batch(6, N_EXAMPLES), noise_of(6)
    objective = Objective(model)
    for present in ({}, {name: torch.ones(N_EXAMPLES, dtype=torch.bool) for name in batch}):
        found, expected = (objective(batch, 1.0, SUBSETS[6], here, noise) for here in (present, None))
        assert_same(model, model, found, expected, 1e-10)


def test_weights_apply_in_every_term_and_beta_to_every_divergence() -> None:
    model, batch = small_model(6), small_batch(6, N_EXAMPLES)
    weights = weights_of(6)
    loss, totals = Objective(model, weights=weights, reconstruct=("m3",))(batch, 0.3, SUBSETS[6])
    weight = torch.tensor([weights.get(name, 1.0) for name in model.modalities], dtype=torch.float64)
    assert (totals.log_prob != 0).sum(dim=0).min() >= 2
    assert loss.item() == pytest.approx((0.3 * totals.kl.sum() - (totals.log_prob * weight).sum()).item() / N_EXAMPLES)


def test_terms_are_the_joint_one_and_one_for_each_modality() -> None:
    objective = Objective(small_model(6), reconstruct=("m3",))
    assert [term.given for term in objective.terms] == [objective.model.modalities, *((f"m{m}",) for m in range(6))]
    assert objective.terms[1].scored == ("m0", "m3")
    assert objective.terms[4].scored == ("m3",)


def test_a_model_of_one_modality_has_one_term() -> None:
    model, batch = small_model(1), small_batch(1, N_EXAMPLES)
    noise = torch.randn(1, N_EXAMPLES, LATENTS, generator=torch.Generator().manual_seed(0)).double()
    assert_same(
        model, model, Objective(model)(batch, 1.0, (), None, noise), plain_objective(model, batch, noise), 1e-10
    )


def test_noise_is_drawn_anew_and_by_torchs_seed() -> None:
    objective, batch = Objective(small_model(2)), small_batch(2, N_EXAMPLES)
    torch.manual_seed(0)
    first, second = objective(batch)[0], objective(batch)[0]
    torch.manual_seed(0)
    assert objective(batch)[0] == first
    assert first != second


@pytest.mark.parametrize("iw_samples", [1, 3])
def test_every_term_example_and_sample_has_noise_of_its_own(iw_samples: int) -> None:
    """Where all posteriors are the prior, the latents are the noise."""

    class Ignorant(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(x), LATENTS), torch.full((len(x), LATENTS), 80.0)

    model = MVAE(
        encoders={name: Ignorant() for name in "ab"},
        likelihoods={name: Gaussian(nn.Linear(LATENTS, 1)) for name in "ab"},
        n_latents=LATENTS,
    )
    drawn: list[Tensor] = []
    model.likelihood("a").decoder.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[0]))
    batch = {name: torch.zeros(N_EXAMPLES, 1) for name in "ab"}
    Objective(model, reconstruct="all", iw_samples=iw_samples)(batch)
    assert len(torch.cat(drawn).unique(dim=0)) == iw_samples * 3 * N_EXAMPLES


def test_checksum_tells_what_an_objective_asks_for() -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"weights": {"m1": 2.0}},
        {"reconstruct": "all"},
        {"reconstruct": ["m1"]},
        {"iw_samples": 2},
        {"terms": [Term(("m0",), ("m0",))]},
        {"terms": [Term(("m0",), ("m0", "m1"))]},
        {"terms": [Term(("m0",), ("m0", "m1"))], "reconstruct": ["m1"]},  # a random subset scores m1, too
    ]
    found = [Objective(small_model(3), **some).checksum() for some in asked]
    assert len(set(found)) == len(asked)
    assert Objective(small_model(3)).checksum() == found[0]


@pytest.mark.parametrize("missing", [False, True])
def test_bfloat16_changes_the_loss_by_less_than_a_hundredth(missing: bool) -> None:
    model, noise = small_model(6).float(), noise_of(6).float()
    batch = {name: x.float() if x.is_floating_point() else x for name, x in small_batch(6, N_EXAMPLES).items()}
    arguments = batch, 1.0, SUBSETS[6], presence_of(6) if missing else None, noise
    expected, _ = Objective(model)(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, totals = Objective(model)(*arguments)
    assert loss.dtype == totals.log_prob.dtype == totals.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize(
    "settings", [{"weights": {"m0": 1.0, "sound": 2.0}}, {"reconstruct": ("m0", "sound")}, {"reconstruct": "sound"}]
)
def test_objective_refuses_a_modality_that_is_not_the_models(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"sound.*m0, m1"):
        Objective(small_model(2), **settings)


def draw_subsets(n_modalities: int, k: int, seed: int) -> list[tuple[str, ...]]:
    names = [f"m{m}" for m in range(n_modalities)]
    return random_subsets(names, k, np.random.default_rng(seed))


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def test_sizes_of_random_subsets_are_uniform() -> None:
    sizes = [len(subset) for subset in draw_subsets(19, 8000, 0)]
    counts = [sizes.count(size) for size in range(2, 19)]
    assert sum(counts) == 8000
    assert chi_square(counts, [8000 / 17] * 17) < 39.3  # the 0.999 quantile at 16 degrees of freedom


def test_random_subsets_of_a_size_are_uniform() -> None:
    drawn, names = draw_subsets(6, 12_000, 0), [f"m{m}" for m in range(6)]
    cells = [subset for size in range(2, 6) for subset in combinations(names, size)]
    counts = [drawn.count(subset) for subset in cells]
    assert sum(counts) == 12_000  # each in the model's order, without repetition
    assert chi_square(counts, [3000 / math.comb(6, len(subset)) for subset in cells]) < 93.2  # 0.999, 55 degrees


def test_random_subsets_depend_on_the_generator_alone() -> None:
    assert draw_subsets(19, 20, 5) == draw_subsets(19, 20, 5)
    assert draw_subsets(19, 20, 5) != draw_subsets(19, 20, 6)


@pytest.mark.parametrize("n_modalities", [1, 2])
def test_random_subsets_need_three_modalities(n_modalities: int) -> None:
    assert draw_subsets(n_modalities, 0, 0) == []
    with pytest.raises(UsageError, match=f"N = {n_modalities}"):
        draw_subsets(n_modalities, 1, 0)


def test_means_of_two_batches_are_those_of_their_examples_without_weights_and_beta() -> None:
    """Over two batches of different sizes; each mean is over the examples that have it."""
    model, weights, beta = small_model(6), weights_of(6), 0.3
    objective = Objective(model, weights=weights, reconstruct=("m1",))
    names = (*objective.names, "subset", "subset")
    sums, losses, parts = torch.zeros(()), [], list[tuple[Tensor, ...]]()
    for n in (4, 7):
        batch, present, noise = small_batch(6, n), presence_of(6, n), noise_of(6, n)
        _, totals = objective(batch, beta, SUBSETS[6], present, noise)
        assert totals.terms == names
        sums = sums + totals.vector()
        loss, totals = plain_objective(
            model, batch, noise, weights=weights, reconstruct=("m1",), subsets=SUBSETS[6], beta=beta, present=present
        )
        losses.append(loss.item() * n)
        parts.append(totals[4:])
    log_prob, n_log_prob, kl, n_kl = (torch.stack(part).sum(dim=0).numpy() for part in zip(*parts, strict=True))

    expected = {"loss": sum(losses) / 11}
    for name, rows in {"joint": [0], **{f"m{m}": [m + 1] for m in range(5)}, "subset": [7, 8]}.items():
        scores, counts = log_prob[rows].sum(axis=0), n_log_prob[rows].sum(axis=0)
        expected[f"{name}/elbo"] = (scores.sum() - kl[rows].sum()) / n_kl[rows].sum()
        expected[f"{name}/kl"] = kl[rows].sum() / n_kl[rows].sum()
        expected |= {f"{name}/log_prob/m{m}": scores[m] / counts[m] for m in range(6) if counts[m]}
    found = Totals.of(sums, names, model.modalities).means()
    assert found == pytest.approx(expected)
    assert not any("m5" in name for name in found)  # nobody has it


# Terms other than the paper's.


def test_terms_may_be_given_some_modalities_and_score_others() -> None:
    model, batch = small_model(3), small_batch(3, N_EXAMPLES)
    objective = Objective(model, terms=[Term(("m2", "m0"), ("m1",)), Term(("m1",), ("m1", "m0"))])
    assert objective.names == ("m0+m2", "m1")
    noise = torch.randn(2, N_EXAMPLES, LATENTS, generator=torch.Generator().manual_seed(0)).double()
    loss, totals = objective(batch, 0.3, (), None, noise)
    expected = torch.zeros(()).double()
    for t, (given, scored) in enumerate([(("m0", "m2"), ("m1",)), (("m1",), ("m0", "m1"))]):
        q = plain_product([model.encoders[name](batch[name]) for name in given])
        z = q.mean + q.stddev * noise[t]
        nats = sum(distribution(model.likelihood(name), z).log_prob(batch[name]).sum() for name in scored)
        prior = torch.distributions.Normal(torch.zeros(LATENTS).double(), 1.0)
        expected += 0.3 * torch.distributions.kl_divergence(q, prior).sum() - nats
    assert loss.item() == pytest.approx(expected.item() / N_EXAMPLES)
    assert totals.n_log_prob.tolist() == [[0, N_EXAMPLES, 0], [N_EXAMPLES, N_EXAMPLES, 0]]


def test_terms_score_what_every_term_is_to_score_too() -> None:
    objective = Objective(small_model(3), terms=[Term(("m0",), ("m0",))], reconstruct=("m2",))
    assert objective.terms == [Term(("m0",), ("m0", "m2"))]


@pytest.mark.parametrize("given", [[("m0",), ("m0",)], [("m0", "m1"), ("m1", "m0")]])
def test_terms_that_are_given_the_same_are_refused(given: list[tuple[str, ...]]) -> None:
    with pytest.raises(UsageError, match="each needs a name unlike the others'"):
        Objective(small_model(2), terms=[Term(names, names) for names in given])


def test_terms_that_are_given_nothing_are_refused() -> None:
    for terms in ([], [Term((), ("m0",))]):
        with pytest.raises(UsageError, match="and one or more are wanted"):
            Objective(small_model(2), terms=terms)
    with pytest.raises(UsageError, match="given no modality"):
        Objective(small_model(2))(small_batch(2, 3), 1.0, [()])


# What a step costs.


class NumbersMade(TorchDispatchMode):
    """Counts the numbers that operations write; a view writes none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = result if isinstance(result, list | tuple) else [result]
            self.total += sum(part.numel() for part in parts if isinstance(part, Tensor))
        return result


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("approx_m", [0, 1])
def test_a_step_of_twice_the_modalities_costs_twice_as_much(approx_m: int, missing: bool) -> None:
    def cost(n: int) -> int:
        names = [f"modality{m}" for m in range(n)]
        encoders = {name: SmallEncoder(3, 64) for name in names}
        model = MVAE(encoders=encoders, likelihoods={name: Gaussian(nn.Linear(64, 3)) for name in names}, n_latents=64)
        batch = {name: torch.zeros(10, 3) for name in names}
        present = {name: torch.arange(10) % n != m for m, name in enumerate(names)} if missing else None
        subsets = random_subsets(names, approx_m, np.random.default_rng(0))
        with NumbersMade() as made:
            Objective(model)(batch, 1.0, subsets, present)[0].backward()
        return made.total

    assert cost(32) < 2.4 * cost(16)
