"""The paper's baselines: their networks' sizes, their objectives against plain formulas, and their script."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from baselines.model import (
    BOTH,
    CLASSES,
    GIVEN_LABEL,
    IMAGE,
    TEXT,
    GivenLabel,
    Joint,
    Name,
    WithLabel,
    build_model,
    build_objective,
    labelled,
    unaided,
)
from fashionmnist.model import build_model as build_fashionmnist
from mnist.model import build_model as build_mnist
from mvae import MVAE, Bernoulli, Categorical, Data, Objective, UsageError, cli, log_likelihood

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as Pixels
from torch.distributions import Categorical as Label
from torch.distributions import Independent, Normal, kl_divergence

from helpers import assert_ended, run_warm, script

N_LATENTS, N = 3, 5


class ImageEncoder(nn.Module):
    """An experiment's encoder of pictures, of two layers of four units."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.mu, self.logvar = nn.Linear(4, n_latents), nn.Linear(4, n_latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(image)
        return self.mu(hidden), self.logvar(hidden)


class TextEncoder(nn.Module):
    """An experiment's encoder of labels: two rows of parameters for each."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2, CLASSES, n_latents))

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.rows[:, label]
        return mu, logvar


def build(n_latents: int) -> MVAE:
    """Tiny networks in float64 in place of an experiment's."""
    image = nn.Sequential(nn.Linear(n_latents, 4), nn.Tanh(), nn.Linear(4, 784), nn.Unflatten(1, (1, 28, 28)))
    model = MVAE(
        encoders={"image": ImageEncoder(n_latents), "text": TextEncoder(n_latents)},
        likelihoods={"image": Bernoulli(image), "text": Categorical(nn.Linear(n_latents, CLASSES))},
        n_latents=n_latents,
    )
    return model.double()


def made(name: Name, **settings: Any) -> tuple[MVAE, Objective]:
    torch.manual_seed(0)
    model = build_model(name, build, N_LATENTS).double()
    how: dict[str, Any] = {"lambda_text": 25, "alpha": 0.5, "reconstruct": (), "iw_samples": 1, **settings}
    return model, build_objective(name, model, **how).double()


@pytest.fixture
def data() -> Data:
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(N, 1, 28, 28, generator=rng, dtype=torch.float64).round()
    return Data(tensors={"image": image, "text": torch.tensor([3, 0, 9, 3, 1])})


@pytest.fixture
def batch(data: Data) -> dict[str, Tensor]:
    return data.batch(torch.arange(N))[0]


def gaussian(mu: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mu, (0.5 * logvar).exp()), 1)


PRIOR = gaussian(*torch.zeros(2, N_LATENTS, dtype=torch.float64))


def drawn(q: Independent, noise: Tensor) -> Tensor:
    return q.mean + q.stddev * noise


def log_p(model: MVAE, z: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p(image | z) and log p(text | z), by torch's distributions."""
    pixels = Pixels(logits=model.likelihood("image").decoder(z))
    label = Label(logits=model.likelihood("text").decoder(z))
    return pixels.log_prob(batch["image"]).sum((1, 2, 3)), label.log_prob(batch["text"])


def experts_of(model: MVAE, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [model.encoders[name](batch[name]) for name in BOTH]


# Networks


@pytest.mark.parametrize(
    ("build_own", "cvae", "jmvae"), [(build_mnist, 735_360, 2_061_184), (build_fashionmnist, 3_414_656, 7_682_432)]
)
def test_inference_networks_have_the_papers_number_of_parameters(build_own: Any, cvae: int, jmvae: int) -> None:
    def count(name: Name) -> int:
        model = build_model(name, build_own, 64)
        return sum(
            weight.numel() for part, weight in model.named_parameters() if part.startswith(("encoders.", "joint."))
        )

    assert (count("cvae"), count("jmvae")) == (cvae, jmvae)


def test_a_labels_code_is_ten_further_inputs_of_the_first_layer() -> None:
    torch.manual_seed(0)
    network = WithLabel(nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    x, label = torch.randn(N, 4), torch.eye(CLASSES)[:N]
    first, label_weight = network.below[1], network.label.weight
    wide = torch.cat([x.tanh(), label], dim=1) @ torch.cat([first.weight, label_weight], dim=1).T + first.bias
    torch.testing.assert_close(network(torch.cat([x, label], dim=1)), network.above(wide))


# Posteriors


def test_a_posterior_without_a_product_is_its_networks_gaussian(batch: dict[str, Tensor]) -> None:
    model, _ = made("bivcca")
    for (mu, logvar), name in zip(experts_of(model, batch), BOTH, strict=True):
        torch.testing.assert_close(model.posterior({name: batch[name]}), (mu, logvar))


def test_unaided_experts_multiply_without_the_prior() -> None:
    mu, logvar = torch.tensor([[[1.0]], [[4.0]]]), torch.tensor([[[2.0]], [[0.5]]]).log()
    both = torch.tensor([[[True], [True]]])
    found = unaided(mu, logvar, both)
    torch.testing.assert_close(found, (torch.tensor([[[8.5 / 2.5]]]), torch.tensor([[[1 / 2.5]]]).log()))
    torch.testing.assert_close(found, unaided(mu, logvar))


def test_mvae_q_divides_the_product_of_posteriors_by_the_prior(batch: dict[str, Tensor]) -> None:
    model, _ = made("mvae-q")
    single = [gaussian(*model.posterior({name: batch[name]})) for name in BOTH]
    for q, (mu, logvar) in zip(single, experts_of(model, batch), strict=True):
        torch.testing.assert_close((q.mean, q.variance), (mu, logvar.sigmoid()))
    joint = gaussian(*model.posterior(batch))
    z = torch.randn(2, N, N_LATENTS, dtype=torch.float64)
    log_ratio = joint.log_prob(z) - (single[0].log_prob(z) + single[1].log_prob(z) - PRIOR.log_prob(z))
    torch.testing.assert_close(log_ratio[0], log_ratio[1])  # a constant in z


@pytest.mark.parametrize("name", ["jmvae", "mvae-joint"])
def test_a_joint_network_is_the_posterior_given_both(name: Name, batch: dict[str, Tensor]) -> None:
    model, _ = made(name)
    assert isinstance(model, Joint)
    torch.testing.assert_close(model.posterior(batch), model.joint(batch["image"], batch["text"]))
    for expert, modality in zip(experts_of(model, batch), BOTH, strict=True):
        torch.testing.assert_close(model.posterior({modality: batch[modality]}), expert)


# Objectives, against plain formulas


def plain(name: Name, model: MVAE, batch: dict[str, Tensor], noise: Tensor, beta: float = 0.25) -> Tensor:
    """Return the loss with λ 25 and α 0.5 by torch.distributions; noise: (terms, batch, latents)."""

    def elbo(q: Independent, term: int, names: tuple[str, ...]) -> Tensor:
        scores = dict(zip(BOTH, log_p(model, drawn(q, noise[term]), batch), strict=True))
        return sum(scores[one] * {"image": 1, "text": 25}[one] for one in names) - beta * kl_divergence(q, PRIOR)

    x, y = (gaussian(*expert) for expert in experts_of(model, batch))
    if name == "bivcca":
        return -(elbo(x, 0, BOTH) + elbo(y, 1, BOTH)).mean()
    both = gaussian(*model.posterior(batch))
    if name == "jmvae":
        return -(elbo(both, 0, BOTH) - beta * 0.5 * (kl_divergence(both, x) + kl_divergence(both, y))).mean()
    if name == "mopoe":
        x, y = (gaussian(*model.posterior({one: batch[one]})) for one in BOTH)
        return -(elbo(both, 0, BOTH) + elbo(x, 1, BOTH) + elbo(y, 2, BOTH)).mean()
    x, y = (gaussian(*model.posterior({one: batch[one]})) for one in BOTH)
    return -(elbo(both, 0, BOTH) + elbo(x, 1, IMAGE) + elbo(y, 2, TEXT)).mean()


@pytest.mark.parametrize("name", ["bivcca", "jmvae", "mvae-q", "mvae-joint", "mopoe"])
def test_a_loss_and_its_gradient_are_those_of_the_plain_formula(name: Name, batch: dict[str, Tensor]) -> None:
    model, objective = made(name)
    noise = objective.noise(N)
    loss, parts = objective(batch, 0.25, noise=noise)
    expected = plain(name, model, batch, noise)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts.loss / parts.n, loss.detach())
    weights = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))


def test_the_vaes_loss_is_its_elbos(batch: dict[str, Tensor]) -> None:
    model, objective = made("vae")
    noise = objective.noise(N)
    q = gaussian(*model.encoders["image"](batch["image"]))
    pixels = Pixels(logits=model.likelihood("image").decoder(drawn(q, noise[0])))
    elbo = pixels.log_prob(batch["image"]).sum((1, 2, 3)) - 0.25 * kl_divergence(q, PRIOR)
    torch.testing.assert_close(objective(batch, 0.25, noise=noise)[0], -elbo.mean())


def test_the_cvaes_loss_and_estimate_are_of_the_image_given_the_label(data: Data) -> None:
    model, objective = made("cvae")
    batch, plain_batch = labelled(data).batch(torch.arange(N))[0], data.batch(torch.arange(N))[0]
    code = torch.eye(CLASSES, dtype=torch.float64)[plain_batch["text"]]
    noise = objective.noise(N)
    q = gaussian(*model.encoders[GIVEN_LABEL](torch.cat([plain_batch["image"].flatten(1), code], dim=1)))

    def log_p_given(z: Tensor) -> Tensor:
        pixels = Pixels(logits=model.likelihood(GIVEN_LABEL).decoder(torch.cat([z, code], dim=1)))
        return pixels.log_prob(plain_batch["image"]).sum((1, 2, 3))

    z = drawn(q, noise[0])
    elbo = log_p_given(z) - 0.25 * kl_divergence(q, PRIOR)
    torch.testing.assert_close(objective(batch, 0.25, noise=noise)[0], -elbo.mean())

    draws = torch.randn(4, N, N_LATENTS, dtype=torch.float64)
    weights = [log_p_given(z) + PRIOR.log_prob(z) - q.log_prob(z) for z in (drawn(q, one) for one in draws)]
    expected = torch.stack(weights).logsumexp(dim=0) - math.log(4)
    only = (GIVEN_LABEL,)
    found = log_likelihood(model, batch, proposal=only, targets=[only], noise=draws)[only]
    torch.testing.assert_close(found.log_p, expected)


def test_a_label_of_the_cvae_changes_the_picture_and_another_shape_is_refused(data: Data) -> None:
    model, _ = made("cvae")
    batch = labelled(data).batch(torch.arange(N))[0]
    model.check(batch)
    other = batch[GIVEN_LABEL].clone()
    other[:, -CLASSES:] = other[:, -CLASSES:].roll(1, dims=1)
    likelihood, z = model.likelihood(GIVEN_LABEL), torch.zeros(N, N_LATENTS, dtype=torch.float64)
    assert isinstance(likelihood, GivenLabel)
    assert (likelihood.log_prob(z, batch[GIVEN_LABEL]) != likelihood.log_prob(z, other)).all()
    with pytest.raises(UsageError, match=r"must have the decoder's shape \(5, 794\), got \(5, 793\)"):
        likelihood.check(other[:, :-1], z)


# The script


SHORT = ["--n-val", 200, "--batch-size", 50, "--annealing-epochs", 1, "--log-interval", 1000, "--n-samples", 5]


def ran(folder: Path, digits_dir: Path, *words: object) -> dict[str, Any]:
    """Run the script for two epochs; return the JSON that it writes."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    words = ("--epochs", 2, *SHORT, "--data-dir", digits_dir, "--json", path, *words)
    assert_ended(run_warm("baselines/run.py", *words, cwd=folder))
    return json.loads(path.read_text())


def quantities_of(found: dict[str, Any]) -> set[str]:
    return {row["quantity"] for row in found["log_likelihood"]}


@pytest.mark.parametrize("name", ["vae", "cvae"])
def test_one_command_trains_a_baseline_and_estimates_its_row(name: Name, digits_dir: Path, tmp_path: Path) -> None:
    words = ["--model", name, "--split", "test", "--n-examples", 40, "--limit", 200]
    found = ran(tmp_path, digits_dir, *words, "--experiment", "binarymnist")
    assert (found["split"], found["n_examples"], found["n_samples"], found["device"]) == ("test", 40, 5, "cpu")
    assert found["training"]["settings"]["seed"] == 0
    assert found["training"]["settings"]["command"].startswith("python baselines/run.py --epochs 2")
    quantity = {"vae": "log p(image)", "cvae": "log p(image | text)"}[name]
    assert quantities_of(found) == {quantity}
    assert not found["measures"]
    for row in found["log_likelihood"]:
        assert -1000 < row["mean"] < 0
        assert row["log_weight_variance"] > 0
    elbos = [value for key, value in found["training"]["validation"].items() if key.endswith("/elbo")]
    assert all(-1000 < elbo < 0 for elbo in elbos)
    assert elbos


def test_a_seed_gives_the_same_row_and_a_finished_run_is_read_again(
    digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (ran(tmp_path, digits_dir, "--model", "jmvae", "--out-dir", folder) for folder in ("a", "b"))
    assert first["split"] == "validation"
    of_a_pair = {"log p(image)", "log p(image, text)", "log p(image | text)", "log p(text | image)", "log p(text)"}
    assert quantities_of(first) == of_a_pair
    assert first["measures"]
    for part in ("log_likelihood", "measures"):
        assert first[part] == again[part]
    trained = first["training"]["validation"]
    assert trained == again["training"]["validation"]

    words = ["--epochs", 2, *SHORT, "--data-dir", digits_dir, "--model", "jmvae", "--out-dir", "a", "--split", "test"]
    done = run_warm("baselines/run.py", *words, cwd=tmp_path)
    assert_ended(done)
    assert "nothing left to do: a/jmvae-mnist-0 holds a run of 2 epochs" in done.stdout
    path = tmp_path / "results" / "a" / "jmvae-mnist-0.json"
    assert json.loads(path.read_text())["training"]["validation"] == trained
    path.write_text("stays")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    with script("baselines/run.py") as module:
        module.main()
    assert path.read_text() == "stays"


@pytest.mark.parametrize(
    ("fields", "said"), [({"n_paired": 10}, "complete examples"), ({"alpha": -1}, "alpha must be >= 0, got -1")]
)
def test_a_wrong_flag_is_refused(fields: dict[str, Any], said: str) -> None:
    with script("baselines/run.py") as module, pytest.raises(UsageError, match=said):
        module.Config(**fields)


def test_flags_are_documented_and_presets_are_mnists() -> None:
    with script("baselines/run.py") as module:
        assert all(help_ for _, _, help_ in cli.documented(module.Config))
        presets = module.PRESETS
    with script("mnist/train.py") as train:
        for name in ("fast", "paper"):
            own = {**cli.plain(presets[name]), "out_dir": "", "resume": ""}
            theirs = {**cli.plain(train.PRESETS[name]), "out_dir": "", "resume": ""}
            theirs |= {"lambda_text": 50} if name == "paper" else {}  # as the paper's text has it
            assert {key: own[key] for key in own.keys() & theirs} == {key: theirs[key] for key in own.keys() & theirs}
