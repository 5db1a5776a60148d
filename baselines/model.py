"""The baselines of Wu & Goodman (2018), section 5, on the networks of an experiment: a picture and its label.

x is the picture (`image`), y its label (`text`). λ weighs log p(y | z) in training; β anneals each KL divergence.

    vae         ELBO(x): Kingma & Welling 2014.
    cvae        E_q(z|x,y)[log p(x | y, z)] - KL(q(z | x, y) || p(z)), a bound on log p(x | y): Sohn et al. 2015, with
                p(z) = N(0, I) for every label.
    bivcca      E_q(z|x)[log p(x, y | z)] - KL(q(z | x) || p(z)), and the same with q(z | y): Wang et al. 2016, both
                weighted alike. The mixture of experts of MMVAE (Shi et al. 2019) has these terms too, if its KL
                divergence is replaced by the mean of the experts', an upper bound.
    jmvae       E_q(z|x,y)[log p(x, y | z)] - KL(q(z | x, y) || p(z)) with a network q(z | x, y), less
                α [KL(q(z | x, y) || q(z | x)) + KL(q(z | x, y) || q(z | y))]: JMVAE-kl, Suzuki et al. 2016.
    mvae-q      the MVAE's objective with q(z | x, y) ∝ q(z | x) q(z | y) / p(z): Wu & Goodman 2018, section 2.2.
    mvae-joint  the MVAE's objective with JMVAE's network q(z | x, y).
    mopoe       E_q(z|X)[log p(x, y | z)] - KL(q(z | X) || p(z)) for each subset X, q a product of experts: Sutter et
                al. 2021, weighted alike.

A posterior without a product is its network's Gaussian; the MVAE's has the prior as a further expert.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mvae import MVAE, Bernoulli, Data, Objective, Term, experts
from mvae.likelihoods import check_shape
from mvae.model import Batch
from mvae.objective import Totals

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Name = Literal["vae", "cvae", "bivcca", "jmvae", "mvae-q", "mvae-joint", "mopoe"]

IMAGE, TEXT, BOTH = ("image",), ("text",), ("image", "text")
GIVEN_LABEL = "image | text"
"""The CVAE's only modality: a picture with its label, (batch, 784 + 10); its score is log p(image | text, z)."""

SHAPE, CLASSES = (1, 28, 28), 10


def build_model(name: Name, build: Callable[[int], MVAE], n_latents: int) -> MVAE:
    """Return the model of a baseline. `build` is the experiment's: from the size of z to its MVAE."""
    own = build(n_latents)
    encoder: Any = own.encoders["image"]
    image = own.likelihood("image")
    if name == "vae":
        return MVAE(encoders={"image": encoder}, likelihoods={"image": image}, n_latents=n_latents, fuse=unaided)
    if name == "cvae":
        encoder.hidden = WithLabel(nn.Unflatten(1, SHAPE), *encoder.hidden)
        likelihood = GivenLabel(WithLabel(*image.decoder.children()))
        encoders, likelihoods = {GIVEN_LABEL: encoder}, {GIVEN_LABEL: likelihood}
        return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=n_latents, fuse=unaided)
    if name in ("jmvae", "mvae-joint"):
        return Joint(own, JointEncoder(build(n_latents).encoders["image"]))
    own.fuse = {"bivcca": unaided, "mvae-q": quotient, "mopoe": experts.product}[name]
    return own


def build_objective(
    name: Name, model: MVAE, *, lambda_text: float, alpha: float, reconstruct: tuple[str, ...], iw_samples: int
) -> Objective:
    """Return the objective of a baseline.

    Args:
        alpha: JMVAE's α.
        reconstruct: what the MVAE's terms reconstruct in addition to their inputs; in the paper nothing.
        iw_samples: draws of z, for an importance-weighted bound in terms with the picture; see `Objective`.
    """
    only = model.modalities
    mvae = [Term(BOTH, BOTH), Term(IMAGE, IMAGE + reconstruct), Term(TEXT, TEXT)]
    terms = {
        "vae": [Term(only, only)],
        "cvae": [Term(only, only)],
        "bivcca": [Term(IMAGE, BOTH), Term(TEXT, BOTH)],
        "jmvae": [Term(BOTH, BOTH)],
        "mvae-q": mvae,
        "mvae-joint": mvae,
        "mopoe": [Term(BOTH, BOTH), Term(IMAGE, BOTH), Term(TEXT, BOTH)],
    }[name]
    weights = {"text": lambda_text} if only == BOTH else {}
    if name == "jmvae":
        jmvae = JMVAE(model, terms, weights=weights, iw_samples=iw_samples, iw=only[0])
        jmvae.alpha = alpha
        return jmvae
    return Objective(model, terms, weights=weights, iw_samples=iw_samples, iw=only[0])


# Posteriors. For the shapes see `experts.product`.


def unaided(mu: Tensor, logvar: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the product of the present experts without the prior: of one expert, that expert."""
    if present is None:
        present = torch.ones(1, *mu.shape[:2], dtype=torch.bool, device=mu.device)
    present = present.unsqueeze(-1)
    log_precision = torch.where(present, -logvar, -math.inf)
    weight = log_precision.softmax(dim=1)
    return (weight * torch.where(present, mu, 0.0)).sum(dim=1), -log_precision.logsumexp(dim=1)


def quotient(mu: Tensor, logvar: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return prod q(z | x_i) / p(z)^(n - 1) of the n present experts q(z | x_i) = N(mu_i, sigmoid(logvar_i)).

    An expert must be narrower than the prior for the quotient to be a Gaussian. Then q(z | x_i) / p(z) is one too, with
    variance exp(logvar_i) and mean mu_i (1 + exp(logvar_i)), and the prior times all of these is the result.
    """
    return experts.product(mu * (1 + logvar.exp()), logvar, present)


class Joint(MVAE):
    """A model of an image and its label with a joint inference network: its output is the last of three experts.

    joint: (batch, 1, 28, 28), labels (batch,) -> mu, logvar, each (batch, latents). experts: what `encode` returned
        last, for JMVAE's further KL divergences.
    """

    def __init__(self, model: MVAE, joint: nn.Module):
        likelihoods = {name: model.likelihood(name) for name in model.modalities}
        super().__init__(
            encoders=dict(model.encoders.items()), likelihoods=likelihoods, n_latents=model.n_latents, fuse=self.chosen
        )
        self.joint = joint

    def encode(self, batch: Batch, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu, logvar, each (modalities + 1, batch, latents); see `MVAE.encode`. All examples are complete."""
        mu, logvar = super().encode(batch, present)
        joint = self.joint(batch["image"], batch["text"]) if {*BOTH} <= batch.keys() else (mu[0], logvar[0])
        self.experts = torch.cat([mu, joint[0].unsqueeze(0)]), torch.cat([logvar, joint[1].unsqueeze(0)])
        return self.experts

    @staticmethod
    def chosen(mu: Tensor, logvar: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the joint expert of a term with both modalities, or the only expert of another; a Fusion."""
        assert present is not None
        both = present.all(dim=1, keepdim=True)
        return unaided(mu, logvar, torch.cat([present & ~both, both], dim=1))


class JointEncoder(nn.Module):
    """q(z | image, label): the first layers of an image's encoder and an embedding of the label, then a common layer.

    encoder: an experiment's for images, of which this takes the layers up to the first linear one, and the last.
    """

    def __init__(self, encoder: Any):
        super().__init__()
        below, _ = divided(*encoder.hidden)
        width = below[-1].out_features
        self.image, self.label = below, nn.Embedding(CLASSES, width)
        self.both = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU())
        self.mu, self.logvar = encoder.mu, encoder.logvar

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.both(torch.cat([self.image(image), self.label(label)], dim=1))
        return self.mu(hidden), self.logvar(hidden)


# JMVAE.


class JMVAE(Objective):
    """JMVAE-kl (Suzuki et al. 2016): the joint ELBO less α times the KL divergences to the posteriors of one modality.

    They are annealed by β as well. Validation's `joint/elbo` is without them.
    """

    model: Joint
    alpha: float = 0.1

    def forward(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Totals]:
        loss, parts = super().forward(batch, beta, subsets, present, noise)
        mu, logvar = self.model.experts  # of the image, the text, and both
        surplus = kl(mu[2], logvar[2], mu[0], logvar[0]) + kl(mu[2], logvar[2], mu[1], logvar[1])
        loss = loss + self.alpha * beta * surplus.mean()
        return loss, parts._replace(loss=(loss * parts.n).detach())


def kl(mu: Tensor, logvar: Tensor, other_mu: Tensor, other_logvar: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) || N(other_mu, exp(other_logvar))) in nats, summed over the last dimension."""
    ratio = logvar - other_logvar
    return 0.5 * (ratio.expm1() - ratio + (mu - other_mu).square() * (-other_logvar).exp()).sum(dim=-1)


# CVAE.


class WithLabel(nn.Module):
    """A network whose first linear layer also reads a label: (rows, n + 10), with the label's one-hot code last."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.below, self.above = divided(*layers)
        self.label = nn.Linear(CLASSES, self.below[-1].out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x[:, :-CLASSES]) + self.label(x[:, -CLASSES:]))


class GivenLabel(Bernoulli):
    """p(image | label, z) of x (batch, 784 + 10), a picture and its label; the decoder reads z and the label."""

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        label = x[:, -CLASSES:].to(z.dtype).expand(*z.shape[:-1], CLASSES)
        return super().log_prob(torch.cat([z, label], dim=-1), x[:, :-CLASSES].unflatten(1, SHAPE))

    def check(self, x: Tensor, z: Tensor) -> None:
        check_shape(x, torch.Size([len(x), math.prod(SHAPE) + CLASSES]))


def labelled(data: Data) -> Data:
    """Return the CVAE's data: each picture with its label, as `GIVEN_LABEL`."""

    def transform(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = data.transform(rows)
        label = F.one_hot(batch["text"], CLASSES)
        return {GIVEN_LABEL: torch.cat([batch["image"].flatten(1), label.to(batch["image"].dtype)], dim=1)}

    return dataclasses.replace(data, transform=transform)


def divided(*layers: nn.Module) -> tuple[Any, nn.Sequential]:
    """Return the layers up to the first linear one, and the others."""
    n = 1 + next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[:n]), nn.Sequential(*layers[n:])
