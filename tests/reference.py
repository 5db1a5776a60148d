"""The mathematics in plain form, to compare the library with, and the small models that both run on.

Plain: one term and one example at a time, each encoded again; no masks, no stacking. All scores of a modality go
through its decoder together, since batch norm depends on it.
"""

import copy
from collections.abc import Mapping, Sequence

from mvae import MVAE, Bernoulli, Categorical, Gaussian, Likelihood, Term
from mvae.model import Batch
from mvae.objective import JOINT, SUBSET, Totals

import torch
from torch import Tensor, distributions, nn

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
    """Return a float64 model of m0, m1, ...: by turns Bernoulli (2, 3), Categorical, and Gaussian (5,)."""

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
    """Return random data for `small_model`, (n, *event) each."""
    torch.manual_seed(n)
    draws = (
        lambda: torch.rand(n, 2, 3).round().double(),
        lambda: torch.randint(CLASSES, (n,)),
        lambda: torch.randn(n, 5).double(),
    )
    return {f"m{m}": draws[m % 3]() for m in range(n_modalities)}


def distribution(likelihood: Likelihood, z: Tensor) -> distributions.Distribution:
    """Return p(x | z) as a distribution of torch's, for z (rows, latents)."""
    output = likelihood.decoder(z)
    if isinstance(likelihood, Categorical):
        return distributions.Categorical(logits=output)
    each: distributions.Distribution = distributions.Bernoulli(logits=output)
    if isinstance(likelihood, Gaussian):
        each = distributions.Normal(output, likelihood.std)
    return distributions.Independent(each, output.dim() - 1)


def plain_product(experts: Sequence[tuple[Tensor, Tensor]]) -> distributions.Normal:
    """Multiply the prior and one or more Gaussians, given by their (mu, logvar), by adding precisions."""
    precisions = torch.stack([(-logvar).exp() for _, logvar in experts])
    precision = 1 + precisions.sum(dim=0)
    mu = (precisions * torch.stack([mu for mu, _ in experts])).sum(dim=0) / precision
    return distributions.Normal(mu, precision.rsqrt())


def paper_terms(names: Sequence[str]) -> list[Term]:
    """Return the terms of equation 3 of the paper: all modalities, and each alone."""
    sets = [tuple(names), *([(name,) for name in names] if len(names) > 1 else [])]
    return [Term(some, some) for some in sets]


def repeated(terms: Sequence[Term], rows_with: Mapping[str, Sequence[int]]) -> set[tuple[int, int]]:
    """Return each (term, row) that doesn't count: the row lacks an input of the term, which then equals another."""
    found = set()
    for row in {row for rows in rows_with.values() for row in rows}:
        here = {name for name, rows in rows_with.items() if row in rows}
        left = [(here.intersection(term.inputs), here.intersection(term.reconstructs)) for term in terms]
        lost = [t for t, term in enumerate(terms) if not here.issuperset(term.inputs)]
        for t in lost:
            if any(u != t and left[u] == left[t] and (u not in lost or u > t) for u in range(len(terms))):
                found.add((t, row))
    return found


def plain_objective(
    model: MVAE,
    batch: Batch,
    noise: Tensor,
    *,
    terms: Sequence[Term] | None = None,
    weights: Mapping[str, float] | None = None,
    subsets: Sequence[Sequence[str]] = (),
    subset_also: Sequence[str] = (),
    iw: str | None = None,
    beta: float = 1.0,
    present: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Totals]:
    """Return what `Objective.forward` returns, for noise (terms, n, latents) or (K, terms, n, latents)."""
    names, noise = model.modalities, noise if noise.dim() == 4 else noise.unsqueeze(0)
    k, n = len(noise), noise.shape[2]
    prior = distributions.Normal(torch.zeros(model.n_latents).to(noise), 1.0)
    rows_with = {
        name: [row for row in range(n) if present is None or name not in present or present[name][row]]
        for name in names
    }
    terms = list(terms or paper_terms(names))
    labels = [JOINT if term.inputs == names else "+".join(term.inputs) for term in terms] + [SUBSET] * len(subsets)
    terms += [Term(tuple(some), (*some, *subset_also)) for some in subsets]
    log_prob, n_log_prob = noise.new_zeros(2, len(terms), len(names))
    kl, n_kl = noise.new_zeros(2, len(terms))
    q: dict[tuple[int, int], distributions.Normal] = {}  # by term and example
    dropped = repeated(terms, rows_with)
    for t, term in enumerate(terms):
        encoded = {name: model.encoders[name](batch[name][rows_with[name]]) for name in term.inputs if rows_with[name]}
        for row in range(n):
            indices = {name: rows_with[name].index(row) for name in encoded if row in rows_with[name]}
            if indices and (t, row) not in dropped:
                q[t, row] = plain_product([(encoded[name][0][i], encoded[name][1][i]) for name, i in indices.items()])
                kl[t] += distributions.kl_divergence(q[t, row], prior).sum().detach()
                n_kl[t] += 1

    # The gradients of the decoders' weights and of z are kept apart: importance weights treat them differently.
    z = {(t, row): one.mean + one.stddev * noise[:, t, row] for (t, row), one in q.items()}  # (K, latents) each
    frozen = copy.deepcopy(model).requires_grad_(False)
    scores = {key: noise.new_zeros(2, k) for key in q}
    for m, name in enumerate(names):
        keys = [(t, row) for t, row in q if name in terms[t].reconstructs and row in rows_with[name]]
        if keys:
            latents = torch.cat([z[key] for key in keys])
            x = batch[name][[row for _, row in keys for _ in range(k)]]
            by_weights = distribution(model.likelihood(name), latents.detach()).log_prob(x).view(-1, k)
            by_latents = distribution(frozen.likelihood(name), latents).log_prob(x).view(-1, k)
            for key, *nats in zip(keys, by_weights, by_latents, strict=True):
                scores[key] = scores[key] + (weights or {}).get(name, 1.0) * torch.stack(nats)
                log_prob[key[0], m] += nats[0].mean().detach()
                n_log_prob[key[0], m] += 1

    loss = noise.new_zeros(())
    for (t, row), (by_weights, by_latents) in scores.items():
        one, draws = q[t, row], z[t, row]
        if k > 1 and iw in terms[t].inputs and row in rows_with[str(iw)]:
            fixed = distributions.Normal(one.mean.detach(), one.stddev.detach())
            log_ratio = (prior.log_prob(draws) - fixed.log_prob(draws)).sum(dim=-1)
            log_w = (by_weights + beta * log_ratio).detach()
            share = log_w.softmax(dim=0)
            gradient = (share * by_weights).sum()
            gradient = gradient + (share * (1 - beta + beta * share) * (by_latents + beta * log_ratio)).sum()
            bound = log_w.exp().mean().log() + gradient - gradient.detach()
        else:
            bound = (by_weights + by_latents - by_latents.detach()).mean()
            bound = bound - beta * distributions.kl_divergence(one, prior).sum()
        loss = loss - bound
    return loss / n, Totals(tuple(labels), names, loss.detach(), torch.tensor(float(n)), log_prob, n_log_prob, kl, n_kl)
