"""The mathematics in its plain form, to hold the package against, and the small models that both are run on.

Plain: one term at a time, each encoding what it is given anew; no masks, no stacking. What the terms score of a
modality goes through its decoder together, which batch norm in the decoder depends on.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, distributions, nn

from mvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from mvae.model import MVAE, Batch
from mvae.stats import JOINT, SUBSET, Totals

HIDDEN, CLASSES, LATENTS = 8, 4, 3


class Encoder(nn.Module):
    """An expert: `layers` to HIDDEN units, then mu and logvar."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN, 2 * LATENTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(x).chunk(2, dim=-1)
        return mu, logvar


def small_model(n_modalities: int, *, batch_norm: bool = False) -> MVAE:
    """Modalities m0, m1, ...: by turns Bernoulli of shape (2, 3), Categorical, Gaussian of shape (5,). In float64."""

    def hidden() -> list[nn.Module]:
        return [nn.BatchNorm1d(HIDDEN), nn.SiLU()] if batch_norm else [nn.SiLU()]

    def decoder(*last: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(LATENTS, HIDDEN, bias=not batch_norm), *hidden(), *last)

    torch.manual_seed(n_modalities)
    encoders: dict[str, nn.Module] = {}
    likelihoods: dict[str, Likelihood] = {}
    for m in range(n_modalities):
        name = f"m{m}"
        if m % 3 == 0:
            encoders[name] = Encoder(nn.Flatten(), nn.Linear(6, HIDDEN, bias=not batch_norm), *hidden())
            last = nn.Linear(HIDDEN, 6), nn.Unflatten(1, (2, 3))
            likelihoods[name] = Bernoulli(decoder(*last))
        elif m % 3 == 1:
            encoders[name] = Encoder(nn.Embedding(CLASSES, HIDDEN), *hidden())
            likelihoods[name] = Categorical(decoder(nn.Linear(HIDDEN, CLASSES)))
        else:
            encoders[name] = Encoder(nn.Linear(5, HIDDEN, bias=not batch_norm), *hidden())
            likelihoods[name] = Gaussian(decoder(nn.Linear(HIDDEN, 5)), std=0.7)
    return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=LATENTS).double()


def small_batch(n_modalities: int, n: int) -> dict[str, Tensor]:
    """Random data for `small_model`, (n, *event) each."""
    torch.manual_seed(n)
    draws = (
        lambda: torch.rand(n, 2, 3).round().double(),
        lambda: torch.randint(CLASSES, (n,)),
        lambda: torch.randn(n, 5).double(),
    )
    return {f"m{m}": draws[m % 3]() for m in range(n_modalities)}


def distribution(likelihood: Likelihood, z: Tensor) -> distributions.Distribution:
    """p(x | z) as one of torch's, for z of (rows, latents)."""
    output = likelihood.decoder(z)
    if isinstance(likelihood, Categorical):
        return distributions.Categorical(logits=output)
    each: distributions.Distribution = distributions.Bernoulli(logits=output)
    if isinstance(likelihood, Gaussian):
        each = distributions.Normal(output, likelihood.std)
    return distributions.Independent(each, output.dim() - 1)


def plain_product(experts: Sequence[tuple[Tensor, Tensor]]) -> distributions.Normal:
    """The prior times the Gaussians of these (mu, logvar), by their precisions; there is one at least."""
    precisions = torch.stack([(-logvar).exp() for _, logvar in experts])
    precision = 1 + precisions.sum(dim=0)
    mu = (precisions * torch.stack([mu for mu, _ in experts])).sum(dim=0) / precision
    return distributions.Normal(mu, precision.rsqrt())


def repeated(
    terms: Sequence[Sequence[str]],
    names: Sequence[str],
    reconstruct: str | Collection[str],
    rows_with: Mapping[str, Sequence[int]],
) -> set[tuple[int, int]]:
    """(term, row) that counts for nothing: the term lacks something of the row, and another one comes to the same."""
    found = set()
    for row in {row for rows in rows_with.values() for row in rows}:
        what: dict[int, tuple[set[str], set[str]]] = {}
        for t, given in enumerate(terms):
            scored = {name for name in names if name in given or reconstruct == "all" or name in reconstruct}
            what[t] = ({name for name in given if row in rows_with[name]}, {n for n in scored if row in rows_with[n]})
        lost = {t for t, given in enumerate(terms) if len(what[t][0]) < len(given)}
        for t in lost:
            others = [u for u in what if u != t and what[u] == what[t]]
            if any(u not in lost or u > t for u in others):
                found.add((t, row))
    return found


def plain_objective(
    model: MVAE,
    batch: Batch,
    noise: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    reconstruct: str | Collection[str] = "given",
    subsets: Sequence[Sequence[str]] = (),
    beta: float = 1.0,
    present: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Totals]:
    """What `Objective.forward` returns. Every term encodes what it is given anew; each example has its own product."""
    names, n = model.modalities, noise.shape[1]
    prior = distributions.Normal(torch.zeros(model.n_latents).to(noise), 1.0)
    rows_with = {
        name: [row for row in range(n) if present is None or name not in present or present[name][row]]
        for name in names
    }
    terms = [names, *([(name,) for name in names] if len(names) > 1 else []), *subsets]
    counts = {(t, row) for t in range(len(terms)) for row in range(n)} - repeated(terms, names, reconstruct, rows_with)
    log_prob, n_log_prob = noise.new_zeros(2, len(terms), len(names))
    kl, n_kl = noise.new_zeros(2, len(terms))
    loss = noise.new_zeros(())
    z: list[dict[int, Tensor]] = [{} for _ in terms]  # of each term, by example
    for t, given in enumerate(terms):
        encoded = {name: model.encoders[name](batch[name][rows_with[name]]) for name in given if rows_with[name]}
        for row in range(n):
            indices = {name: rows_with[name].index(row) for name in encoded if row in rows_with[name]}
            if indices and (t, row) in counts:
                q = plain_product([(encoded[name][0][i], encoded[name][1][i]) for name, i in indices.items()])
                z[t][row] = q.mean + q.stddev * noise[t, row]
                nats = distributions.kl_divergence(q, prior).sum()
                loss = loss + beta * nats
                kl[t] += nats.detach()
                n_kl[t] += 1
    for m, name in enumerate(names):
        scoring = [t for t, given in enumerate(terms) if name in given or reconstruct == "all" or name in reconstruct]
        pairs = [(t, row) for t in scoring for row in z[t] if row in rows_with[name]]
        if pairs:
            p = distribution(model.likelihood(name), torch.stack([z[t][row] for t, row in pairs]))
            for (t, _), nats in zip(pairs, p.log_prob(batch[name][[row for _, row in pairs]]), strict=True):
                loss = loss - (weights or {}).get(name, 1.0) * nats
                log_prob[t, m] += nats.detach()
                n_log_prob[t, m] += 1
    labels = [JOINT, *names[: len(terms) - len(subsets) - 1], *[SUBSET] * len(subsets)]
    return loss / n, Totals(tuple(labels), names, loss.detach(), torch.tensor(float(n)), log_prob, n_log_prob, kl, n_kl)
