"""The Multimodal Variational Autoencoder: an expert and a likelihood for each modality, over one latent z ~ N(0, I)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import experts
from .errors import UsageError, is_out_of_memory
from .likelihoods import Likelihood, float32_at_least

Batch = Mapping[str, Tensor]
"""Tensors by modality name, each (batch, *event)."""

Precision = Literal["fp32", "bf16"]
"""Of the networks; log-probabilities and sums are always float32 or better."""


class MVAE(nn.Module):
    """Wu & Goodman (2018): p(z) * prod p(x_i | z), with q(z | X) fused from the prior and the experts of X.

    Args:
        encoders: by modality name, a module (batch, *event) -> mu, logvar, each (batch, latents).
        likelihoods: by the same names, p(x | z); see `mvae.likelihoods`.
        n_latents: size of z.
        fuse: from the experts to one Gaussian; see `mvae.experts.product` for the shapes.

    prior: p(z) of draws and estimates, a distribution over (latents,), such as one of `mvae.tools.prior`; None for
        N(0, I), which is always that of training and of q(z | X).

    Raises UsageError if the names differ, or `n_latents` or a likelihood is of the wrong type.
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
        if set(encoders) != set(likelihoods) or not encoders:
            raise UsageError(
                f"encoders and likelihoods must name the same modalities, got {sorted(encoders)}, {sorted(likelihoods)}"
            )
        if not isinstance(n_latents, int) or n_latents < 1:
            raise UsageError(f"n_latents must be an integer >= 1, got {n_latents!r}")
        for name, likelihood in likelihoods.items():
            if not isinstance(likelihood, Likelihood):
                raise UsageError(f"{name}: expected an mvae.Likelihood, got a {type(likelihood).__name__}")
        self.modalities = tuple(encoders)
        self.n_latents = n_latents
        self.fuse = fuse
        self.prior: Distribution | None = None
        self.encoders = nn.ModuleDict(encoders)
        self.decoders = nn.ModuleDict({name: likelihoods[name] for name in self.modalities})

    def check_names(self, *names: str) -> None:
        """Raise UsageError for a name that isn't a modality."""
        unknown = sorted(set(names) - set(self.modalities))
        if unknown:
            raise UsageError(f"unknown modality {', '.join(unknown)}; expected {', '.join(self.modalities)}")

    def likelihood(self, name: str) -> Likelihood:
        """Return p(x | z) of one modality."""
        return cast(Likelihood, self.decoders[name])

    def presence(self, batch: Batch, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the presence mask, bool (modalities, batch): False for a modality that isn't in `batch`.

        Raises UsageError for modalities of unequal length, and masks that aren't bool (batch,) of a modality.
        """
        n = next(iter(batch.values())).shape[0]
        if any(x.shape[0] != n for x in batch.values()):
            lengths = ", ".join(f"{name} {x.shape[0]}" for name, x in batch.items())
            raise UsageError(f"modalities of a batch must have the same number of examples, got {lengths}")
        device = next(iter(batch.values())).device
        everywhere, nowhere = (torch.full((n,), value, device=device) for value in (True, False))
        present = present or {}
        self.check_names(*present)
        for name, here in present.items():
            if here.dtype != torch.bool or here.shape != everywhere.shape:
                got = f"{here.dtype} of shape {tuple(here.shape)}"
                raise UsageError(f"present[{name!r}] must be torch.bool of shape ({n},), got {got}")
        return torch.stack([present.get(name, everywhere) if name in batch else nowhere for name in self.modalities])

    def encode(self, batch: Batch, present: Tensor) -> tuple[Tensor, Tensor]:
        """Run each encoder once, on the examples that have its modality: an absent value never meets batch norm.

        Args:
            batch: the modalities to encode.
            present: bool (modalities, batch), see `presence`.

        Returns:
            mu, logvar: (modalities, batch, latents), zeros where absent.
        """
        found = []
        for name, here in zip(self.modalities, present.unbind(), strict=True):
            expert = torch.zeros(2, here.shape[0], self.n_latents, device=here.device)  # len() is fixed in an export
            rows = rows_of(here) if name in batch else here[:0]
            if rows.shape[0]:
                with lone_example(self.encoders[name], rows.shape[0]):
                    mu, logvar = self.encoders[name](taken(batch[name], rows, here))
                parts = (placed(float32_at_least(part), rows, here) for part in (mu, logvar))
                expert = torch.stack([*parts])
            found.append(expert)
        mu, logvar = torch.stack(found, dim=1)
        return mu, logvar

    def posterior(self, batch: Batch, present: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return q(z | the modalities in `batch`): mu, logvar, each (batch, latents); of none the prior, (1, latents).

        `present`, bool (batch,) by modality, says which examples have it (default: all); an absent row may hold any
        value. Raises UsageError for unknown names and whatever `check` refuses.
        """
        if batch:
            self.check(batch, present, tuple(batch))
        return self.fused(batch, present)

    def fused(self, batch: Batch, present: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return what `posterior` does, for data that have been checked."""
        if not batch:
            mu, logvar = next(self.parameters()).new_zeros(2, 1, self.n_latents)
            return mu, logvar
        here = self.presence(batch, present)
        mu, logvar = self.fuse(*self.encode(batch, here), here.unsqueeze(0))
        return mu[0], logvar[0]

    def draw(self, given: Batch, n: int, temperature: float = 1.0) -> Tensor:
        """Draw n values of z, (n, latents), conditioned on one example of some modalities; on none: from the prior.

        temperature: multiplies the variance of z, but not that of another prior than N(0, I).
        """
        if not given and self.prior is not None:
            return self.prior.sample((n,))
        mu, logvar = self.posterior(given)
        if len(mu) != 1:
            raise UsageError(f"draw is conditioned on one example, got {len(mu)}")
        noise = torch.randn(n, self.n_latents, device=mu.device, dtype=mu.dtype)
        return experts.draw(mu, logvar, noise, temperature)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z) in nats of z (..., latents)."""
        return experts.log_standard_normal(z) if self.prior is None else self.prior.log_prob(z)

    def mean(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return E[x | z], or a label's probabilities, of the modalities named, each (..., batch, *event)."""
        self.check_names(*names)
        return {name: self.likelihood(name).mean(z) for name in names}

    def log_prob(self, z: Tensor, batch: Batch, decoded: Sequence[Sequence[str]], mask: Tensor | None = None) -> Tensor:
        """Return log p(x_m | z_t) of the modalities that each term reconstructs.

        Args:
            z: (terms, batch, latents).
            batch: the reconstructed modalities, each (batch, *event).
            decoded: for each term, the modalities to decode. One that no term reconstructs isn't decoded.
            mask: bool (terms, modalities, batch), which of these scores count; the others are not decoded. None: all.

        Returns:
            (terms, modalities, batch) in nats, zero where nothing counts.
        """
        each, nothing = z.unbind(), z.new_zeros(z.shape[1])
        columns = []
        for m, name in enumerate(self.modalities):
            column = [nothing] * len(each)
            terms = [t for t, names in enumerate(decoded) if name in names]
            if terms:  # one call of the decoder for all of them
                some = z if len(terms) == len(each) else torch.stack([each[t] for t in terms])
                counts = None if mask is None else torch.stack([mask[t, m] for t in terms])
                for t, nats in zip(terms, self._scores(name, some, batch[name], counts).unbind(), strict=True):
                    column[t] = nats
            columns.append(torch.stack(column))
        return torch.stack(columns, dim=1)

    def _scores(self, name: str, z: Tensor, x: Tensor, counts: Tensor | None) -> Tensor:
        """Return log p(x | z), (terms, batch), of z (terms, batch, latents), zero where `counts` is False."""
        likelihood = self.likelihood(name)
        if counts is None:
            return likelihood.log_prob(z, x)
        rows = rows_of(counts.flatten())
        if not len(rows):
            return z.new_zeros(counts.shape)
        with lone_example(likelihood, len(rows)):
            nats = likelihood.log_prob(z.flatten(0, 1)[rows], taken(x, rows % z.shape[1], counts))
        return placed(nats, rows, counts.flatten()).view(counts.shape)

    @torch.no_grad()
    def check(
        self, batch: Batch, present: Mapping[str, Tensor] | None = None, names: Sequence[str] | None = None
    ) -> None:
        """Check by a dry run in evaluation mode that encoders, likelihoods, n_latents and data fit each other.

        Raises UsageError, naming the modality and what would be right. `names`: the modalities to check (default: all).
        """
        names = self.modalities if names is None else names
        lacking = [name for name in names if name not in batch]
        if lacking:
            raise UsageError(f"the batch lacks {lacking[0]}: it has {', '.join(batch)}")
        self.check_names(*names)
        for name in names:
            check_rows(name, batch[name])
        here = self.presence({name: batch[name] for name in names}, present)
        with evaluating(self):
            for name, rows in zip(self.modalities, here, strict=True):
                if rows.any():
                    self._check_one(name, batch[name][rows])

    def _check_one(self, name: str, x: Tensor) -> None:
        network, weight = "likelihood", next(self.parameters())
        try:
            z = weight.new_zeros(len(x), self.n_latents)
            self.likelihood(name).check(x, z)
            nats = self.likelihood(name).log_prob(z, x)
            if nats.shape != x.shape[:1]:
                raise UsageError(f"log_prob must have shape {(len(x),)}, got {tuple(nats.shape)}")
            network = "encoder"
            found = [tuple(part.shape) for part in self.encoders[name](x)]
            if found != [z.shape, z.shape]:
                raise UsageError(f"the encoder must return mu, logvar of {tuple(z.shape)}, got {found}")
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        except Exception as error:  # a network fails in many ways on data that it isn't made for
            if is_out_of_memory(error):
                raise
            reason = f"{str(error).splitlines()[0]}; the weights are {weight.dtype}"
            raise UsageError(f"{name}: the {network} fails on {x.dtype} of {tuple(x.shape)}: {reason}") from error


def check_rows(name: str, x: object) -> None:
    """Raise UsageError, naming the value, unless it is a dense tensor with a row for each example."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.layout != torch.strided:
        found = f"{x.layout} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"{name} must be a dense torch.Tensor with a row per example, got {found}")


def rows_of(here: Tensor) -> Tensor:
    """Return the rows (rows,) to run a network on: those where `here`, bool (n,), is True.

    On a GPU knowing them would make the host wait, and in a compiled step change its shapes. There it is always n rows:
    a row that is absent is replaced by one that is present, each of these in turn, so that batch norm sees no others.
    """
    if not has_fixed_shapes(here.device):
        return here.nonzero().squeeze(1)
    rows = torch.arange(here.shape[0], device=here.device)
    present_first = torch.where(here, rows, rows + here.shape[0]).argsort()  # a stable sort has no ONNX operator
    turn = ((~here).cumsum(0) - 1) % here.sum().clamp(min=1)
    return torch.where(here, rows, present_first[turn])


def taken(x: Tensor, rows: Tensor, here: Tensor) -> Tensor:
    """Return x[rows] for `rows_of(here)`; zeros if x is absent everywhere: placeholders, such as -1 for a label, may
    be no valid values."""
    return x[rows].where(here.any(), 0) if has_fixed_shapes(here.device) else x[rows]


def placed(values: Tensor, rows: Tensor, here: Tensor) -> Tensor:
    """Put the values (rows, ...) of `rows_of(here)` back into their places: (n, ...), zeros where `here` is False."""
    if not has_fixed_shapes(here.device):
        return values.new_zeros(len(here), *values.shape[1:]).index_copy(0, rows, values)
    return torch.where(here.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def has_fixed_shapes(device: torch.device) -> bool:
    """Return whether shapes must not depend on values: on a GPU (no wait for the host) or in a compiled step."""
    return device.type != "cpu" or torch.compiler.is_compiling()


@contextlib.contextmanager
def lone_example(network: nn.Module, n: int) -> Iterator[None]:
    """Let batch norm use its running statistics for n = 1 row, which has no variance."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and n == 1]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, then give each module its own mode back: a frozen one stays frozen."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context in which networks run in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
