"""The training objective: a sum of evidence lower bounds, each conditioned on some modalities."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import experts
from .errors import UsageError
from .model import MVAE, Batch

JOINT, SUBSET = "joint", "subset"
"""Names of the term whose inputs are all modalities, and of all terms of random subsets together."""


class Term(NamedTuple):
    """One ELBO: E_q(z|inputs)[sum over the reconstructed i of λ_i log p(x_i | z)] - β KL(q(z|inputs) || p(z)).

    It bounds log p(what it reconstructs). In the paper a term reconstructs its inputs.
    """

    inputs: tuple[str, ...]
    reconstructs: tuple[str, ...]


def random_subsets(n_modalities: int, k: int, rng: np.random.Generator) -> Tensor:
    """Draw k subsets of 2..N-1 modalities, bool (k, N): the size uniformly, then a subset of that size uniformly.

    Raises UsageError if k > 0 and N < 3, where there is no such subset.
    """
    if k and n_modalities < 3:
        raise UsageError(f"random subsets have 2 to N-1 modalities, which needs N >= 3, got N = {n_modalities}")
    mask = torch.zeros(k, n_modalities, dtype=torch.bool)
    for subset in mask:
        size = rng.integers(2, n_modalities)
        subset[rng.permutation(n_modalities)[:size].tolist()] = True
    return mask


class Objective(nn.Module):
    """The negative sum of a step's ELBO terms (Wu & Goodman 2018, equations 3 and 4).

    Args:
        model: the MVAE.
        terms: default: the paper's, ELBO(all) and ELBO({x_i}) of each modality.
        weights: λ by modality name, by default 1.
        iw_samples: K, the draws of z in each term. With K > 1 the bound given the modality `iw` is
            E[log 1/K sum_k w_k], w = exp(sum of λ_i log p(x_i | z)) (p(z) / q(z | X))^β (Burda et al. 2016, equation 8,
            where λ = β = 1), and the posterior's gradient is the doubly reparameterised one (Tucker et al. 2019). The
            other terms are ELBOs averaged over K draws. Don't weight terms conditioned on a label alone: one good draw
            of K satisfies such a bound, and q(z | label) becomes so wide that it yields images of other labels.
        iw: the modality of importance-weighted bounds, usually the image (default: none).
        subset_also: what terms of random subsets reconstruct in addition to their inputs.

    Raises UsageError for an unknown name, a negative λ, K < 1, or terms without inputs or with the same inputs.
    """

    inputs: Tensor
    outputs: Tensor
    subset_outputs: Tensor
    weights: Tensor

    def __init__(
        self,
        model: MVAE,
        terms: Iterable[Term] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        iw_samples: int = 1,
        iw: str | None = None,
        subset_also: Sequence[str] = (),
    ):
        super().__init__()
        modalities = model.modalities
        if terms is None:
            singles = [(name,) for name in modalities] if len(modalities) > 1 else []
            terms = [Term(names, names) for names in (modalities, *singles)]
        self.model, self.iw_samples = model, iw_samples
        self.terms, self.subset_also = [self._in_order(term) for term in terms], tuple(subset_also)
        if not self.terms or not all(term.inputs for term in self.terms):
            raise UsageError("terms must be one or more, each with one or more inputs")
        self.names = tuple(JOINT if t.inputs == modalities else "+".join(t.inputs) for t in self.terms)
        if len(set(self.names)) < len(self.names) or SUBSET in self.names:
            raise UsageError(f"terms must have different inputs, got {', '.join(self.names)}")
        model.check_names(*(weights or {}), *subset_also, *([iw] if iw else []))
        self.iw = modalities.index(iw) if iw else None
        λ = torch.tensor([float((weights or {}).get(name, 1.0)) for name in modalities])
        if not (λ.isfinite() & (λ >= 0)).all():
            raise UsageError(f"weights must be finite and >= 0, got {dict(weights or {})}")
        if iw_samples < 1:
            raise UsageError(f"iw_samples must be >= 1, got {iw_samples}")
        self.register_buffer("inputs", self._mask(term.inputs for term in self.terms), persistent=False)
        self.register_buffer("outputs", self._mask(term.reconstructs for term in self.terms), persistent=False)
        self.register_buffer("subset_outputs", self._mask([subset_also]), persistent=False)
        self.register_buffer("weights", λ, persistent=False)

    def _in_order(self, term: Term) -> Term:
        """Return the term with its names in the model's order."""
        self.model.check_names(*term.inputs, *term.reconstructs)
        return Term(*(tuple(n for n in self.model.modalities if n in names) for names in term))

    def _mask(self, sets: Iterable[Sequence[str]]) -> Tensor:
        """Return bool (sets, modalities)."""
        return torch.tensor([[name in names for name in self.model.modalities] for names in sets])

    def checksum(self) -> str:
        """Return a CRC-32 of terms, λ and importance samples, which tells two objectives apart."""
        content = (self.terms, self.subset_also, self.weights.tolist(), self.iw_samples, self.iw)
        return f"{zlib.crc32(repr(content).encode()):08x}"

    def noise(self, n: int, n_subsets: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard normal noise for n examples: (terms, n, latents), or (K, terms, n, latents) for K > 1 draws."""
        draws = [self.iw_samples] if self.iw_samples > 1 else []
        weight = next(self.model.parameters())
        shape = [*draws, len(self.terms) + n_subsets, n, self.model.n_latents]
        return torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)

    def forward(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, "Totals"]:
        """Return the loss of a batch, the negative objective in nats per example, and the sums of its parts.

        For an example that lacks inputs of a term, the term has those that are left. A term without any adds 0, and so
        does one that now repeats another: the joint term of an example with one modality is that modality's again.

        Args:
            batch: tensors by modality, each (batch, *event); an absent example's row may hold any finite value.
            beta: weight of the KL divergence.
            subsets: bool (subsets, modalities), inputs of further terms; see `random_subsets`.
            present: bool (batch,) by modality: which examples have it (default: all).
            noise: as `noise` draws it (default: drawn).
        """
        model, k = self.model, self.iw_samples
        lacking = [name for name in model.modalities if name not in batch]
        if lacking:
            raise UsageError(f"the batch lacks {', '.join(lacking)}; examples may lack a modality by `present`")
        subsets = self.inputs[:0] if subsets is None else subsets
        n_subsets = len(subsets)
        inputs = torch.cat([self.inputs, subsets])
        outputs = torch.cat([self.outputs, subsets | self.subset_outputs])

        # Two masks, (terms, modalities, batch), say everything: which experts a term's posterior takes, and which
        # log-probabilities it counts.
        here = model.presence(batch, present)
        incomplete = (inputs.unsqueeze(-1) & ~here).any(dim=1)
        inputs = inputs.unsqueeze(-1) & here
        outputs = outputs.unsqueeze(-1) & here & inputs.any(dim=1, keepdim=True)
        repeated = _repeats(inputs, outputs, incomplete)
        inputs, outputs = inputs & ~repeated, outputs & ~repeated

        # Each modality is encoded once for all terms. One that is no term's input isn't: its batch norm would learn it.
        taken = {name for term in self.terms for name in term.inputs} if not n_subsets else set(model.modalities)
        mu, logvar = model.encode({name: batch[name] for name in model.modalities if name in taken}, here)
        mu, logvar = model.fuse(mu, logvar, inputs)  # (terms, batch, latents)
        if noise is None:
            noise = self.noise(here.shape[1], n_subsets)
        z = experts.draw(mu, logvar, noise).flatten(0, -3)  # (K * terms, batch, latents)
        # With fixed shapes a term costs what it may reconstruct, so that is known without looking at the masks.
        decoded = [term.reconstructs for term in self.terms] + [model.modalities] * n_subsets
        log_prob = model.log_prob(z, batch, decoded * k, outputs.repeat(k, 1, 1))
        kl = experts.kl_to_prior(mu, logvar)
        weighted = (log_prob * self.weights.unsqueeze(-1)).sum(dim=1)
        log_prob = log_prob.unflatten(0, (k, -1)).mean(dim=0)
        bound = weighted.unflatten(0, (k, -1)).mean(dim=0) - beta * kl
        if k > 1 and self.iw is not None:
            where = inputs[:, self.iw]
            bound = torch.where(where, _importance_weighted(weighted, z, mu, logvar, beta, k, where), bound)
        loss = -bound.sum(dim=0).mean()

        n = torch.full_like(loss, here.shape[1])
        n_log_prob, n_kl = (mask.sum(dim=-1, dtype=loss.dtype) for mask in (outputs, inputs.any(dim=1)))
        parts = (loss * n, n, log_prob.sum(dim=2), n_log_prob, kl.sum(dim=1), n_kl)
        names = self.names + (SUBSET,) * n_subsets
        return loss, Totals(names, model.modalities, *(part.detach() for part in parts))


def _repeats(inputs: Tensor, outputs: Tensor, incomplete: Tensor) -> Tensor:
    """Return which terms repeat another, bool (terms, 1, batch), by the masks (terms, modalities, batch).

    Of equal terms those with all their inputs count, or else the last. incomplete: bool (terms, batch).
    """
    equal = ((inputs.unsqueeze(1) == inputs) & (outputs.unsqueeze(1) == outputs)).all(dim=2)  # (terms, terms, batch)
    later = torch.ones(len(inputs), len(inputs), dtype=torch.bool, device=inputs.device).triu(1).unsqueeze(-1)
    return (incomplete & (equal & (later | ~incomplete)).any(dim=1)).unsqueeze(1)


def _importance_weighted(
    weighted: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor | float, k: int, where: Tensor
) -> Tensor:
    """Return log 1/K sum_k w_k of each term and example, (terms, batch), with the doubly reparameterised gradient.

    Args:
        weighted: (K * terms, batch), the log-probabilities times λ.
        z: (K * terms, batch, latents), draws from N(mu, exp(logvar)), each (terms, batch, latents).
        where: bool (terms, batch), where the result is used; elsewhere the gradient of z isn't changed.
    """
    # The posterior's parameters get their gradient through z alone, ...
    fixed_mu, fixed_logvar = mu.detach(), logvar.detach()
    draws = z.unflatten(0, (k, -1))
    log_q = experts.log_standard_normal((draws - fixed_mu) * (-0.5 * fixed_logvar).exp()) - 0.5 * fixed_logvar.sum(-1)
    log_w = weighted.unflatten(0, (k, -1)) + beta * (experts.log_standard_normal(draws) - log_q)
    share = log_w.detach().softmax(dim=0)
    surrogate = (share * log_w).sum(dim=0)
    # ... where the score that this leaves out, -β share d log q, comes through z too: -β share (1 - share) d log w / dz
    # (Tucker et al. 2019, equation 8, where β = 1). So z gets share (1 - β + β share) instead of the decoders' share.
    factor = torch.where(where, 1 - beta + beta * share, 1.0).flatten(0, 1).unsqueeze(-1)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * factor)
    return surrogate + (log_w.logsumexp(dim=0) - math.log(k) - surrogate).detach()


class Totals(NamedTuple):
    """Sums over the examples of a batch, or of many batches: what a step's loss is made of.

    terms: names of the T terms; SUBSET may occur several times.
    modalities: names of the M modalities.
    loss, n: (), the loss (with λ and β) in nats, and the examples.
    log_prob, n_log_prob: (T, M), log p(x | z) in nats without λ, and the examples that were reconstructed.
    kl, n_kl: (T,), KL(q || p) in nats without β, and the examples that had an input.
    """

    terms: tuple[str, ...]
    modalities: tuple[str, ...]
    loss: Tensor
    n: Tensor
    log_prob: Tensor
    n_log_prob: Tensor
    kl: Tensor
    n_kl: Tensor

    def vector(self) -> Tensor:
        """Return all sums as one float64 vector: vectors of the same terms add up over batches and processes."""
        return torch.cat([part.flatten() for part in self[2:]]).double()

    @classmethod
    def of(cls, vector: Tensor, terms: tuple[str, ...], modalities: tuple[str, ...]) -> "Totals":
        """Return the sums that `vector` holds."""
        n_terms, n_scores = len(terms), len(terms) * len(modalities)
        loss, n, log_prob, n_log_prob, kl, n_kl = vector.split([1, 1, n_scores, n_scores, n_terms, n_terms])
        shape = n_terms, len(modalities)
        return cls(terms, modalities, loss[0], n[0], log_prob.view(shape), n_log_prob.view(shape), kl, n_kl)

    def means(self) -> dict[str, float]:
        """Return nats per example by name: `loss`, and for each term `TERM/elbo`, `TERM/kl`, `TERM/log_prob/MODALITY`.

        The ELBO is the sum of the log-probabilities less the KL divergence, without λ and β. Each is a mean over the
        examples that contribute to it; what no example contributes to is left out.
        """
        found = {"loss": (self.loss / self.n).item()}
        for term in dict.fromkeys(self.terms):
            which = [t for t, name in enumerate(self.terms) if name == term]
            log_prob, n_log_prob = (part[which].sum(dim=0).tolist() for part in (self.log_prob, self.n_log_prob))
            kl, n_kl = self.kl[which].sum().item(), self.n_kl[which].sum().item()
            if n_kl:
                found[f"{term}/elbo"] = (sum(log_prob) - kl) / n_kl
                found[f"{term}/kl"] = kl / n_kl
            for name, total, n in zip(self.modalities, log_prob, n_log_prob, strict=True):
                if n:
                    found[f"{term}/log_prob/{name}"] = total / n
        return found
