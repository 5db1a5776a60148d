"""The numbers of a step and of an epoch, by names: sums over examples, their means, and what isn't finite."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

JOINT, SUBSET = "joint", "subset"
"""The names of the term that is given every modality, and of all terms of random subsets together."""


class Totals(NamedTuple):
    """Sums over the examples of a batch, or of many batches.

    terms: the T terms' names; SUBSET may stand several times.
    modalities: the M modalities' names.
    loss, n: (), the loss (with λ and β) in nats, and the examples.
    log_prob, n_log_prob: (T, M), log p(x | z) in nats without λ, and the examples that were scored.
    kl, n_kl: (T,), KL(q || p) in nats without β, and the examples that had something given.
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
        """All the sums as one float64 vector: vectors of the same terms add up over batches and processes."""
        return torch.cat([part.double().flatten() for part in self[2:]])

    @classmethod
    def of(cls, vector: Tensor, terms: tuple[str, ...], modalities: tuple[str, ...]) -> "Totals":
        """The sums that `vector` holds."""
        n_terms, n_scores = len(terms), len(terms) * len(modalities)
        loss, n, log_prob, n_log_prob, kl, n_kl = vector.split([1, 1, n_scores, n_scores, n_terms, n_terms])
        shape = n_terms, len(modalities)
        return cls(terms, modalities, loss[0], n[0], log_prob.view(shape), n_log_prob.view(shape), kl, n_kl)

    @classmethod
    def zeros(cls, terms: tuple[str, ...], modalities: tuple[str, ...]) -> "Totals":
        """The sums over no examples."""
        return cls.of(torch.zeros(2 + 2 * len(terms) * (len(modalities) + 1), dtype=torch.float64), terms, modalities)

    def means(self) -> dict[str, float]:
        """Nats per example, by flat names: `loss`, and for each term `TERM/elbo`, `TERM/kl`, `TERM/log_prob/MODALITY`.

        The ELBO is the sum of the scored log-probabilities less the KL divergence, without λ and β. Each is a mean over
        the examples that have a share in it; what no example has is left out.
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

    def not_finite(self) -> list[str]:
        """The names of the parts that aren't finite, those of single modalities before those of the joint term.

        Where one modality is bad, only its own term is bad beside the joint one.
        """
        order = sorted(range(len(self.terms)), key=lambda t: self.terms[t] in (JOINT, SUBSET))
        parts = [
            (f"log p of {name} in term {self.terms[t]}", self.log_prob[t, m])
            for t in order
            for m, name in enumerate(self.modalities)
        ]
        parts += [(f"KL in term {self.terms[t]}", self.kl[t]) for t in order]
        parts.append(("the loss", self.loss))
        return list(dict.fromkeys(name for name, value in parts if not math.isfinite(value)))
