"""The Multimodal Variational Autoencoder: an expert and a likelihood for each modality, over one latent z ~ N(0, I)."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from . import experts
from .errors import UsageError, is_out_of_memory
from .likelihoods import Likelihood, float32_at_least

Batch = Mapping[str, Tensor]
"""Tensors by modality name, each (batch, *event)."""

Precision = Literal["fp32", "bf16"]
"""What networks compute in; log-probabilities and sums are float32 or better."""


class MVAE(nn.Module):
    """Wu & Goodman (2018): p(z) * prod p(x_i | z), with q(z | X) fused from the prior and the experts of X.

    Args:
        encoders: by modality name, a module (batch, *event) -> mu, logvar, each (batch, latents).
        likelihoods: by the same names, p(x | z); see `mvae.likelihoods`.
        n_latents: the size of z.
        fuse: from the experts to the posterior; see `mvae.experts.product` for the shapes.

    Raises UsageError for encoders and likelihoods of unlike names, or values of another kind.
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
            raise UsageError(f"`encoders` are for {sorted(encoders)}, `likelihoods` for {sorted(likelihoods)}")
        if not isinstance(n_latents, int) or n_latents < 1:
            raise UsageError(f"`n_latents` is {n_latents!r}, and a whole number above 0 is wanted")
        for name, likelihood in likelihoods.items():
            if not isinstance(likelihood, Likelihood):
                raise UsageError(f"{name} of `likelihoods` is a {type(likelihood).__name__}, and no mvae.Likelihood")
        self.modalities = tuple(encoders)
        self.n_latents = n_latents
        self.fuse = fuse
        try:
            self.encoders = nn.ModuleDict(encoders)
            self.decoders = nn.ModuleDict({name: likelihoods[name] for name in self.modalities})
        except (KeyError, TypeError) as error:  # such as a name with a dot in it
            raise UsageError(f"these modalities can't be modules of torch: {error.args[0]}") from None

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
                here = present[len(mus)]
                rows = shown(here)
                mu, logvar = torch.zeros(2, len(x), self.n_latents, device=x.device)
                if len(rows):
                    with lone_example(self.encoders[name], len(rows)):
                        some = self.encoders[name](x[rows])
                    mu, logvar = (placed(part, rows, here) for part in some)
            mus.append(mu)
            logvars.append(logvar)
        mu, logvar = torch.stack(mus), torch.stack(logvars)
        return float32_at_least(mu), float32_at_least(logvar)

    def check_names(self, *names: str) -> None:
        """Raises UsageError for a name that is no modality's."""
        unknown = sorted(set(names) - set(self.modalities))
        if unknown:
            raise UsageError(f"no modality is called {', '.join(unknown)}; there are {', '.join(self.modalities)}")

    def likelihood(self, name: str) -> Likelihood:
        """p(x | z) of one modality."""
        return cast(Likelihood, self.decoders[name])

    def which(self, batch: Batch, present: Mapping[str, Tensor] | None) -> Tensor | None:
        """Which examples have which modality: bool (modalities of the batch, batch); None if all have all.

        Raises UsageError for modalities of unequal length, and masks that aren't bool (batch,) of a modality.
        """
        names = [name for name in self.modalities if name in batch]
        lengths = {name: len(batch[name]) for name in names}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{n} of {name}" for name, n in lengths.items()) or "none"
            raise UsageError(f"a batch has a row of each modality for each example, and this one has {found}")
        if present is None:
            return None
        self.check_names(*present)
        some = batch[names[0]]
        always = torch.ones(len(some), dtype=torch.bool, device=some.device)
        for name, here in present.items():
            if here.dtype != torch.bool or here.shape != always.shape:
                found = f"{here.dtype} of shape {tuple(here.shape)}"
                raise UsageError(f"{name} of `present` is {found}, and torch.bool of {tuple(always.shape)} is wanted")
        return torch.stack([present.get(name, always) for name in names])

    def posterior(self, batch: Batch, present: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """q(z | the modalities in `batch`): mu, logvar, each (batch, latents); of an empty one the prior, (1, latents).

        `present`, bool (batch,) by modality, says which examples have it; one that isn't named is there for all. Where
        one is absent its row may hold anything.

        Raises UsageError for names that no modality has, and rows that don't fit each other.
        """
        self.check_names(*batch)
        if not batch:
            mu, logvar = next(self.parameters()).new_zeros(2, 1, self.n_latents)
            return mu, logvar
        here = self.which(batch, present)
        mu, logvar = self.encode(batch, here)
        mu, logvar = self.fuse(mu, logvar, None if here is None else here.unsqueeze(0))
        return mu[0], logvar[0]

    @torch.no_grad()
    def check(
        self, batch: Batch, present: Mapping[str, Tensor] | None = None, names: Sequence[str] | None = None
    ) -> None:
        """Runs the networks on a batch, in evaluation mode, to know that encoders, latents, decoders and data fit.

        Raises UsageError, naming the modality and what would be right. `names`: the modalities to check; None: all.
        """
        names = self.modalities if names is None else names
        lacking = [name for name in names if name not in batch]
        if lacking:
            raise UsageError(f"there is no {lacking[0]} in it: it has {', '.join(batch)}")
        here = self.which({name: batch[name] for name in names}, present)
        with evaluating(self):
            for m, name in enumerate(name for name in self.modalities if name in names):
                x = batch[name] if here is None else batch[name][here[m]]
                if len(x):
                    self._check_one(name, x)

    def _check_one(self, name: str, x: Tensor) -> None:
        network, weight = "likelihood", next(self.parameters())
        try:
            z = weight.new_zeros(len(x), self.n_latents)
            self.likelihood(name).check(x, z)
            nats = self.likelihood(name).log_prob(z, x)
            if nats.shape != x.shape[:1]:
                raise UsageError(f"its log_prob is of shape {tuple(nats.shape)}, and one of {(len(x),)} is wanted")
            network = "encoder"
            for part in self.encoders[name](x):
                if part.shape != z.shape:
                    wanted = f"mu and logvar of {tuple(z.shape)} each: `n_latents` is {self.n_latents}"
                    raise UsageError(f"its encoder makes {tuple(part.shape)}, and is to make {wanted}")
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        except Exception as error:  # networks fail in many ways on what they aren't made for
            if is_out_of_memory(error):
                raise
            reason = f"{str(error).splitlines()[0]}; the weights are {weight.dtype}"
            raise UsageError(f"{name}: its {network} fails on {x.dtype} of {tuple(x.shape)}: {reason}") from error

    def draw(self, given: Batch, n: int, device: torch.device, temperature: float = 1.0) -> Tensor:
        """n draws of z, (n, latents), given one example of some modalities; from the prior if `given` is empty.

        temperature: what the variance of z is multiplied by.
        """
        mu, logvar = self.posterior(given)
        noise = torch.randn(n, self.n_latents, device=device, dtype=mu.dtype)
        return experts.draw(mu, logvar, noise, temperature)

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
        each: tuple[Tensor, ...] = ()  # z's terms, if some are to be taken
        columns = []
        for m, name in enumerate(self.modalities):
            terms = [t for t, names in enumerate(scored) if name in names]
            if not terms:
                columns.append(nothing.expand(len(z), -1))
                continue
            wanted = z
            if len(terms) < len(z):
                each = each or z.unbind()
                wanted = torch.stack([each[t] for t in terms])
            if mask is None:  # one call of the decoder for all its terms
                scores = self.likelihood(name).log_prob(wanted, batch[name])
            else:  # one call for all its terms' examples that count
                counts = torch.stack([mask[t, m] for t in terms]).flatten()
                rows = shown(counts)
                scores = z.new_zeros(wanted.shape[:2])
                if len(rows):
                    x = batch[name][rows % z.shape[1]]
                    with lone_example(self.likelihood(name), len(rows)):
                        some = self.likelihood(name).log_prob(wanted.flatten(0, 1)[rows], x)
                    scores = placed(some, rows, counts).view(scores.shape)
            if len(terms) < len(z):  # back to their terms' places, with zeros between them
                gaps = [after - t - 1 for t, after in itertools.pairwise([-1, *terms, len(z)])]
                zeros = [nothing.expand(gap, -1) for gap in gaps]
                scores = torch.cat([zeros[0], *itertools.chain(*zip(scores.split(1), zeros[1:], strict=True))])
            columns.append(scores)
        return torch.stack(columns, dim=1)


def shown(here: Tensor) -> Tensor:
    """The rows that a network is to be run on, (rows,), of those where `here`, bool (n,), is True.

    On a CPU they are those rows. Elsewhere to know them would make the host wait for the device, and in a compiled step
    it would change the shapes: there are always n rows, and one where `here` is False is another where it is True, each
    of these in turn. So batch norm sees no others, in whatever way they are counted.
    """
    if not has_fixed_shapes(here.device):
        return here.nonzero().squeeze(1)
    there_first = (~here).byte().argsort(stable=True)
    turn = ((~here).cumsum(0) - 1) % here.sum().clamp(min=1)
    return torch.where(here, torch.arange(len(here), device=here.device), there_first[turn])


def placed(values: Tensor, rows: Tensor, here: Tensor) -> Tensor:
    """The values (rows, ...) of the rows that `shown` gave, at their places: (n, ...), zeros where `here` is False."""
    if not has_fixed_shapes(here.device):
        return values.new_zeros(len(here), *values.shape[1:]).index_copy(0, rows, values)
    return torch.where(here.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def has_fixed_shapes(device: torch.device) -> bool:
    """Whether shapes may not depend on values: on a GPU, which is asked for nothing, and in a compiled step."""
    return device.type != "cpu" or torch.compiler.is_compiling()


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


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Has the network in evaluation mode within, and afterwards in the mode that it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def running_in(precision: Precision, device: torch.device) -> torch.autocast:
    """Has networks on `device` compute in this precision within. Raises UsageError if there is none of this name."""
    check_precision(precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_precision(precision: str) -> None:
    """Raises UsageError for a name that is no precision's."""
    if precision not in get_args(Precision):
        raise UsageError(f"`precision` is {precision!r}, and {' or '.join(get_args(Precision))} is wanted")
