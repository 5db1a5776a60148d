"""The training objective: equal to its plain form, what it computes on the way, and what it reports."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import mvae.model
from mvae import MVAE, Gaussian, Objective, Term, UsageError, random_subsets
from mvae.objective import Totals

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn

from reference import LATENTS, paper_terms, plain_objective, small_batch, small_model

N = 6
SUBSETS = {2: [], 6: [("m1", "m4"), ("m0", "m2", "m3", "m5")], 19: [("m0", "m7", "m12", "m18"), ("m3", "m4")]}


def names_of(n_modalities: int) -> tuple[str, ...]:
    return tuple(f"m{m}" for m in range(n_modalities))


def mask_of(subsets: Sequence[Sequence[str]], n_modalities: int) -> Tensor:
    """Return bool (subsets, modalities)."""
    mask = [[name in some for name in names_of(n_modalities)] for some in subsets]
    return torch.tensor(mask, dtype=torch.bool).view(-1, n_modalities)


def weights_of(n_modalities: int) -> dict[str, float]:
    """Return different λ, exact in float32; some modalities have the default."""
    return {f"m{m}": [50.0, 0.25, 3.0, 2.0][m % 4] for m in range(n_modalities) if m % 5 != 2}


def noise_of(n_modalities: int, n: int = N, k: int = 1) -> Tensor:
    """Return standard normal noise (k, terms, n, latents) for the paper's terms and SUBSETS."""
    n_terms = 1 + n_modalities + len(SUBSETS[n_modalities])
    return torch.randn(k, n_terms, n, LATENTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def presence_of(n_modalities: int, n: int = N) -> dict[str, Tensor]:
    """Return masks: example 0 has every modality, the last none, the others some; no example has m5."""
    present = torch.rand(n_modalities, n, generator=torch.Generator().manual_seed(1)) < 0.6
    present[:, 0], present[:, -1], present[5:6] = True, False, False
    return {f"m{m}": present[m] for m in range(n_modalities)}


def spoilt(batch: Mapping[str, Tensor], present: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
    """Fill the absent rows with a value; labels with one that isn't a class, or 0 if the value is finite."""
    fill = {name: value if x.is_floating_point() else 0 if math.isfinite(value) else -1 for name, x in batch.items()}
    return {
        name: torch.where(present[name].view(-1, *[1] * (x.dim() - 1)), x, fill[name]) if name in present else x
        for name, x in batch.items()
    }


@pytest.fixture(params=["any shapes", "fixed shapes"])
def fixed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with shapes that depend on the masks, as on a CPU, and with those of a GPU or a compiled step."""
    if request.param == "fixed shapes":
        monkeypatch.setattr(mvae.model, "has_fixed_shapes", lambda device: True)
    return request.param == "fixed shapes"


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_near(found: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Equal to a relative error in the Euclidean norm; zero only if zero."""
    error = (found.double() - expected.double()).norm().item()
    assert error <= relative * expected.double().norm().item(), f"{what} is {error} off"


def assert_same(
    model: MVAE, plain: MVAE, found: tuple[Tensor, Totals], expected: tuple[Tensor, Totals], relative: float, what: str
) -> None:
    """The same loss, totals, and gradients of all parameters."""
    assert_near(found[0], expected[0], relative, f"{what}: loss")
    assert found[1][:2] == expected[1][:2]
    for field, part, expected_part in zip(Totals._fields[2:], found[1][2:], expected[1][2:], strict=True):
        assert_near(part, expected_part, relative, f"{what}: {field}")
    expected_gradients = gradients(expected[0], plain)
    assert any(gradient.any() for gradient in expected_gradients.values())
    for name, gradient in gradients(found[0], model).items():
        assert_near(gradient, expected_gradients[name], relative, f"{what}: {name}")


def settings(n_modalities: int) -> Iterator[dict[str, Any]]:
    """Yield terms and subsets, with several choices of what they reconstruct and of which are weighted."""
    names = names_of(n_modalities)
    yield {}
    for also, iw in (((), "m0"), (names, "m1"), (("m1",), "m0")):
        terms = [Term(term.inputs, (*term.reconstructs, *also)) for term in paper_terms(names)]
        yield {"terms": terms, "subset_also": also, "iw": iw}
    others = [Term((name,), tuple(one for one in names if one != name)) for name in names]
    yield {"terms": [Term(names, names[:1]), *others], "iw": "m1"}


# Against the plain form


@pytest.mark.parametrize(
    ("n_modalities", "k", "fixed"),
    [(2, 3, "any shapes"), (6, 1, "any shapes"), (6, 3, "any shapes"), (6, 3, "fixed shapes")],
    indirect=["fixed"],
)
def test_objective_is_the_plain_one(n_modalities: int, k: int, fixed: bool) -> None:
    model, batch, subsets = small_model(n_modalities), small_batch(n_modalities, N), SUBSETS[n_modalities]
    noise, weights = noise_of(n_modalities, k=k), weights_of(n_modalities)
    for i, (some, present) in enumerate(product(settings(n_modalities), (None, presence_of(n_modalities)))):
        objective = Objective(model, **some, weights=weights, iw_samples=k)
        given = spoilt(batch, present, 0.75 if fixed else math.nan) if present else batch
        found = objective(given, 0.3, mask_of(subsets, n_modalities), present, noise.squeeze(0))
        expected = plain_objective(
            model, batch, noise, **some, weights=weights, subsets=subsets, beta=0.3, present=present
        )
        assert_same(model, model, found, expected, 1e-10, f"setting {i}")


def test_objective_in_float32_is_the_plain_one_to_one_in_100000_and_in_bfloat16_in_100() -> None:
    plain, batch, noise, weights = small_model(19), small_batch(19, N), noise_of(19).float(), weights_of(19)
    model = copy.deepcopy(plain).float()
    plain.load_state_dict(model.state_dict())  # the same weights, rounded
    single = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    double = {name: x.double() if x.is_floating_point() else x for name, x in single.items()}
    objective = Objective(model, weights=weights)
    for present in (None, presence_of(19)):
        arguments = single, 0.3, mask_of(SUBSETS[19], 19), present, noise.squeeze(0)
        found = objective(*arguments)
        expected = plain_objective(
            plain, double, noise.double(), weights=weights, subsets=SUBSETS[19], beta=0.3, present=present
        )
        assert found[0].dtype == torch.float32
        assert_same(model, plain, found, expected, 1e-5, "missing" if present else "complete")
        with torch.autocast("cpu", torch.bfloat16):
            loss, totals = objective(*arguments)
        assert loss.dtype == totals.log_prob.dtype == totals.kl.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[0].item(), rel=0.01)


def presence_with_batch_norm() -> dict[str, Tensor]:
    """Return masks of 8 examples; whatever a term reconstructs, two or more have. m2 isn't named: all have it."""
    rows = {"m0": "11110000", "m1": "11101110", "m3": "01111110", "m4": "11111100", "m5": "10000001"}
    return {name: torch.tensor([digit == "1" for digit in digits]) for name, digits in rows.items()}


def test_objective_is_the_plain_one_with_batch_norm() -> None:
    for i, (some, present) in enumerate(product([*settings(6)][::2], (None, presence_with_batch_norm()))):
        model, batch, noise = small_model(6, batch_norm=True).train(), small_batch(6, 8), noise_of(6, 8)
        plain, once = copy.deepcopy(model), copy.deepcopy(model)
        objective = Objective(model, **some, weights=weights_of(6))
        found = objective(batch, 0.3, mask_of(SUBSETS[6], 6), present, noise.squeeze(0))
        expected = plain_objective(
            plain, batch, noise, **some, weights=weights_of(6), subsets=SUBSETS[6], beta=0.3, present=present
        )
        assert_same(model, plain, found, expected, 1e-10, f"setting {i}")
        # A decoder sees all that is reconstructed at once, an encoder each present example once.
        for name in once.modalities:
            here = (present or {}).get(name)
            once.encoders[name](batch[name] if here is None else batch[name][here])
        for part, other in ((model.decoders, plain.decoders), (model.encoders, once.encoders)):
            torch.testing.assert_close(dict(part.named_buffers()), dict(other.named_buffers()))


def test_absent_rows_never_meet_batch_norm(fixed: bool) -> None:
    batch, present, found = small_batch(6, 8), presence_with_batch_norm(), []
    for value in (0.0, 1e4):
        model = small_model(6, batch_norm=True).train()
        found.append(Objective(model)(spoilt(batch, present, value), 1.0, None, present, noise_of(6, 8)[0, :7])[0])
        found.append(dict(model.named_buffers()))
    torch.testing.assert_close(found[:2], found[2:], rtol=0, atol=0)


def test_batch_norm_of_one_present_example_uses_its_running_statistics() -> None:
    model, batch = small_model(6, batch_norm=True).train(), small_batch(6, 8)
    before = copy.deepcopy(model)
    present = {"m1": torch.arange(8) == 3}
    mu, _ = model.encode(batch, model.presence(batch, present))
    torch.testing.assert_close(mu[1, 3:4], before.encoders["m1"].eval()(batch["m1"][3:4])[0])
    loss, _ = Objective(model)(batch, 1.0, None, present)
    assert loss.isfinite()
    assert all(module.training for module in model.modules())


# Which terms count


def test_terms_are_the_papers_unless_they_are_given() -> None:
    assert Objective(small_model(6)).terms == paper_terms(names_of(6))
    assert Objective(small_model(6)).names == ("joint", *names_of(6))
    assert Objective(small_model(1)).terms == paper_terms(names_of(1))  # a single modality has one term
    given = Objective(small_model(3), [Term(("m2", "m0"), ("m1",)), Term(("m1",), ("m1", "m0"))])
    assert given.terms == [Term(("m0", "m2"), ("m1",)), Term(("m1",), ("m0", "m1"))]  # in the model's order
    assert given.names == ("m0+m2", "m1")


def test_the_bound_of_an_example_with_one_modality_counts_once() -> None:
    model, batch, noise = small_model(6), small_batch(6, N), noise_of(6)[0]
    present = {name: torch.full((N,), name == "m2") for name in batch}
    subsets = mask_of([("m2", "m4"), ("m1", "m2")], 6)
    found, totals = Objective(model)(batch, 0.3, subsets, present, noise)
    expected, _ = Objective(model, [Term(("m2",), ("m2",))])(batch, 0.3, None, None, noise[3:4])
    assert found.item() == pytest.approx(expected.item())
    assert totals.n_kl.tolist() == [0, 0, 0, N, 0, 0, 0, 0, 0]
    _, totals = Objective(model)(batch, 0.3, mask_of([("m1", "m2")] * 2, 6), {"m3": present["m3"]})
    assert totals.n_kl[-2:].tolist() == [N, N]  # equal by intent: both count


# Importance weights


def plain_bound(objective: Objective, batch: dict[str, Tensor], beta: float, noise: Tensor) -> Tensor:
    """Return the loss as it is defined: log 1/K sum_k w_k in terms given `iw`, in the others the mean of the draws."""
    model, total = objective.model, torch.zeros((), dtype=torch.float64)
    for t, (inputs, reconstructs) in enumerate(objective.terms):
        mu, logvar = model.posterior({name: batch[name] for name in inputs})
        q, prior = distributions.Normal(mu, (0.5 * logvar).exp()), distributions.Normal(0.0, 1.0)
        z = q.mean + q.stddev * noise[:, t]
        scores = torch.zeros(())
        for name in reconstructs:
            weight = objective.weights[model.modalities.index(name)]
            scores = scores + weight * model.likelihood(name).log_prob(z, batch[name])
        log_w = scores + beta * (prior.log_prob(z) - q.log_prob(z)).sum(dim=-1)
        elbo = scores.mean(dim=0) - beta * distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum(dim=-1)
        total = total - (log_w.logsumexp(dim=0) - math.log(len(noise)) if "m0" in inputs else elbo).mean()
    return total


def test_encoders_get_the_gradient_of_the_bound_in_expectation() -> None:
    terms = [Term(term.inputs, (*term.reconstructs, "m1")) for term in paper_terms(names_of(3))]
    objective, beta = Objective(small_model(3), terms, weights={"m0": 3.0, "m1": 0.5}, iw_samples=4, iw="m0"), 0.3
    batch = {one: x.repeat(60, *[1] * (x.dim() - 1)) for one, x in small_batch(3, N).items()}
    biases = [[*objective.model.encoders[name].parameters()][-1] for name in ("m0", "m1")]
    torch.manual_seed(0)
    draws: list[list[Tensor]] = [[], []]
    for _ in range(25):
        noise = torch.randn(4, 4, 60 * N, LATENTS).double()
        losses = objective(batch, beta, None, None, noise)[0], plain_bound(objective, batch, beta, noise)
        torch.testing.assert_close(*losses)
        for some, loss in zip(draws, losses, strict=True):
            some.append(torch.stack(torch.autograd.grad(loss, biases)))
    found, expected = (torch.stack(some) for some in draws)
    error = (found - expected).std(dim=0) / 5
    assert (error.amax(dim=1) < 0.05 * expected.mean(dim=0).abs().amax(dim=1)).all()
    assert ((found.mean(dim=0) - expected.mean(dim=0)).abs() < 4 * error).all()


# What a step computes


def rows_run(objective: Objective, *arguments: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the rows of each call of each encoder, and of each decoder."""
    model = objective.model
    encoded: dict[str, list[int]] = {name: [] for name in model.modalities}
    decoded: dict[str, list[int]] = {name: [] for name in model.modalities}
    for name in model.modalities:
        for network, calls in ((model.encoders[name], encoded[name]), (model.likelihood(name).decoder, decoded[name])):
            network.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(inputs[0])))
    objective(*arguments)
    return encoded, decoded


def test_each_modality_is_encoded_once_and_decoded_where_a_term_reconstructs_it(fixed: bool) -> None:
    for n_modalities, size, also in ((2, 0, ()), (6, 3, ("m1",)), (19, 9, ())):
        names = names_of(n_modalities)
        terms = [Term(term.inputs, (*term.reconstructs, *also)) for term in paper_terms(names)]
        objective = Objective(small_model(n_modalities), terms, subset_also=also)
        subsets = mask_of([names[:size]] if size else [], n_modalities)
        encoded, decoded = rows_run(objective, small_batch(n_modalities, N), 1.0, subsets)
        assert encoded == {name: [N] for name in names}
        # All terms reconstruct what they `also` do, else the joint, the single one, and a subset; its modalities are
        # not known on fixed shapes.
        in_subset = [(name in names[:size] or fixed) and size > 0 for name in names]
        every = len(terms) + (size > 0)
        expected = [every if name in also else 2 + here for name, here in zip(names, in_subset, strict=True)]
        assert decoded == {name: [n * N] for name, n in zip(names, expected, strict=True)}


def test_a_modality_that_no_term_uses_is_neither_encoded_nor_decoded(fixed: bool) -> None:
    objective = Objective(small_model(3), [Term(("m1",), ("m0", "m1")), Term(("m2",), ("m0",))])
    encoded, decoded = rows_run(objective, small_batch(3, N), 1.0, None, {"m1": torch.arange(N) < 3})
    n = N if fixed else 3
    assert encoded == {"m0": [], "m1": [n], "m2": [N]}
    assert decoded == {"m0": [n + N], "m1": [n], "m2": []}


# Noise


def test_every_term_example_and_sample_has_its_own_noise() -> None:
    """If all posteriors are the prior, the latents are the noise."""

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
    terms = [Term(inputs, ("a", "b")) for inputs in (("a", "b"), ("a",), ("b",))]
    Objective(model, terms, iw_samples=3)({name: torch.zeros(N, 1) for name in "ab"})
    assert len(torch.cat(drawn).unique(dim=0)) == 3 * 3 * N


# What is refused and recorded

ALONE = Term(("m0",), ("m0",))


def test_wrong_objectives_and_batches_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weights": {"m0": 1.0, "sound": 2.0}}, "unknown modality sound; expected m0, m1"),
        ({"weights": {"m0": -1.0}}, "weights must be finite and >= 0"),
        ({"weights": {"m0": math.nan}}, "weights must be finite"),
        ({"iw_samples": 0}, "iw_samples must be >= 1, got 0"),
        ({"terms": [Term(("m0",), ("m0", "sound"))]}, "unknown modality sound"),
        ({"terms": [Term(("sound",), ("m0",))]}, "unknown modality sound"),
        ({"iw": "sound"}, "unknown modality sound"),
        ({"subset_also": ("sound",)}, "unknown modality sound"),
        ({"terms": []}, "terms must be one or more"),
        ({"terms": [Term((), ("m0",))]}, "each with one or more inputs"),
        ({"terms": [ALONE, ALONE]}, "different inputs, got m0, m0"),
    ]
    for arguments, said in wrong:
        with pytest.raises(UsageError, match=said):
            Objective(small_model(2), **arguments)
    with pytest.raises(UsageError, match="the batch lacks m1"):
        Objective(small_model(2))({"m0": small_batch(2, N)["m0"]})


def test_checksum_tells_objectives_apart() -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"weights": {"m1": 2.0}},
        {"iw_samples": 2},
        {"terms": [ALONE]},
        {"terms": [Term(("m0",), ("m0", "m1"))]},
        {"subset_also": ("m1",)},
        {"iw": "m1"},
    ]
    found = [Objective(small_model(3), **some).checksum() for some in asked]
    assert len(set(found)) == len(asked)
    assert Objective(small_model(3)).checksum() == found[0]


# Random subsets


def draw_subsets(n_modalities: int, k: int, seed: int) -> list[tuple[int, ...]]:
    mask = random_subsets(n_modalities, k, np.random.default_rng(seed))
    assert (mask.dtype, mask.shape) == (torch.bool, (k, n_modalities))
    return [tuple(row.nonzero().flatten().tolist()) for row in mask]


def test_random_subsets_are_uniform_in_size_and_then_in_members() -> None:
    counts = Counter(draw_subsets(6, 12_000, 0))
    means = {subset: 3000 / math.comb(6, size) for size in range(2, 6) for subset in combinations(range(6), size)}
    assert counts.keys() <= means.keys()
    chi_square = sum((counts[subset] - mean) ** 2 / mean for subset, mean in means.items())
    assert chi_square < 93.2  # the 0.999 quantile at 55 degrees of freedom


def test_random_subsets_depend_on_the_generator_and_need_three_modalities() -> None:
    assert draw_subsets(19, 20, 5) == draw_subsets(19, 20, 5) != draw_subsets(19, 20, 6)
    for n in (1, 2):
        assert draw_subsets(n, 0, 0) == []
        with pytest.raises(UsageError, match=f"got N = {n}"):
            draw_subsets(n, 1, 0)
