"""The importance-weighted estimators against closed forms: a linear-Gaussian model, whose log p is known exactly."""

import copy
import math
import os
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, distributions, nn

from mvae.data import Data
from mvae.errors import UsageError
from mvae.estimators import Evaluation, Quantity, evaluate, log_likelihood, mean_and_error, of_a_pair, predict
from mvae.likelihoods import Categorical, Gaussian
from mvae.model import MVAE, Batch
from mvae.objective import Objective
from mvae.processes import Processes

from helpers import FORKED, same
from reference import LATENTS, distribution, plain_product, small_batch, small_model

STD, N_LATENTS, N_EXAMPLES, N_SEEDS, N_SAMPLES = 0.8, 2, 8, 16, 2000
Modalities = tuple[str, ...]


class LinearExpert(nn.Module):
    """The exact expert of x = W z + b + STD * noise, where W's columns are orthogonal: N(z; x) ∝ p(x | z).

    `inflate` multiplies its variance and `shift` moves its mean, so that it is an imperfect one.
    """

    def __init__(self, decoder: nn.Linear, inflate: float, shift: float):
        super().__init__()
        self.decoder, self.inflate, self.shift = decoder, inflate, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = self.decoder.weight.square().sum(dim=0)
        mu = (x - self.decoder.bias) @ self.decoder.weight / squares
        return mu + self.shift, (self.inflate * STD**2 / squares).log().expand_as(mu)


def linear_gaussian(n_modalities: int, *, inflate: float = 1.4, shift: float = 0.15) -> MVAE:
    """p(x_i | z) = N(W_i z + b_i, STD²), modalities x, y, w of 3, 2 and 4 values. In float64."""
    generator = torch.Generator().manual_seed(0)
    decoders = {}
    for name, size in list({"x": 3, "y": 2, "w": 4}.items())[:n_modalities]:
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
    """W and b of a modality."""
    return cast(nn.Linear, model.likelihood(name).decoder)


def joint(model: MVAE, names: Sequence[str]) -> distributions.MultivariateNormal:
    """p(x_1, x_2, ...), the modalities one after the other: N(b, W W^T + STD² I)."""
    weight = torch.cat([decoder_of(model, name).weight for name in names])
    bias = torch.cat([decoder_of(model, name).bias for name in names])
    return distributions.MultivariateNormal(bias, weight @ weight.T + STD**2 * torch.eye(len(bias)))


def exact_log_p(model: MVAE, batch: Batch, quantity: Quantity) -> Tensor:
    """(batch,) in nats."""

    def log_p(names: Modalities) -> Tensor:
        return joint(model, names).log_prob(torch.cat([batch[name] for name in names], dim=1))

    return log_p(quantity.target + quantity.given) - (log_p(quantity.given) if quantity.given else 0)


def examples(model: MVAE, n: int = N_EXAMPLES) -> dict[str, Tensor]:
    """Drawn from the model, in float64."""
    torch.manual_seed(0)
    x = joint(model, model.modalities).sample(torch.Size([n]))
    sizes = [decoder_of(model, name).out_features for name in model.modalities]
    return dict(zip(model.modalities, x.split(sizes, dim=1), strict=True))


QUANTITIES: dict[int, Mapping[Quantity, Sequence[Modalities]]] = {
    2: {
        Quantity(("x",)): [("x",), ("x", "y"), ()],
        Quantity(("y",)): [("y",), ("x", "y"), ()],
        Quantity(("x", "y")): [("x",), ("x", "y"), ()],
        Quantity(("x",), given=("y",)): [("x",), ("x", "y")],
        Quantity(("y",), given=("x",), given_proposal=("x",)): [("x",), ("x", "y")],
    },
    3: {
        Quantity(("x",)): [("x",), ("x", "y"), ("x", "y", "w")],
        Quantity(("x", "y")): [("x",), ("x", "y"), ("x", "y", "w")],
        Quantity(("w", "y", "x")): [("x",), ("x", "y"), ("x", "y", "w"), ()],
        Quantity(("x",), given=("y",)): [("x",), ("x", "y")],
        Quantity(("x",), given=("w", "y"), given_proposal=("w",)): [("x",), ("x", "y"), ("x", "y", "w")],
        Quantity(("x", "w"), given=("y",), given_proposal=("y",)): [("x",), ("x", "y", "w")],
    },
}
CASES = [
    pytest.param(n, quantity, proposal, id=f"{quantity.name} under {', '.join(proposal) or 'the prior'} of {n}")
    for n, quantities in QUANTITIES.items()
    for quantity, proposals in quantities.items()
    for proposal in proposals
]


@cache
def evaluations(n_modalities: int) -> list[Evaluation]:
    """One for each of N_SEEDS seeds."""
    model = linear_gaussian(n_modalities)
    data = Data(tensors={name: x.float() for name, x in examples(model).items()})
    return [
        evaluate(
            model.float(),
            data,
            quantities=QUANTITIES[n_modalities],
            predictions={"y": ("x",)},
            n_samples=N_SAMPLES,
            seed=seed,
            max_rows=N_EXAMPLES * N_SAMPLES,
        )
        for seed in range(N_SEEDS)
    ]


@pytest.mark.parametrize(("n_modalities", "quantity", "proposal"), CASES)
def test_estimates_agree_with_the_exact_log_p(n_modalities: int, quantity: Quantity, proposal: Modalities) -> None:
    """Within 4 standard errors, which repeated seeds tell."""
    model = linear_gaussian(n_modalities)
    exact = exact_log_p(model, examples(model), quantity)
    found = torch.stack([e.estimates[quantity, proposal].log_p for e in evaluations(n_modalities)])
    mean, error = mean_and_error((found - exact).mean(dim=1))
    assert 0 < error < 0.01
    assert abs(mean) < 4 * error
    errors = found.std(dim=0) / math.sqrt(N_SEEDS)
    assert ((found.mean(dim=0) - exact).abs() < (4 * errors).clamp(min=0.05)).all()  # example by example


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_prediction_agrees_with_the_exact_mean_under_the_posterior(n_modalities: int) -> None:
    model = linear_gaussian(n_modalities)
    mu, _ = model.posterior({"x": examples(model)["x"]})
    found = torch.stack([e.predictions["y"] for e in evaluations(n_modalities)])
    error = found.std(dim=0) / math.sqrt(N_SEEDS)
    assert ((found.mean(dim=0) - model.likelihood("y").mean(mu)).abs() < 4 * error).all()


@pytest.mark.parametrize("target", [("x",), ("x", "y"), ("x", "y", "w")])
def test_the_exact_posterior_gives_weights_without_variance(target: Modalities) -> None:
    model = linear_gaussian(3, inflate=1, shift=0)
    batch = examples(model)
    noise = torch.randn(50, N_EXAMPLES, N_LATENTS, dtype=torch.float64)
    found = log_likelihood(model, batch, proposal=target, targets=[target], noise=noise)[target]
    torch.testing.assert_close(found.log_p, exact_log_p(model, batch, Quantity(target)))
    assert (found.log_weight_variance < 1e-24).all()


def test_joint_less_conditional_is_the_marginal_of_what_is_given() -> None:
    for found in evaluations(2):
        marginal = found.estimates[Quantity(("y",)), ()].log_p
        for proposal in (("x",), ("x", "y")):
            whole = found.estimates[Quantity(("x", "y")), proposal].log_p
            conditional = found.estimates[Quantity(("x",), given=("y",)), proposal].log_p
            torch.testing.assert_close(whole - conditional, marginal)


def test_more_samples_raise_the_bound_on_average() -> None:
    model = linear_gaussian(2)
    batch, target, n = examples(model, 4000), ("x", "y"), (2, 4, 16, 64)
    noise = torch.randn(64, 4000, N_LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = [log_likelihood(model, batch, proposal=("x",), targets=[target], noise=noise[:k])[target].log_p for k in n]
    exact = exact_log_p(model, batch, Quantity(target))
    for low, high in zip(bounds, [*bounds[1:], exact], strict=True):
        rise, error = mean_and_error(high - low)
        assert rise > 4 * error


PROPOSALS: list[Modalities] = [(), ("m0",), ("m1", "m2"), ("m0", "m1", "m2")]
TARGETS: list[Modalities] = [("m0",), ("m1",), ("m2", "m0"), ("m0", "m1", "m2")]


def mixed(n: int, n_draws: int) -> tuple[MVAE, dict[str, Tensor], Tensor]:
    """A model of a Bernoulli, a Categorical and a Gaussian modality, n examples, and noise."""
    noise = torch.randn(n_draws, n, LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return small_model(3).eval(), small_batch(3, n), noise


@torch.no_grad()
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_estimates_are_those_of_a_loop_over_examples_and_draws(proposal: Modalities) -> None:
    model, batch, noise = mixed(5, 7)
    found = log_likelihood(model, batch, proposal=proposal, targets=TARGETS, noise=noise)
    prior = distributions.Normal(torch.zeros(LATENTS, dtype=torch.float64), 1.0)
    for target in TARGETS:
        for i in range(5):
            one = {name: x[i : i + 1] for name, x in batch.items()}
            encoded = [model.encoders[name](one[name]) for name in proposal]
            q = plain_product([(mu[0], logvar[0]) for mu, logvar in encoded]) if proposal else prior
            weights = []
            for k in range(7):
                z = q.mean + q.stddev * noise[k, i]
                log_p = sum(distribution(model.likelihood(m), z.unsqueeze(0)).log_prob(one[m]).item() for m in target)
                weights.append(log_p + (prior.log_prob(z) - q.log_prob(z)).sum().item())
            expected = torch.tensor(weights, dtype=torch.float64)
            torch.testing.assert_close(found[target].log_p[i], expected.exp().mean().log())
            torch.testing.assert_close(found[target].log_weight_variance[i], expected.var())


@pytest.mark.parametrize("max_rows", [1, 4, 13, 40, 100])
def test_log_likelihood_does_not_depend_on_max_rows(max_rows: int) -> None:
    model, batch, noise = mixed(7, 13)
    for proposal in PROPOSALS:
        expected = log_likelihood(model, batch, proposal=proposal, targets=TARGETS, noise=noise)
        found = log_likelihood(model, batch, proposal=proposal, targets=TARGETS, noise=noise, max_rows=max_rows)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("max_rows", [1, 5, 13, 40])
def test_no_more_than_max_rows_are_decoded_at_once(max_rows: int) -> None:
    model, batch, noise = mixed(7, 13)
    rows: list[int] = []
    model.likelihood("m0").decoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    log_likelihood(model, batch, proposal=("m0",), targets=TARGETS, noise=noise, max_rows=max_rows)
    assert max(rows) <= max_rows
    assert sum(rows) == 7 * 13


@pytest.mark.parametrize("max_rows", [1, 7, 50, 91])
def test_prediction_does_not_depend_on_max_rows(max_rows: int) -> None:
    model, batch, noise = mixed(7, 13)
    given, names = ("m0", "m2"), model.modalities
    expected = predict(model, batch, given=given, names=names, noise=noise)
    assert tuple(expected) == names
    torch.testing.assert_close(
        predict(model, batch, given=given, names=names, noise=noise, max_rows=max_rows), expected
    )


def test_prediction_of_a_label_is_its_mean_probabilities() -> None:
    model, batch, noise = mixed(7, 13)
    mu, logvar = model.posterior({"m0": batch["m0"]})
    assert isinstance(model.likelihood("m1"), Categorical)
    each = [model.likelihood("m1").decode(mu + (logvar / 2).exp() * eps).softmax(dim=1) for eps in noise]
    found = predict(model, batch, given=("m0",), names=["m1"], noise=noise)["m1"]
    torch.testing.assert_close(found, torch.stack(each).mean(dim=0))


def small_evaluation(model: MVAE, data: Data, **options: Any) -> Evaluation:
    quantities: dict[Quantity, list[Modalities]] = {
        Quantity(("m0",)): [("m0",), ("m0", "m1")],
        Quantity(("m0",), given=("m1",)): [("m0",), ("m0", "m1")],
        Quantity(("m1",)): [()],
    }
    predictions = {"m1": ("m0",)}
    return evaluate(model, data, quantities=quantities, predictions=predictions, n_samples=11, **options)


def small_data(model: MVAE, n: int) -> Data:
    batch = small_batch(len(model.modalities), n)
    return Data(tensors={name: x.float() if x.is_floating_point() else x for name, x in batch.items()})


@pytest.mark.parametrize("max_rows", [1, 11, 30, 70])
def test_evaluation_does_not_depend_on_batch_or_chunk_size(max_rows: int) -> None:
    model = small_model(2).float()
    data = small_data(model, 9)
    found, expected = (small_evaluation(model, data, max_rows=rows) for rows in (max_rows, None))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_examples_evaluation_does_not_depend_on_those_after_it() -> None:
    model = small_model(2).float()
    data = small_data(model, 9)
    found, whole = small_evaluation(model, data[:4]), small_evaluation(model, data)
    for key, estimate in found.estimates.items():
        torch.testing.assert_close(estimate.log_p, whole.estimates[key].log_p[:4])
    torch.testing.assert_close(found.predictions["m1"], whole.predictions["m1"][:4])


def evaluate_as(rank: int, port: int, folder: Path) -> None:
    """Evaluates nine examples, each a batch, as one of two processes; saves what was found, and the calls of a decoder.

    That is called for each of two proposals; and twice in each process to check the data.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    model = small_model(2).float()
    calls: list[Tensor] = []
    model.likelihood("m0").decoder.register_forward_hook(lambda module, args, output: calls.append(output))
    processes = Processes.join(torch.device("cpu"))
    with processes.together():
        found = small_evaluation(model, small_data(model, 9), max_rows=11, processes=processes)
    torch.save(
        {"log_p": [e.log_p for e in found.estimates.values()], "m1": found.predictions["m1"]}, folder / str(rank)
    )
    (folder / f"{rank} calls").write_text(str(len(calls)))


def test_two_processes_share_the_examples_and_find_the_very_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKED.Process(target=evaluate_as, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    model = small_model(2).float()
    expected = small_evaluation(model, small_data(model, 9), max_rows=11)
    for rank in ("0", "1"):
        found = torch.load(tmp_path / rank)
        assert same(found["log_p"], [estimate.log_p for estimate in expected.estimates.values()])
        assert torch.equal(found["m1"], expected.predictions["m1"])
    assert sum(int((tmp_path / f"{rank} calls").read_text()) for rank in (0, 1)) == 2 * 9 + 2 * 2


def test_predictions_take_the_decodings_of_log_p() -> None:
    model = small_model(2).float()
    rows: list[int] = []
    model.likelihood("m1").decoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    small_evaluation(model, small_data(model, 9), max_rows=22)
    in_check = 2 * 9 + 1
    assert sum(rows) == 3 * 9 * 11 + in_check  # given m0, given both, and given nothing


def test_bfloat16_moves_log_p_a_little_and_sums_are_of_float64() -> None:
    model = small_model(2).float()
    data, key = small_data(model, 9), (Quantity(("m0",)), ("m0",))
    found, expected = (small_evaluation(model, data, precision=one).estimates[key] for one in ("bf16", "fp32"))
    assert found.log_p.dtype == torch.float64
    assert not torch.equal(found.log_p, expected.log_p)
    torch.testing.assert_close(found.log_p, expected.log_p, rtol=0.01, atol=0.01)
    with pytest.raises(UsageError, match="`precision` is 'half'"):
        small_evaluation(model, data, precision="half")


def test_evaluation_is_decided_by_its_seed() -> None:
    model = small_model(2).float()
    data, key = small_data(model, 9), (Quantity(("m0",)), ("m0",))
    torch.manual_seed(1)
    first = small_evaluation(model, data, seed=5).estimates[key].log_p
    torch.manual_seed(2)
    assert torch.equal(first, small_evaluation(model, data, seed=5).estimates[key].log_p)
    assert (first != small_evaluation(model, data, seed=6).estimates[key].log_p).all()


def test_examples_have_noise_of_their_own() -> None:
    model = small_model(2).float()
    same = Data(tensors={name: x[:1].expand(3, *x.shape[1:]) for name, x in small_data(model, 1).tensors.items()})
    found = small_evaluation(model, same).estimates[Quantity(("m0",)), ("m0",)].log_p
    assert len(found.unique()) == 3


def test_evaluation_returns_the_truth_beside_the_predictions() -> None:
    model = small_model(2).float()
    data = small_data(model, 9)
    assert torch.equal(small_evaluation(model, data, max_rows=30).truth["m1"], data.tensors["m1"])


def test_evaluation_is_in_evaluation_mode() -> None:
    model = small_model(2, batch_norm=True).float().train()
    before = copy.deepcopy(dict(model.named_buffers()))
    small_evaluation(model, small_data(model, 9))
    torch.testing.assert_close(dict(model.named_buffers()), before)


def test_the_weights_of_training_have_no_part() -> None:
    model = small_model(2).float()
    data = small_data(model, 9)
    expected = small_evaluation(model, data)
    objective = Objective(model, weights={"m0": 3.0, "m1": 50.0})
    torch.testing.assert_close(small_evaluation(objective.model, data), expected, rtol=0, atol=0)


def test_names_of_quantities() -> None:
    assert Quantity(("image",)).name == "log p(image)"
    assert Quantity(("image", "text")).name == "log p(image, text)"
    assert Quantity(("image",), given=("text",)).name == "log p(image | text)"
    assert Quantity(("a", "b", "c"), given=("d", "e", "f", "g")).name == "log p(a, b, c | d, e, ..., g)"


def test_a_pairs_conditionals_are_taken_off_joints_under_their_own_proposals() -> None:
    x, y = ("image",), ("hat", "hair")
    prior, posterior = of_a_pair(x, y), of_a_pair(x, y, y_proposal=y)
    assert [quantity.name for quantity in prior] == [
        "log p(image)",
        "log p(image, hat, hair)",
        "log p(image | hat, hair)",
        "log p(hat, hair | image)",
        "log p(hat, hair)",
    ]
    assert [quantity.given_proposal for quantity in prior] == [(), (), (), x, ()]
    assert [quantity.given_proposal for quantity in posterior] == [(), (), y, x, ()]
    assert list(posterior.values()) == [[x, x + y]] * 4 + [[(), y]]


def test_mean_and_its_standard_error() -> None:
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
