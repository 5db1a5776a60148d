"""The training objective: a sum of evidence lower bounds, each given some modalities and scoring some."""

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
from .stats import JOINT, SUBSET, Totals


class Term(NamedTuple):
    """One ELBO: the modalities its posterior is given, and those that it scores."""

    given: tuple[str, ...]
    scored: tuple[str, ...]


def random_subsets(modalities: Sequence[str], k: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """k random subsets of 2..N-1 modalities: the size drawn uniformly, then a subset of that size uniformly.

    Raises UsageError if k > 0 and there are fewer than 3 modalities, where no such subset exists.
    """
    if k and len(modalities) < 3:
        raise UsageError(f"random subsets have 2 to N-1 modalities, and there are only N = {len(modalities)}")
    subsets = []
    for _ in range(k):
        size = rng.integers(2, len(modalities))
        chosen = set(rng.permutation(len(modalities))[:size].tolist())
        subsets.append(tuple(name for m, name in enumerate(modalities) if m in chosen))
    return subsets


class Objective(nn.Module):
    """The negative sum of a step's ELBO terms: ELBO(all) + sum_i ELBO({x_i}) + ELBO(further subsets).

    ELBO(X) = E_q(z|X)[sum over the scored i of λ_i log p(x_i | z)] - β KL(q(z|X) || p(z))
    (Wu & Goodman 2018, equations 3 and 4). The paper's terms score what they are given. A term that scores a modality
    it was not given bounds the log-probability of what it scores, under the posterior of what it was given.

    Args:
        model: the MVAE.
        weights: λ by modality name; 1 where absent.
        reconstruct: what every term scores beside what it was given: "given" (nothing more), "all", or names.
        terms: the terms of each step in place of the paper's; each scores what it says, and `reconstruct`.
        iw_samples: K, the draws of z in each term. With more than one, the bound of a term that is given the first
            modality, the picture, is E[log 1/K sum_k w_k], w = exp(sum of λ_i log p(x_i | z)) (p(z) / q(z | X))^β
            (Burda et al. 2016, equation 8, where λ = β = 1), and the posterior's gradient is the doubly
            reparameterised one (Tucker et al. 2019). The other terms stay ELBOs, of K draws: their bound would be as
            content with one good draw of K, and a q(z | label) that wide gives pictures of other labels, too.

    Raises UsageError for an unknown name, a λ below 0, no draw, or terms that are none or alike.
    """

    given: Tensor
    scored: Tensor
    also: Tensor
    weights: Tensor
    keys: Tensor

    def __init__(
        self,
        model: MVAE,
        *,
        weights: Mapping[str, float] | None = None,
        reconstruct: str | Iterable[str] = "given",
        terms: Iterable[Term] | None = None,
        iw_samples: int = 1,
    ):
        super().__init__()
        modalities = model.modalities
        named = {"given": (), "all": modalities}
        extra = named.get(reconstruct) if isinstance(reconstruct, str) else tuple(reconstruct)
        if extra is None:
            names = ", ".join(modalities)
            raise UsageError(f"not {reconstruct}: `reconstruct` is given, all, or a list of {names}")
        model.check_names(*extra, *(weights or {}))
        if iw_samples < 1:
            raise UsageError(f"`iw_samples` is 1 or more, not {iw_samples}")
        self.model = model
        self.iw_samples = iw_samples
        self.extra = frozenset(extra)
        if terms is None:
            singles = [(name,) for name in modalities] if len(modalities) > 1 else []
            terms = [Term(given, given) for given in [modalities, *singles]]
        self.terms = [self._in_order(term) for term in terms]
        if not self.terms:
            raise UsageError("`terms` are none, and one or more are wanted")
        self.names = tuple(JOINT if t.given == modalities else "+".join(t.given) for t in self.terms)
        if len(set(self.names)) < len(self.names) or SUBSET in self.names:
            raise UsageError(f"the terms are given {', '.join(self.names)}: each needs a name unlike the others'")
        for field in ("given", "scored"):
            self.register_buffer(field, self.mask(getattr(term, field) for term in self.terms), persistent=False)
        self.register_buffer("also", self.mask([tuple(self.extra)]), persistent=False)
        λ = torch.tensor([float((weights or {}).get(name, 1.0)) for name in modalities])
        for name, weight in zip(modalities, λ.tolist(), strict=True):
            if not 0 <= weight < math.inf:
                raise UsageError(f"the weight of {name} in `weights` is {weight:g}, and a number, 0 or more, is wanted")
        self.register_buffer("weights", λ, persistent=False)
        keys = torch.randint(2**63 - 1, (2, len(modalities), 1), generator=torch.Generator().manual_seed(0))
        self.register_buffer("keys", keys, persistent=False)

    def checksum(self) -> str:
        """A CRC-32 of the terms, what all score, λ and the importance samples: it tells two objectives apart."""
        asked = (self.terms, sorted(self.extra), self.weights.tolist(), self.iw_samples)
        return f"{zlib.crc32(repr(asked).encode()):08x}"

    def _in_order(self, term: Term) -> Term:
        """The term with its names in the model's order, scoring `reconstruct`, too."""
        self.model.check_names(*term.given, *term.scored)
        if not term.given:
            raise UsageError("a term is given no modality, and one or more are wanted")
        given, scored = set(term.given), {*term.scored, *self.extra}
        in_order = self.model.modalities
        return Term(tuple(n for n in in_order if n in given), tuple(n for n in in_order if n in scored))

    def mask(self, subsets: Iterable[Sequence[str]]) -> Tensor:
        """Which modalities are in which subset: bool (subsets, modalities)."""
        return torch.tensor([[name in subset for name in self.model.modalities] for subset in subsets])

    def _posteriors(
        self, terms: Sequence[Term], encoded: Sequence[str], mu: Tensor, logvar: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q(z | given) of each term: mu, logvar, each (terms, batch, latents).

        A term costs what it is given: terms with as many experts as each other are fused together, as a batch of the
        examples of all of them.

        Args:
            mu, logvar: the experts of the modalities `encoded`, each (experts, batch, latents).
            given: None, or bool (terms, modalities, batch): which examples have the expert, and count for the term.
        """
        alike: dict[int, list[int]] = {}
        for t, term in enumerate(terms):
            alike.setdefault(len(term.given), []).append(t)
        order = {name: m for m, name in enumerate(self.model.modalities)}
        place = {name: i for i, name in enumerate(encoded)}
        found = []
        for n_experts, members in alike.items():
            pairs = [(t, terms[t].given[i]) for i in range(n_experts) for t in members]
            size = (n_experts, len(members) * mu.shape[1])
            which = [place[name] for _, name in pairs]
            some_mu, some_logvar = (_taken(part, which).reshape(*size, -1) for part in (mu, logvar))
            present = given
            if given is not None:
                present = torch.stack([given[t, order[name]] for t, name in pairs]).view(1, *size)
            fused = self.model.fuse(some_mu, some_logvar, present)
            found.append([part.view(len(members), *mu.shape[1:]) for part in fused])
        made = [t for members in alike.values() for t in members]
        back = sorted(range(len(made)), key=made.__getitem__)
        mu, logvar = (_taken(torch.cat(parts), back) for parts in zip(*found, strict=True))
        return mu, logvar

    def noise(self, n: int, n_subsets: int = 0) -> Tensor:
        """Standard normal numbers for a batch of n examples, in the shape that `forward` takes."""
        several = [self.iw_samples] if self.iw_samples > 1 else []
        weight = next(self.model.parameters())
        shape = [*several, len(self.terms) + n_subsets, n, self.model.n_latents]
        return torch.randn(shape, dtype=weight.dtype, device=weight.device)

    def forward(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Sequence[Sequence[str]] | Tensor = (),
        present: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Totals]:
        """The loss of a batch: the negative objective in nats, a mean over its examples; and the sums of its parts.

        A term given nothing of an example has the prior for posterior and scores nothing: it adds 0. So does one that
        lacks modalities of an example, and is thereby given and scores the same as another: for an example with one
        modality the joint term would be that modality's again.

        Args:
            batch: tensors by modality, each (batch, *event); an absent example's row may hold any finite value.
            beta: the weight of the KL divergence.
            subsets: the modalities that further terms are given and score (see `random_subsets`). As a mask, bool
                (subsets, modalities), any subsets have the same shapes.
            present: bool (batch,) by modality: which examples have it; a modality that isn't named is always there.
            noise: standard normal, (terms, batch, latents), and one more dimension (iw_samples, ...) before them if
                there are several; drawn when None.
        """
        given, scored, terms = self.given, self.scored, self.terms
        if isinstance(subsets, Tensor):
            terms = terms + [Term(self.model.modalities, self.model.modalities)] * len(subsets)
            given, scored = torch.cat([given, subsets]), torch.cat([scored, subsets | self.also])
        elif subsets:
            more = [self._in_order(Term(tuple(subset), tuple(subset))) for subset in subsets]
            terms = terms + more
            given = torch.cat([given, self.mask(t.given for t in more).to(given.device)])
            scored = torch.cat([scored, self.mask(t.scored for t in more).to(given.device)])
        # Two masks say all of it: which experts a term's posterior takes, and which log-probabilities it counts.
        given, scored, mask = given.unsqueeze(-1), scored.unsqueeze(-1), None
        n = len(next(iter(batch.values())))
        lacking = [name for name in self.model.modalities if name not in batch]
        if lacking:
            raise UsageError(f"this batch lacks {', '.join(lacking)}; an example may lack a modality by `present`")
        here = self.model.which(batch, present)
        # Each modality is encoded once for all terms; one that none is given isn't shown to its encoder's batch norm.
        encoded = {name: batch[name] for name in self.model.modalities if any(name in term.given for term in terms)}
        which = [m for m, name in enumerate(self.model.modalities) if name in encoded]
        mu, logvar = self.model.encode(encoded, here if here is None else _taken(here, which))
        if here is None and isinstance(subsets, Tensor):
            here = torch.ones(len(self.model.modalities), n, dtype=torch.bool, device=mu.device)
        if here is not None:  # an expert or a score counts for the examples that have the modality
            lost = (given & ~here).any(dim=1)
            given = given & here
            scored = scored & here & given.any(dim=1, keepdim=True)
            fresh = ~_again(given, scored, lost, self.keys)
            given, scored = given & fresh, scored & fresh
            mask = scored

        mu, logvar = self._posteriors(terms, [*encoded], mu, logvar, None if here is None else given)
        k = self.iw_samples
        if noise is None:
            noise = self.noise(n, len(subsets))
        z = experts.draw(mu, logvar, noise).flatten(0, -3)  # (k * terms, batch, latents)
        # Each term decodes just what it scores; a modality's terms (and draws) go through its decoder together.
        mask = mask if mask is None else mask.repeat(k, 1, 1)
        log_prob = self.model.log_prob(z, batch, [term.scored for term in terms] * k, mask)
        kl = experts.kl_to_prior(mu, logvar)
        scores = (log_prob * self.weights.unsqueeze(-1)).sum(dim=1)
        log_prob = log_prob.unflatten(0, (k, -1)).mean(dim=0)
        bound = scores.unflatten(0, (k, -1)).mean(dim=0) - beta * kl
        if k > 1:
            with_picture = given[:, 0]  # (terms, 1), or (terms, batch) where examples lack modalities
            weighted = _importance_weighted(scores, z, mu, logvar, beta, k, with_picture)
            bound = torch.where(with_picture, weighted, bound)
        loss = -bound.sum(dim=0).mean()

        shape = (len(terms), len(self.model.modalities), n)
        parts = (
            loss * n,
            torch.full_like(loss, n),
            log_prob.sum(dim=2),
            scored.expand(shape).sum(dim=2),
            kl.sum(dim=1),
            given.expand(shape).any(dim=1).sum(dim=1),
        )
        names = self.names + (SUBSET,) * len(subsets)
        return loss, Totals(names, self.model.modalities, *(part.detach() for part in parts))


def _importance_weighted(
    scores: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor | float, k: int, where: Tensor
) -> Tensor:
    """log 1/k sum_k w_k of each term and example, (terms, batch), with the doubly reparameterised gradient.

    Args:
        scores: (k * terms, batch), the log-probabilities with λ.
        z: (k * terms, batch, latents), draws from N(mu, exp(logvar)), each (terms, batch, latents).
        where: bool (terms, 1 or batch), where the result is used; elsewhere the gradient of z stays as it comes.
    """
    # The posterior's parameters get their gradient through z alone, ...
    fixed_mu, fixed_logvar = mu.detach(), logvar.detach()
    draws = z.unflatten(0, (k, -1))
    log_q = experts.log_standard_normal((draws - fixed_mu) * (-0.5 * fixed_logvar).exp()) - 0.5 * fixed_logvar.sum(-1)
    log_w = scores.unflatten(0, (k, -1)) + beta * (experts.log_standard_normal(draws) - log_q)
    share = log_w.detach().softmax(dim=0)
    surrogate = (share * log_w).sum(dim=0)
    # ... where the score that this leaves out, -β share d log q, comes through z too: -β share (1 - share) d log w / dz
    # (Tucker et al. 2019, equation 8, where β = 1). So z gets share (1 - β + β share) in place of the decoders' share.
    factor = torch.where(where, 1 - beta + beta * share, 1.0).flatten(0, 1).unsqueeze(-1)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * factor)
    return surrogate + (log_w.logsumexp(dim=0) - math.log(k) - surrogate).detach()


def _again(given: Tensor, scored: Tensor, lost: Tensor, keys: Tensor) -> Tensor:
    """Which terms repeat another, (terms, 1, batch), of masks (terms, modalities, batch) of what is given and scored.

    Of terms that are the same, those that have lost nothing count, or else the last of them. Sets are compared by their
    sums of `keys`, (2, modalities, 1) random 63-bit numbers for what is given and scored.

    Args:
        lost: bool (terms, batch), which terms lack a modality of an example.
    """
    key = (given * keys[0] + scored * keys[1]).sum(dim=1)  # an overflow wraps, which is as good
    later = torch.ones(len(key), len(key), dtype=torch.bool, device=key.device).triu(1).unsqueeze(-1)
    rather = later | ~lost  # [t, u]: u is the one to count; a term that has lost something isn't itself among these
    return (lost & ((key.unsqueeze(1) == key) & rather).any(dim=1)).unsqueeze(1)


def _taken(parts: Tensor, which: Sequence[int]) -> Tensor:
    """The parts `which` along the first dimension. All of them in order aren't copied; no index goes to a device."""
    if [*which] == [*range(len(parts))]:
        return parts
    each = parts.unbind()
    return torch.stack([each[i] for i in which]) if which else parts[:0]
