"""Fit a prior to a trained model: a mixture of Gaussians, for draws and log-likelihoods in place of N(0, I).

Run it in an experiment's folder: cd mnist && python -m mvae.tools.prior CHECKPOINT. N(0, I) has most of its mass where
no example lies. The mixture is fitted to draws of q(z | example) over the training data (ex-post density estimation,
Ghosh et al. 2020), with components of each class if a modality is a class. It is written to prior.npz in the
checkpoint's folder, where sample.py and loglike.py find it with --prior fitted, and mvae.tools.explore for a switch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from .. import cli, experts
from ..data.dataset import Data, consecutive_rows
from ..data.supervision import share_pairs
from ..errors import UserError
from ..files import whole
from ..model import MVAE, Batch
from ..run.checkpoint import digest, load_model
from .controls import Controls, Label
from .folder import Examples, Tool, experiment, with_source

log = logging.getLogger("mvae.prior")  # run as __main__

NAME = "prior.npz"
CHOICES = {True: (1, 3, 5), False: (10, 20, 40)}  # numbers of components to choose from: of each class, of all examples
DRAWS = {True: 8, False: 3}  # of z for each example, likewise: fewer overfit, but without classes fits are slow
COVARIANCE = 1e-3  # added to the variances, which are of the order of 1


@dataclass(kw_only=True)
class WithPrior(Tool):
    """The flag of scripts that may use the fitted prior."""

    # General
    prior: Literal["normal", "fitted"] = "normal"  # p(z): N(0, I), the paper's; or mvae.tools.prior's: better samples

    def load_prior(self, model: MVAE, temperature: float = 1.0) -> None:
        """Give the model its fitted prior, if asked. Raises UserError as `load` does."""
        if self.prior == "fitted":
            model.prior = load(self.model_path, model, temperature)


@dataclass(kw_only=True)
class Fit(Tool):
    """The flags of this tool."""

    # Prior
    components: int | None = None  # Gaussians of each class, or in all without classes (default: chosen on validation)
    limit: int | None = None  # fit to the first N training examples only

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(1, "components", "limit")


@torch.no_grad()
def draws(model: MVAE, data: Data) -> Tensor:
    """Return a draw of z from q(z | all that an example has) for each example, (n, latents)."""
    found, data = [], data.to(next(model.parameters()).device)
    for rows in consecutive_rows(data, 500):
        mu, logvar = model.fused(*data.batch(rows))
        found.append(experts.draw(mu, logvar, torch.randn_like(mu)))
    return torch.cat(found)


def classes(controls: Controls, data: Data) -> Tensor:
    """Return each example's class, (n,), of the first label; zeros if there is none, or if examples lack it: a class
    with few labels would get too few examples."""
    name = next((name for name, kind in controls.items() if isinstance(kind, Label)), None)
    if name is None or name in (data.present or {}):
        return torch.zeros(len(data), dtype=torch.long)
    return data.tensors[name].cpu().long()


def fit(z: Tensor, of: Tensor, components: int, seed: int) -> dict[str, np.ndarray]:
    """Return a mixture with `components` Gaussians for each class in `of` (n,): weights, means and Cholesky factors."""
    parts = []
    for one in of.unique():
        some = z[of == one].double().numpy()  # in float32 covariances aren't positive
        mixture = GaussianMixture(min(components, len(some)), reg_covar=COVARIANCE, random_state=seed % 2**32).fit(some)
        parts.append((mixture.weights_ * len(some) / len(z), mixture.means_, np.linalg.cholesky(mixture.covariances_)))
    names = ("weights", "means", "scale_tril")
    return {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def distribution(mixture: dict[str, np.ndarray], device: torch.device, temperature: float = 1.0) -> Distribution:
    """Return the mixture as a distribution of z, (latents,). temperature: factor of the Gaussians' variances."""
    weights, means, scale_tril = (
        torch.from_numpy(mixture[name]).float().to(device) for name in ("weights", "means", "scale_tril")
    )
    gaussians = MultivariateNormal(means, scale_tril=scale_tril * temperature**0.5, validate_args=False)
    return Mixture(Categorical(weights), gaussians, validate_args=False)


class Mixture(MixtureSameFamily):
    """A mixture of Gaussians that samples only the chosen components; torch's samples all of them, with a copy of all
    covariances for each draw."""

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        gaussian = cast(MultivariateNormal, self.component_distribution)
        which = self.mixture_distribution.sample(torch.Size(sample_shape))
        z = torch.randn(*which.shape, *self.event_shape, device=which.device)
        for i in which.unique():
            z[which == i] = gaussian.mean[i] + z[which == i] @ gaussian.scale_tril[i].T
        return z


def load(checkpoint: Path, model: MVAE, temperature: float = 1.0) -> Distribution:
    """Return the prior that was fitted to this model. Raises UserError if there is none, or it is another model's.

    temperature: factor of the variances of its Gaussians, for draws.
    """
    path = checkpoint.parent / NAME
    try:
        with np.load(path) as file:
            mixture = {name: file[name] for name in ("digest", "weights", "means", "scale_tril")}
    except FileNotFoundError:
        raise UserError(f"no {path}: `python -m mvae.tools.prior {checkpoint}` fits it") from None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged, fit it again: {error}") from None
    if str(mixture["digest"]) != digest(model.state_dict()):
        raise UserError(f"{path} is of another model: `python -m mvae.tools.prior {checkpoint}` fits it")
    return distribution(mixture, next(model.parameters()).device, temperature)


@torch.no_grad()
def draw_given(model: MVAE, given: Batch, n: int, temperature: float = 1.0) -> Tensor:
    """Draw n values of z, (n, latents), from p(z | given) ∝ p(z) p(given | z) under the model's prior.

    They are resampled, without replacement, from many draws of the prior, which suits what many z explain: labels and
    attributes of one example, but not pictures. Where the effective number of draws is below n, as for most texts, z is
    drawn from q(z | given) instead, at this temperature. Given nothing: from the prior.
    """
    assert model.prior is not None
    if not given:
        return model.prior.sample(torch.Size([n]))
    z = model.prior.sample(torch.Size([max(20_000, 50 * n)]))
    log_p = []
    for some in z.split(1000):
        batch = {name: x.expand(len(some), *x.shape[1:]) for name, x in given.items()}
        log_p.append(model.log_prob(some.unsqueeze(0), batch, [tuple(given)])[0].sum(dim=0))
    weights = torch.cat(log_p).double().softmax(dim=0)
    if 1 / weights.square().sum() < n:
        return model.draw(given, n, temperature)
    return z[weights.multinomial(n)]


def fitted(
    model: MVAE, train: Data, validation: Data, controls: Controls, *, components: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return the mixture that is fitted to draws for the training data, and describes those for validation best.

    components: Gaussians of each class, or in all without classes (default: chosen on validation).
    """
    of, scored = classes(controls, train), {}
    several = len(of.unique()) > 1
    z, held_out = torch.cat([draws(model, train) for _ in range(DRAWS[several])]).cpu(), draws(model, validation).cpu()
    for n in [components] if components else CHOICES[several]:
        mixture = fit(z, of.repeat(DRAWS[several]), n, seed)
        score = distribution(mixture, torch.device("cpu")).log_prob(held_out).mean().item()
        log.info("%d components: log p(z) %.3f nats of held-out draws", len(mixture["weights"]), score)
        scored[score] = mixture
    return scored[max(scored)]


def training_data(examples: Examples, config: Any, settings: dict[str, Any]) -> tuple[Data, Data]:
    """Return the examples that trained and validated the model, with the modalities that they had then."""
    train, validation = (examples(split, config, settings) for split in ("train", "validation"))
    paired, modalities = settings["n_paired"] or settings["paired_fraction"], tuple(train.batch(torch.arange(1))[0])
    how = {"unpaired": settings["unpaired"], "seed": settings["seed"]}
    return share_pairs(train[: settings["limit"]], validation, paired, modalities, **how)


def main() -> None:
    folder = experiment()
    config = cli.parse(__doc__, with_source(Fit, folder.source))
    model, trained = load_model(config.model_path, folder.name, folder.build_model, config.device())
    torch.manual_seed(config.seed)
    train, validation = training_data(folder.examples, config, trained["settings"])
    best = fitted(
        model, train[: config.limit], validation, folder.controls, components=config.components, seed=config.seed
    )
    path = config.model_path.parent / NAME
    with whole(path) as file:
        np.savez(file, digest=digest(model.state_dict()), **best)  # type: ignore[arg-type]
    print(f"wrote {path}: {len(best['weights'])} components")


if __name__ == "__main__":
    cli.run(main)
