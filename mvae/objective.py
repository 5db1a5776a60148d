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
    """

    given: Tensor
    scored: Tensor
    weights: Tensor

    def __init__(
        self,
        model: MVAE,
        *,
        weights: Mapping[str, float] | None = None,
        reconstruct: str | Iterable[str] = "given",
        terms: Iterable[Term] | None = None,
    ):
        super().__init__()
        modalities = model.modalities
        named = {"given": (), "all": modalities}
        extra = named.get(reconstruct) if isinstance(reconstruct, str) else tuple(reconstruct)
        if extra is None:
            names = ", ".join(modalities)
            raise UsageError(f"not {reconstruct}: `reconstruct` is given, all, or a list of {names}")
        model.check_names(*extra, *(weights or {}))
        self.model = model
        self.extra = frozenset(extra)
        if terms is None:
            singles = [(name,) for name in modalities] if len(modalities) > 1 else []
            terms = [Term(given, given) for given in [modalities, *singles]]
        self.terms = [self._in_order(term) for term in terms]
        self.names = tuple(JOINT if t.given == modalities else "+".join(t.given) for t in self.terms)
        if len(set(self.names)) < len(self.names) or SUBSET in self.names:
            raise UsageError(f"the terms are given {', '.join(self.names)}: each needs a name unlike the others'")
        for field in ("given", "scored"):
            self.register_buffer(field, self._mask(getattr(term, field) for term in self.terms), persistent=False)
        λ = torch.tensor([float((weights or {}).get(name, 1.0)) for name in modalities])
        for name, weight in zip(modalities, λ.tolist(), strict=True):
            if not 0 <= weight < math.inf:
                raise UsageError(f"the weight of {name} in `weights` is {weight:g}, and a number, 0 or more, is wanted")
        self.register_buffer("weights", λ, persistent=False)

    def checksum(self) -> str:
        """A CRC-32 of the terms and of λ: two objectives with the same one ask for the same."""
        return f"{zlib.crc32(repr((self.terms, self.weights.tolist())).encode()):08x}"

    def _in_order(self, term: Term) -> Term:
        """The term with its names in the model's order, scoring `reconstruct`, too."""
        self.model.check_names(*term.given, *term.scored)
        given, scored = set(term.given), {*term.scored, *self.extra}
        in_order = self.model.modalities
        return Term(tuple(n for n in in_order if n in given), tuple(n for n in in_order if n in scored))

    def _mask(self, subsets: Iterable[Sequence[str]]) -> Tensor:
        return torch.tensor([[name in subset for name in self.model.modalities] for subset in subsets])

    def forward(
        self,
        batch: Batch,
        beta: Tensor | float = 1.0,
        subsets: Sequence[Sequence[str]] = (),
        present: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Totals]:
        """The loss of a batch: the negative objective in nats, a mean over its examples; and the sums of its parts.

        A term given nothing of an example has the prior for posterior and scores nothing: it adds 0.

        Args:
            batch: tensors by modality, each (batch, *event); an absent example's row may hold any finite value.
            beta: the weight of the KL divergence.
            subsets: the modalities that further terms are given and score (see `random_subsets`).
            present: bool (batch,) by modality: which examples have it; a modality that isn't named is always there.
            noise: (terms, batch, latents) standard normal; drawn when None.
        """
        given, scored, terms = self.given, self.scored, self.terms
        if subsets:
            more = [self._in_order(Term(tuple(subset), tuple(subset))) for subset in subsets]
            terms = terms + more
            given = torch.cat([given, self._mask(t.given for t in more).to(given.device)])
            scored = torch.cat([scored, self._mask(t.scored for t in more).to(given.device)])
        # Two masks say all of it: which experts a term's posterior takes, and which log-probabilities it counts.
        given, scored, mask = given.unsqueeze(-1), scored.unsqueeze(-1), None
        n = len(next(iter(batch.values())))
        lacking = [name for name in self.model.modalities if name not in batch]
        if lacking:
            raise UsageError(f"this batch lacks {', '.join(lacking)}; an example may lack a modality by `present`")
        here = self.model.which(batch, present)
        if here is not None:  # an expert or a score counts for the examples that have the modality
            given = given & here
            scored = mask = scored & here & given.any(dim=1, keepdim=True)

        # Each modality is encoded once for all terms; all posteriors come from one masked fusion.
        mu, logvar = self.model.fuse(*self.model.encode(batch, here), given)
        z = experts.draw(mu, logvar, torch.randn_like(mu) if noise is None else noise)
        # Each term decodes just what it scores; a modality's terms go through its decoder together.
        log_prob = self.model.log_prob(z, batch, [term.scored for term in terms], mask)
        kl = experts.kl_to_prior(mu, logvar)
        elbo = (log_prob * self.weights.unsqueeze(-1)).sum(dim=1) - beta * kl
        loss = -elbo.sum(dim=0).mean()

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
