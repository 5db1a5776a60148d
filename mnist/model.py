"""The networks for MNIST: a picture and a label, in fully connected layers (Wu & Goodman 2018, appendix)."""

from mvae import MVAE, Bernoulli, Categorical, experts

from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 512


class ImageEncoder(nn.Module):
    """q(z | image): (batch, 1, 28, 28) in [0, 1] -> mu, logvar, each (batch, latents)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(784, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
        )
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(image)
        return self.mu(hidden), self.logvar(hidden)


class TextEncoder(nn.Module):
    """q(z | label): (batch,) class indices -> mu, logvar, each (batch, latents).

    The network runs on the ten classes, not on the batch; its output is looked up.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Embedding(10, HIDDEN)
        self.hidden = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.mu = nn.Linear(HIDDEN, n_latents)
        self.logvar = nn.Linear(HIDDEN, n_latents)

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(self.embedding.weight)
        return F.embedding(label, self.mu(hidden)), F.embedding(label, self.logvar(hidden))


def decoder(n_latents: int, *output: nn.Module) -> nn.Sequential:
    """Map z through three hidden layers, then `output`."""
    return nn.Sequential(
        nn.Linear(n_latents, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), *output,
    )  # fmt: skip


def build_model(n_latents: int) -> MVAE:
    """Return the MVAE of image and text."""
    return MVAE(
        encoders={"image": ImageEncoder(n_latents), "text": TextEncoder(n_latents)},
        likelihoods={
            "image": Bernoulli(decoder(n_latents, nn.Linear(HIDDEN, 784), nn.Unflatten(1, (1, 28, 28)))),
            "text": Categorical(decoder(n_latents, nn.Linear(HIDDEN, 10))),
        },
        n_latents=n_latents,
        fuse=experts.product,
    )
