"""The Multimodal Variational Autoencoder: an expert and a likelihood for each modality, over one latent z ~ N(0, I)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import experts
from .errors import UsageError
from .likelihoods import Likelihood

Batch = Mapping[str, Tensor]
"""Tensors by modality name, each (batch, *event)."""


class MVAE(nn.Module):
    """Wu & Goodman (2018): p(z) * prod p(x_i | z), with q(z | X) fused from the prior and the experts of X.

    Args:
        encoders: by modality name, a module (batch, *event) -> mu, logvar, each (batch, latents).
        likelihoods: by the same names, p(x | z); see `mvae.likelihoods`.
        n_latents: the size of z.
        fuse: from the experts to the posterior; see `mvae.experts.product` for the shapes.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, Likelihood],
        n_latents: int,
        fuse: experts.Fusion = experts.product,
    ):
        super().__init__()
        if set(encoders) != set(likelihoods):
            raise ValueError(f"encoders are for {sorted(encoders)}, likelihoods for {sorted(likelihoods)}")
        self.modalities = tuple(encoders)
        self.n_latents = n_latents
        self.fuse = fuse
        self.encoders = nn.ModuleDict(encoders)
        self.decoders = nn.ModuleDict({name: likelihoods[name] for name in self.modalities})

    def encode(self, batch: Batch, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs each encoder once.

        Args:
            batch: the modalities to encode; one that isn't in it is left out of the result.
            present: None, or bool (modalities of the batch, batch): which examples have which. The others are not
                shown to the encoder (nor to its batch norm), and their rows of the result are zeros.

        Returns:
            mu, logvar: (modalities of the batch, batch, latents), in the order of `self.modalities`.
        """
        mus: list[Tensor] = []
        logvars: list[Tensor] = []
        for name in self.modalities:
            if name not in batch:
                continue
            x = batch[name]
            if present is None:
                mu, logvar = self.encoders[name](x)
            else:
                rows = present[len(mus)].nonzero().squeeze(1)
                mu, logvar = torch.zeros(2, len(x), self.n_latents, device=x.device)
                if len(rows):
                    with lone_example(self.encoders[name], len(rows)):
                        some_mu, some_logvar = self.encoders[name](x[rows])
                    mu = mu.to(some_mu.dtype).index_copy(0, rows, some_mu)
                    logvar = logvar.to(some_mu.dtype).index_copy(0, rows, some_logvar)
            mus.append(mu)
            logvars.append(logvar)
        mu, logvar = torch.stack(mus), torch.stack(logvars)
        return (mu.float(), logvar.float()) if mu.dtype in (torch.bfloat16, torch.float16) else (mu, logvar)

    def check_names(self, *names: str) -> None:
        """Raises UsageError for a name that is no modality's."""
        unknown = sorted(set(names) - set(self.modalities))
        if unknown:
            raise UsageError(f"no modality is called {', '.join(unknown)}; there are {', '.join(self.modalities)}")

    def likelihood(self, name: str) -> Likelihood:
        """p(x | z) of one modality."""
        return cast(Likelihood, self.decoders[name])

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """q(z | the modalities in `batch`): mu, logvar, each (batch, latents)."""
        mu, logvar = self.encode(batch)
        everything = torch.ones(1, len(mu), 1, dtype=torch.bool, device=mu.device)
        mu, logvar = self.fuse(mu, logvar, everything)
        return mu[0], logvar[0]

    def draw(self, given: Batch, n: int, device: torch.device) -> Tensor:
        """n draws of z, (n, latents), given one example of some modalities; from the prior if `given` is empty."""
        noise = torch.randn(n, self.n_latents, device=device)
        return experts.draw(*self.posterior(given), noise) if given else noise

    def mean(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """E[x | z], or a label's probabilities, of the modalities named, each (..., batch, *event)."""
        return {name: self.likelihood(name).mean(z) for name in names}

    def log_prob(self, z: Tensor, batch: Batch, scored: Sequence[Sequence[str]], mask: Tensor | None = None) -> Tensor:
        """log p(x_m | z_t) for the modalities that each term scores; a modality no term scores isn't decoded.

        Args:
            z: (terms, batch, latents).
            batch: the scored modalities, each (batch, *event).
            scored: for each term, the names of the modalities to score.
            mask: None, or bool (terms, modalities, batch): which of those scores count. The others are not decoded.

        Returns:
            (terms, modalities, batch) in nats, zero where nothing was scored.
        """
        nothing = z.new_zeros(z.shape[1])
        columns = []
        for m, name in enumerate(self.modalities):
            terms = [t for t, names in enumerate(scored) if name in names]
            if not terms:
                columns.append(nothing.expand(len(z), -1))
                continue
            wanted = z if len(terms) == len(z) else torch.stack([z[t] for t in terms])
            if mask is None:  # one call of the decoder for all its terms
                scores = self.likelihood(name).log_prob(wanted, batch[name])
            else:  # one call for all its terms' examples that count
                which, rows = mask[terms, m].nonzero(as_tuple=True)
                scores = z.new_zeros(wanted.shape[:2])
                if len(rows):
                    with lone_example(self.likelihood(name), len(rows)):
                        some = self.likelihood(name).log_prob(wanted[which, rows], batch[name][rows])
                    scores = scores.index_put((which, rows), some)
            by_term = dict(zip(terms, scores, strict=True)) if len(terms) < len(z) else {}
            columns.append(torch.stack([by_term.get(t, nothing) for t in range(len(z))]) if by_term else scores)
        return torch.stack(columns, dim=1)


@contextlib.contextmanager
def lone_example(network: nn.Module, n: int) -> Iterator[None]:
    """For n = 1 row, has batch norm use its running statistics, as in evaluation: one row has no variance."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and n == 1]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
