"""The paper's baselines: their networks' sizes, their objectives against plain formulas, and their script."""

import importlib
import json
import math
import signal
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
    kl,
    labelled,
    unaided,
)
from fashionmnist.model import build_model as build_fashionmnist
from mnist.model import build_model as build_mnist
from mvae import MVAE, Bernoulli, Categorical, Data, Objective, Run, UsageError, cli, log_likelihood
from mvae.run.run import Stopped

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as Pixels
from torch.distributions import Categorical as Label
from torch.distributions import Independent, Normal, kl_divergence

from helpers import ROOT, assert_ended, assert_refused, run_warm, script

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
    ("build_own", "vae", "mvae"), [(build_mnist, 730_240, 1_063_680), (build_fashionmnist, 3_409_536, 3_742_976)]
)
def test_inference_networks_have_the_papers_number_of_parameters(build_own: Any, vae: int, mvae: int) -> None:
    """A label adds ten inputs of 512 to the CVAE's; JMVAE's joint network starts as the image's does."""

    def count(name: Name) -> int:
        model = build_model(name, build_own, 64)
        return sum(
            weight.numel() for part, weight in model.named_parameters() if part.startswith(("encoders.", "joint."))
        )

    assert count("vae") == vae
    assert {count(name) for name in ("bivcca", "mvae-q", "mopoe")} == {mvae}
    assert count("cvae") == vae + 10 * 512
    assert {count("jmvae"), count("mvae-joint")} == {{1_063_680: 2_061_184, 3_742_976: 7_682_432}[mvae]}


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


def plain(name: Name, model: MVAE, batch: dict[str, Tensor], noise: Tensor, beta: float) -> Tensor:
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


@pytest.mark.parametrize("beta", [0.25, 1.0])
@pytest.mark.parametrize("name", ["bivcca", "jmvae", "mvae-q", "mvae-joint", "mopoe"])
def test_a_loss_and_its_gradient_are_those_of_the_plain_formula(
    name: Name, beta: float, batch: dict[str, Tensor]
) -> None:
    model, objective = made(name)
    noise = objective.noise(N)
    loss, parts = objective(batch, beta, noise=noise)
    expected = plain(name, model, batch, noise, beta)
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


def test_kl_is_torchs() -> None:
    p, q = torch.randn(2, 2, N, N_LATENTS, dtype=torch.float64)
    torch.testing.assert_close(kl(*p, *q), kl_divergence(gaussian(*p), gaussian(*q)))


# The script


SHORT = ["--n-val", 200, "--batch-size", 50, "--annealing-epochs", 1, "--log-interval", 1000, "--n-samples", 5]


def ran(folder: Path, digits_dir: Path, *words: object) -> dict[str, Any]:
    """Run the script for two epochs; return the JSON that it writes."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    words = ("--epochs", 2, *SHORT, "--data-dir", digits_dir, "--json", path, *words)
    assert_ended(run_warm("baselines/run.py", *words, cwd=folder))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["vae", "cvae", "mvae-q"])
def test_one_command_trains_a_baseline_and_estimates_its_row(name: Name, digits_dir: Path, tmp_path: Path) -> None:
    words = ["--model", name, "--split", "test", "--n-examples", 40, "--limit", 200]
    found = ran(tmp_path, digits_dir, *words, "--experiment", "binarymnist")
    assert (found["split"], found["n_examples"], found["n_samples"], found["device"]) == ("test", 40, 5, "cpu")
    assert found["training"]["settings"]["seed"] == 0
    assert found["training"]["settings"]["command"].startswith("python baselines/run.py --epochs 2")
    quantities = {row["quantity"] for row in found["log_likelihood"]}
    alone = {"vae": {"log p(image)"}, "cvae": {"log p(image | text)"}}
    of_a_pair = {"log p(image)", "log p(image, text)", "log p(image | text)", "log p(text | image)", "log p(text)"}
    assert quantities == alone.get(name, of_a_pair)
    assert bool(found["measures"]) == (name not in alone)
    for row in found["log_likelihood"]:
        assert -1000 < row["mean"] < 0
        assert row["log_weight_variance"] > 0
    elbos = [value for key, value in found["training"]["validation"].items() if key.endswith("/elbo")]
    assert all(-1000 < elbo < 0 for elbo in elbos)
    assert elbos


def numbers(found: dict[str, Any]) -> list[Any]:
    """What a row of the table shows, but for times."""
    return [found["log_likelihood"], found["measures"], found["training"]["validation"]]


def test_a_seed_gives_the_same_row_and_a_finished_run_is_read_again(digits_dir: Path, tmp_path: Path) -> None:
    first, again = (ran(tmp_path, digits_dir, "--model", "jmvae", "--out-dir", folder) for folder in ("a", "b"))
    assert first["split"] == "validation"
    assert numbers(first) == numbers(again)
    assert numbers(ran(tmp_path, digits_dir, "--model", "jmvae", "--seed", 1)) != numbers(first)

    words = ["--epochs", 2, *SHORT, "--data-dir", digits_dir, "--model", "jmvae", "--out-dir", "a", "--split", "test"]
    done = run_warm("baselines/run.py", *words, cwd=tmp_path)
    assert_ended(done)
    assert "nothing left to do: a/jmvae-mnist-0 holds a run of 2 epochs" in done.stdout
    path = tmp_path / "results" / "a" / "jmvae-mnist-0.json"
    assert json.loads(path.read_text())["training"]["validation"] == first["training"]["validation"]
    path.write_text("stays")
    done = run_warm("baselines/run.py", *words, cwd=tmp_path)
    assert_ended(done)
    assert done.stdout == "results/a/jmvae-mnist-0.json exists: jmvae-mnist-0 is skipped\n"
    assert path.read_text() == "stays"


def test_a_run_that_was_stopped_continues_to_the_same_row(
    digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(tmp_path, digits_dir, "--model", "bivcca", "--out-dir", "whole")
    words = ["--epochs", 2, *SHORT, "--data-dir", digits_dir, "--model", "bivcca", "--out-dir", "parts"]
    step = Run.step

    def step_and_stop(run: Run) -> None:
        step(run)
        if (run.epoch, run.done) == (2, 7):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    monkeypatch.setattr(Run, "step", step_and_stop)
    with script("baselines/run.py") as module, pytest.raises(Stopped, match="epoch 2, step 7 of 20"):
        module.main()
    assert numbers(ran(tmp_path, digits_dir, "--model", "bivcca", "--out-dir", "parts")) == numbers(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--n-paired", 10], "complete examples"), (["--alpha", -1], "alpha"), (["--n-samples", 1], "n_samples")],
)
def test_a_wrong_flag_is_one_line(words: list[object], said: str, tmp_path: Path) -> None:
    assert_refused(run_warm("baselines/run.py", *words, cwd=tmp_path), 2, said)
    assert list(tmp_path.iterdir()) == []


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


def test_the_table_shows_the_paper_and_the_better_of_two_proposals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table2 = importlib.import_module("table2").TABLES["baselines_mnist"]
    assert table2(tmp_path) == "*There are no results for this table yet.*"
    folder = tmp_path / "results" / "baselines"
    folder.mkdir(parents=True)
    for seed, mean in enumerate([-90.0, -91.0]):
        estimates = [("log p(image)", "q(z | image)", mean, 12), ("log p(image)", "q(z | image, text)", mean + 0.5, 8)]
        names = ("quantity", "proposal", "mean", "log_weight_variance")
        settings = {"command": f"python baselines/run.py --seed {seed}", "commit": "a" * 40, "epochs": 25}
        content = {
            "n_examples": 10000, "n_samples": 1000, "measures": {},
            "training": {"settings": settings, "epoch": 24, "training_seconds": 300.0},
            "log_likelihood": [{**dict(zip(names, one, strict=True)), "standard_error": 0.25} for one in estimates],
        }  # fmt: skip
        (folder / f"vae-mnist-{seed}.json").write_text(json.dumps(content))
    text = table2(tmp_path)
    ours = "-90.00 ± 0.25 (seeds 0.71)"
    assert f"\n| VAE | *-91.13* | {ours} |  |  |  |  | 8.0 |  | 24 / 25 | 5.0 | 2 |\n" in text
    assert "\n| JMVAE | *-90.70* |  | *-90.77* |  | *-88.70* |  |  |  |  |  |  |\n" in text
    assert "\npython baselines/run.py --seed 1\n" in text
