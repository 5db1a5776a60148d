"""The networks for MultiMNIST: convolutions for canvases, and recurrent networks for the strings of their digits.

The shapes are those of Wu & Goodman (2018) and its public code. That code's text decoder is fed its own most probable
symbols even in training, so its score isn't a probability of the text. Here p(text | z) is autoregressive, and sums to
1 over all texts.
"""

from collections.abc import Callable

from mvae import MVAE, Bernoulli, Likelihood, experts
from mvae.errors import UsageError
from mvae.layers import FoldConvTranspose2d
from mvae.likelihoods import float32_at_least

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 4  # symbols of a text
FILL, START, N_SYMBOLS = 10, 11, 12  # after the digits 0 to 9: padding, and the decoder's first input

HIDDEN, LAYERS = 200, 2


def recur(inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Run a layer of nn.GRU from `state` (rows, HIDDEN), and return the state after each step.

    inputs: its weight_ih @ x + bias_ih, (steps, rows, 3 * HIDDEN). weight, bias: its weight_hh and bias_hh.
    nn.GRU itself would break a compiled step into eight graphs.
    """
    states = []
    for step in inputs:
        reset, update, new = step.chunk(3, dim=1)
        state_reset, state_update, state_new = F.linear(state, weight, bias).chunk(3, dim=1)
        reset, update = (reset + state_reset).sigmoid(), (update + state_update).sigmoid()
        state = torch.addcmul(new, reset, state_new).tanh().lerp(state, update)
        states.append(state)
    return states


class ImageEncoder(nn.Module):
    """q(z | image): (batch, 1, 50, 50) in [0, 1] -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.SiLU(),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
            nn.Conv2d(128, 256, 4, 2, bias=False), nn.BatchNorm2d(256), nn.SiLU(),
            nn.Flatten(), nn.Linear(1024, 512), nn.SiLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.mu = nn.Linear(512, n_latents)
        self.logvar = nn.Linear(512, n_latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(image)
        return self.mu(hidden), self.logvar(hidden)


def image_decoder(n_latents: int) -> nn.Sequential:
    """(batch, latents) -> logits (batch, 1, 50, 50)."""
    return nn.Sequential(
        nn.Linear(n_latents, 1024), nn.SiLU(), nn.Unflatten(1, (256, 2, 2)),
        nn.ConvTranspose2d(256, 128, 4, 2, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 5, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        FoldConvTranspose2d(32, 1, 4, 2, 1, bias=False),
    )  # fmt: skip


class TextEncoder(nn.Module):
    """q(z | text): (batch, LENGTH) symbols -> mu, logvar, each (batch, latents), from the sum of both final states.

    The public code uses the output at the last symbol, where the backward direction has read only that one.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Embedding(N_SYMBOLS, HIDDEN)
        self.gru = nn.ParameterDict(nn.GRU(HIDDEN, HIDDEN, bidirectional=True).named_parameters())
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        weights = list(self.gru.values())
        hidden = self._end(text.T, *weights[:4]) + self._end(text.T.flip(0), *weights[4:])
        return self.mu(hidden), self.logvar(hidden)

    def _end(self, symbols: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        """Return the state (batch, HIDDEN) after the symbols (LENGTH, batch)."""
        inputs = F.embedding(symbols, F.linear(self.embedding.weight, w_ih, b_ih))  # a product per symbol, looked up
        return recur(inputs, torch.zeros_like(inputs[0, :, :HIDDEN]), w_hh, b_hh)[-1]


class TextDecoder(nn.Module):
    """Predict the symbol after each previous one, given z.

    z (rows, latents), previous symbols (rows, n) -> logits (rows, n, FILL + 1), and the state for the next call. START
    never follows a symbol, so it has no logit.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Embedding(N_SYMBOLS, HIDDEN)
        self.state = nn.Linear(n_latents, HIDDEN)
        self.gru = nn.ParameterDict(nn.GRU(HIDDEN + n_latents, HIDDEN, LAYERS).named_parameters())
        self.logits = nn.Linear(HIDDEN + n_latents, FILL + 1)

    def forward(self, z: Tensor, previous: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = [self.state(z)] * LAYERS if state is None else state
        w_ih, w_hh, b_ih, b_hh, w_ih_1, w_hh_1, b_ih_1, b_hh_1 = self.gru.values()
        # The first layer's inputs are a symbol and z: a product per symbol of the alphabet, looked up, and one of z.
        w_symbol, w_z = w_ih.split([HIDDEN, z.shape[1]], dim=1)
        symbols = F.embedding(previous.T, F.linear(F.silu(self.embedding.weight), w_symbol))
        below = torch.stack(recur(symbols + F.linear(z, w_z, b_ih), first, w_hh, b_hh))
        above = torch.stack(recur(F.linear(below, w_ih_1, b_ih_1), second, w_hh_1, b_hh_1), dim=1)
        everywhere = z.unsqueeze(1).expand(-1, previous.shape[1], -1)
        logits = self.logits(torch.cat([above, everywhere], dim=2))
        return float32_at_least(logits), torch.stack([below[-1], above[:, -1]])


class Text(Likelihood):
    """p(text | z): the product of p(symbol | z, previous symbols) over the symbols, by a `TextDecoder`.

    A text has up to LENGTH digits. A shorter one ends at its first FILL, after which every symbol is FILL with
    probability 1. So the probabilities of the texts of 0 to LENGTH digits sum to 1.
    """

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Return log p(text | z) in nats, (..., batch), of x (batch, LENGTH): digits, then FILL.

        The decoder's inputs are the true previous symbols (teacher forcing), which is the chain rule, in training and
        in evaluation.
        """
        x = x.expand(*z.shape[:-1], LENGTH).reshape(-1, LENGTH)
        previous = torch.cat([torch.full_like(x[:, :1], START), x[:, :-1]], dim=1)
        logits, _ = self.decoder(z.reshape(-1, z.shape[-1]), previous)
        nats = logits.log_softmax(dim=2).gather(2, x.unsqueeze(2)).squeeze(2)
        after_end = torch.where(x == FILL, 0.0, -torch.inf)
        return torch.where(previous == FILL, after_end, nats).sum(dim=1).reshape(z.shape[:-1])

    def mean(self, z: Tensor) -> Tensor:
        """Return each symbol's probabilities after the most probable previous ones: (..., batch, LENGTH, FILL + 1).

        Their argmax is the greedily decoded text. The expectation over texts has no closed form.
        """
        return self._write(z, lambda logits: logits.argmax(dim=1))[1]

    def sample(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw texts (..., batch, LENGTH) from p(text | z) with logits / `temperature`."""
        return self._write(z, lambda logits: torch.distributions.Categorical(logits=logits / temperature).sample())[0]

    def check(self, x: Tensor, z: Tensor) -> None:
        if x.dtype != torch.int64 or x.shape != (len(z), LENGTH):
            raise UsageError(f"must be torch.int64 of shape {(len(z), LENGTH)}, got {x.dtype} of {tuple(x.shape)}")
        ended = (x[:, :-1] == FILL) & (x[:, 1:] != FILL)
        if x.min() < 0 or x.max() > FILL or ended.any():
            raise UsageError(f"a text must be digits 0 to 9, and after them {FILL} only")

    def _write(self, z: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Decode with `choose` picking each symbol by its logits (rows, FILL + 1); return symbols and probabilities."""
        rows = z.reshape(-1, z.shape[-1])
        symbol = torch.full_like(rows[:, 0], START, dtype=torch.long)
        only_fill = torch.full((FILL + 1,), -torch.inf, device=z.device)
        only_fill[FILL] = 0
        state, symbols, probabilities = None, [], []
        for _ in range(LENGTH):
            logits, state = self.decoder(rows, symbol.unsqueeze(1), state)
            logits = torch.where((symbol == FILL).unsqueeze(1), only_fill, logits[:, 0])
            symbol = choose(logits)
            symbols.append(symbol)
            probabilities.append(logits.softmax(dim=1))
        return tuple(torch.stack(part, dim=1).unflatten(0, z.shape[:-1]) for part in (symbols, probabilities))


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of image and text."""
    model = MVAE(
        encoders={"image": ImageEncoder(n_latents), "text": TextEncoder(n_latents)},
        likelihoods={"image": Bernoulli(image_decoder(n_latents)), "text": Text(TextDecoder(n_latents))},
        n_latents=n_latents,
        fuse=experts.product,
    )
    return model.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and GPUs
