"""The training objective: a sum of evidence lower bounds, each given some modalities and scoring some."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import experts
from .errors import UsageError
from .model import MVAE, Batch


class Term(NamedTuple):
    """One ELBO: the modalities its posterior is given, and those that it scores."""

    given: tuple[str, ...]
    scored: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(self.given)


class Totals(NamedTuple):
    """Sums over a batch's examples, for reports: never scaled by λ or β.

    log_prob, n_log_prob: (terms, modalities), nats scored and the examples that were scored.
    kl, n_kl: (terms,), nats of KL(q || p) and the examples that had something given.
    """

    log_prob: Tensor
    n_log_prob: Tensor
    kl: Tensor
    n_kl: Tensor


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
    """

    given: Tensor
    scored: Tensor
    weights: Tensor

    def __init__(
        self, model: MVAE, *, weights: Mapping[str, float] | None = None, reconstruct: str | Iterable[str] = "given"
    ):
        super().__init__()
        extra = (
            {"given": (), "all": model.modalities}.get(reconstruct)
            if isinstance(reconstruct, str)
            else tuple(reconstruct)
        )
        if extra is None:
            names = ", ".join(model.modalities)
            raise UsageError(f"not {reconstruct}: reconstruct is given, all, or a list of {names}")
        model.check_names(*extra, *(weights or {}))
        self.model = model
        self.extra = frozenset(extra)
        singles = [(name,) for name in model.modalities] if len(model.modalities) > 1 else []
        self.terms = [self.term(given) for given in [model.modalities, *singles]]
        for field in ("given", "scored"):
            self.register_buffer(field, self._mask(getattr(term, field) for term in self.terms), persistent=False)
        λ = torch.tensor([float((weights or {}).get(name, 1.0)) for name in model.modalities])
        self.register_buffer("weights", λ, persistent=False)

    def term(self, given: Iterable[str]) -> Term:
        """The term that is given these modalities, with what it scores by `reconstruct`."""
        given = frozenset(given)
        self.model.check_names(*given)
        in_order = self.model.modalities
        return Term(tuple(n for n in in_order if n in given), tuple(n for n in in_order if n in given | self.extra))

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
        """The loss of a batch: the negative objective in nats, a mean over its examples; and its parts.

        Each modality is encoded once, every posterior comes from one masked product of experts, and each term decodes
        just what it scores. A term given nothing of an example has posterior = prior and scores nothing: it adds 0.

        Args:
            batch: tensors by modality, each (batch, *event); an absent example's row may hold any finite value.
            beta: the weight of the KL divergence.
            subsets: further terms' given modalities (see `random_subsets`).
            present: bool (batch,) by modality: which examples have it; a modality that isn't named is always there.
            noise: (terms, batch, latents) standard normal; drawn when None.
        """
        given, scored, terms = self.given, self.scored, self.terms
        if subsets:
            more = [self.term(subset) for subset in subsets]
            terms = terms + more
            given = torch.cat([given, self._mask(t.given for t in more).to(given.device)])
            scored = torch.cat([scored, self._mask(t.scored for t in more).to(given.device)])
        given, scored, mask, here = given.unsqueeze(-1), scored.unsqueeze(-1), None, None
        n = len(next(iter(batch.values())))
        if present is not None:
            self.model.check_names(*present)
            always = torch.ones(n, dtype=torch.bool, device=given.device)
            here = torch.stack([present.get(name, always) for name in self.model.modalities])
            given = given & here
            scored = mask = scored & here & given.any(dim=1, keepdim=True)

        mu, logvar = experts.product(*self.model.encode(batch, here), given)
        z = experts.draw(mu, logvar, torch.randn_like(mu) if noise is None else noise)
        log_prob = self.model.log_prob(z, batch, [term.scored for term in terms], mask)
        kl = experts.kl_to_prior(mu, logvar)
        elbo = (log_prob * self.weights.unsqueeze(-1)).sum(dim=1) - beta * kl

        shape = (len(terms), len(self.model.modalities), n)
        counts = scored.expand(shape).sum(dim=2), given.expand(shape).any(dim=1).sum(dim=1)
        totals = Totals(log_prob.sum(dim=2), counts[0], kl.sum(dim=1), counts[1])
        return -elbo.sum(dim=0).mean(), Totals(*(part.detach() for part in totals))
