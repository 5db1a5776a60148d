"""The prior that is fitted after training: as p(z) of estimates and draws, in its file, and of this model only."""

import json
import shutil
import sys
from pathlib import Path

from mnist.datasets import CONTROLS
from mnist.model import build_model
from mvae import Data, UserError, load_model, log_likelihood
from mvae.run import checkpoint
from mvae.tools import prior

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from test_estimators import N_EXAMPLES, N_LATENTS, STD, decoder_of, linear_gaussian
from test_estimators import examples as drawn
from torch import distributions

from helpers import ROOT, Trained, assert_ended, run_warm, script


def mixture() -> dict[str, np.ndarray]:
    """Return two Gaussians over two latents."""
    means = np.array([[1.0, 0.5], [-1.0, 0.0]])
    return {
        "weights": np.array([0.3, 0.7]),
        "means": means,
        "scale_tril": np.array([[[0.5, 0], [0.2, 0.4]], np.eye(2)]),
    }


def test_log_p_under_a_mixture_is_the_exact_one() -> None:
    """Where x = W z + b + noise: a mixture of N(W m + b, W S W^T + STD² I)."""
    model, batch = linear_gaussian(), drawn(linear_gaussian())
    model.prior = prior.distribution(mixture(), torch.device("cpu"))
    decoder = decoder_of(model, "x")
    weight, part = decoder.weight, {name: torch.from_numpy(x) for name, x in mixture().items()}
    half = weight @ part["scale_tril"]
    gaussians = distributions.MultivariateNormal(
        part["means"] @ weight.T + decoder.bias, half @ half.mT + STD**2 * torch.eye(3)
    )
    exact = distributions.MixtureSameFamily(distributions.Categorical(part["weights"]), gaussians).log_prob(batch["x"])
    torch.manual_seed(0)
    noise = torch.randn(20_000, N_EXAMPLES, N_LATENTS, dtype=torch.float64)
    found = log_likelihood(model, batch, proposal=("x",), targets=[("x",)], noise=noise)[("x",)].log_p
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0)
    normal = log_likelihood(linear_gaussian(), batch, proposal=("x",), targets=[("x",)], noise=noise)[("x",)].log_p
    assert (found - normal).abs().max() > 0.5


def test_a_mixture_has_components_of_each_class() -> None:
    torch.manual_seed(0)
    of = torch.arange(300) % 3
    z = torch.randn(300, 2) * 0.1 + torch.stack([of, -of], dim=1)
    found = prior.fit(z, of, 1, seed=0)
    assert found["weights"] == pytest.approx([1 / 3] * 3)
    np.testing.assert_allclose(found["means"], [[0, 0], [1, -1], [2, -2]], atol=0.05)
    one = prior.fit(z, torch.zeros(300), 2, seed=0)
    expected = GaussianMixture(2, reg_covar=prior.COVARIANCE, random_state=0).fit(z.double().numpy()).score_samples(z)
    log_p = prior.distribution(one, torch.device("cpu")).log_prob(z)
    np.testing.assert_allclose(log_p.numpy(), expected, atol=1e-3)


def test_labels_that_some_examples_lack_make_no_classes() -> None:
    data = Data(tensors={"text": torch.arange(4)})
    assert prior.classes(CONTROLS, data).tolist() == [0, 1, 2, 3]
    few = Data(tensors=data.tensors, present={"text": torch.arange(4) < 1})
    assert prior.classes(CONTROLS, few).tolist() == [0, 0, 0, 0]


def test_draws_given_a_value_are_from_the_posterior_of_the_prior() -> None:
    """p(z | y) of the linear model under N(0, I), whose mean and covariance are known."""
    model, batch = linear_gaussian(), drawn(linear_gaussian())
    model.prior = distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    decoder, given = decoder_of(model, "y"), {"y": batch["y"][:1]}
    precision = torch.eye(2) + decoder.weight.T @ decoder.weight / STD**2
    mean = torch.linalg.solve(precision, decoder.weight.T @ (given["y"][0] - decoder.bias) / STD**2)
    torch.manual_seed(0)
    z = prior.draw_given(model, given, 2000)
    assert z.unique(dim=0).shape == (2000, 2)
    torch.testing.assert_close(z.mean(dim=0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.linalg.inv(precision), atol=0.06, rtol=0)


def test_what_few_draws_explain_is_drawn_from_its_own_posterior() -> None:
    model, batch = linear_gaussian(), drawn(linear_gaussian())
    model.prior = distributions.MultivariateNormal(torch.full((2,), 9.0).double(), torch.eye(2).double())
    given = {"y": batch["y"][:1]}
    mu, logvar = model.posterior(given)
    torch.manual_seed(0)
    z = prior.draw_given(model, given, 2000, temperature=0.25)
    torch.testing.assert_close(z.mean(dim=0), mu[0], atol=0.06, rtol=0)
    torch.testing.assert_close(z.var(dim=0), 0.25 * logvar[0].exp(), atol=0, rtol=0.1)


@pytest.fixture(scope="module")
def path(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint next to which the tool has written a prior. Read-only."""
    path = Path(shutil.copy(trained.out_dir / checkpoint.BEST, tmp_path_factory.mktemp("fitted")))
    words = [path, "--data-dir", digits_dir, "--components", 1, "--threads", 1]
    with script("mnist/datasets.py"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "mnist")
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["prior", *map(str, words)])
        prior.main()
    return path


def test_tool_writes_the_prior_of_this_model(path: Path, tmp_path: Path) -> None:
    model, _ = load_model(path, "mnist", build_model, torch.device("cpu"))
    fitted = prior.load(path, model)
    assert fitted.sample(torch.Size([5])).shape == (5, model.n_latents)
    assert isinstance(fitted, distributions.MixtureSameFamily)
    assert fitted.mixture_distribution.probs.shape == (10,)
    torch.manual_seed(0)
    with pytest.raises(UserError, match="is of another model"):
        prior.load(path, build_model(model.n_latents))
    with pytest.raises(UserError, match=r"no .*prior.npz: `python -m mvae.tools.prior .*` fits it"):
        prior.load(tmp_path / checkpoint.BEST, model)
    (tmp_path / prior.NAME).write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged, fit it again"):
        prior.load(tmp_path / checkpoint.BEST, model)


def test_loglike_and_samples_use_it(path: Path, digits_dir: Path, tmp_path: Path) -> None:
    words = [path, "--data-dir", digits_dir, "--limit", 50, "--n-samples", 20]
    found = {}
    for name in ("normal", "fitted"):
        done = run_warm("mnist/loglike.py", *words, "--prior", name, "--json", f"{name}.json", cwd=tmp_path)
        assert_ended(done)
        assert ("under the fitted prior" in done.stdout) == (name == "fitted")
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert found[name]["prior"] == name
    rows = {name: [(row["quantity"], row["proposal"]) for row in one["log_likelihood"]] for name, one in found.items()}
    assert rows["fitted"] == [row for row in rows["normal"] if row[1] != "p(z)"]
    log_p = {name: one["log_likelihood"][0]["mean"] for name, one in found.items()}
    assert log_p["fitted"] != log_p["normal"]
    sample = [path, "--data-dir", digits_dir, "--save", "npy", "--condition-on-text", "0,5"]
    pictures = []
    for name in ("normal", "fitted"):
        assert_ended(run_warm("mnist/sample.py", *sample, "--prior", name, "--out-dir", name, cwd=tmp_path))
        pictures.append(np.load(tmp_path / name / "sample_image.npy"))
    assert pictures[0].shape == pictures[1].shape == (16, 1, 28, 28)
    assert not np.allclose(*pictures)
    labels = (tmp_path / "fitted" / "sample_text.txt").read_text().split()
    assert labels.count("0") + labels.count("5") > 8


def test_the_temperature_multiplies_the_variance_of_each_gaussian() -> None:
    torch.manual_seed(0)
    cooler = prior.distribution(mixture(), torch.device("cpu"), 0.25).sample(torch.Size([40_000]))
    weights, means, scale_tril = (
        torch.from_numpy(mixture()[name]).float() for name in ("weights", "means", "scale_tril")
    )
    mean = weights @ means
    covariances = 0.25 * scale_tril @ scale_tril.mT + (means - mean).unsqueeze(2) * (means - mean).unsqueeze(1)
    torch.testing.assert_close(cooler.mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(cooler.T.cov(), (weights.view(-1, 1, 1) * covariances).sum(dim=0), atol=0.03, rtol=0)
