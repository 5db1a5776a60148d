"""The Multimodal Variational Autoencoder (MVAE) of Wu & Goodman (2018) in one file, on MNIST: images and their labels.

    python minimal.py        # a few minutes on one CPU core; writes minimal.png

A latent z ~ N(0, I) generates both modalities: p(z) p(image | z) p(text | z), where the text is the label. Each has an
encoder, its "expert", which returns a Gaussian over z. The posterior given some modalities is the product of their
experts and the prior. So one model generates images from labels, labels from images, or both from nothing.

This file is for reading. The library has the same mathematics (a test compares losses and gradients), with missing
modalities, resume, log-likelihoods and more: see mnist/train.py.
"""

import argparse
import gzip
import os
import time
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image

N_LATENTS, HIDDEN = 64, 512
BATCH_SIZE = 100
EPOCHS = 6  # the paper: 500
ANNEALING_EPOCHS = 3  # the paper: 200
LEARNING_RATE = 1e-3

# λ weights log p(x_i | z). A label holds 2.3 nats at most and an image about 90: unweighted, labels are ignored.
LAMBDA = {"image": 1.0, "text": 50.0}

# Each ELBO term: the modalities that z is inferred from, and those that are reconstructed from z. The joint term alone
# would train the encoders to work together only; the other two train each to work alone.
# In the paper a term reconstructs its inputs. Then only the joint term links label and image, and the label gets its
# own latents, which images don't predict, until hundreds of epochs with a small β merge the two. In a short run the
# image's term must predict the label as well. After six epochs 98 % of test labels are then predicted from images; with
# the paper's term, (("image",), ("image",)), it is 55 %.
TERMS = [
    (("image", "text"), ("image", "text")),
    (("image",), ("image", "text")),
    (("text",), ("text",)),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = Path(os.environ.get("MVAE_DATA_DIR") or "data") / "MNIST" / "raw"
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def load(part: str) -> dict[str, Tensor]:
    """Return the images, (N, 784) in [0, 1], and labels, (N,), of "train" or "t10k" (test); download missing files."""
    content = []
    for name, header in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        if not (DATA / name).exists():
            packed = urlopen(MIRROR + name, timeout=60).read()
            DATA.mkdir(parents=True, exist_ok=True)
            (DATA / name).write_bytes(packed)
        unpacked = bytearray(gzip.decompress((DATA / name).read_bytes()))
        content.append(torch.frombuffer(unpacked, dtype=torch.uint8, offset=header).to(DEVICE))
    return {"image": content[0].view(-1, 784) / 255, "text": content[1].long()}


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers of these sizes with the paper's Swish, x sigmoid(x), between them."""
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def product_of_experts(experts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return mu and logvar of the product of Gaussian experts, each a (mu, logvar), and the prior N(0, I).

    With precisions T_i = 1 / var_i, 1 for the prior: T = 1 + sum T_i, mu = sum T_i mu_i / T and var = 1 / T. A missing
    modality is left out. T_i / T is a softmax of log-precisions: it can't overflow and needs no epsilon.
    """
    prior = torch.zeros_like(experts[0][0])
    mu = torch.stack([prior, *(mu for mu, _ in experts)])
    log_precision = torch.stack([prior, *(-logvar for _, logvar in experts)])
    return (log_precision.softmax(dim=0) * mu).sum(dim=0), -log_precision.logsumexp(dim=0)


def draw(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return z = mu + std * noise, so that gradients reach mu and logvar (the reparameterisation trick)."""
    return mu + (logvar / 2).exp() * noise


class MVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        image = mlp(784, HIDDEN, HIDDEN, 2 * N_LATENTS)
        text = nn.Sequential(nn.Embedding(10, HIDDEN), mlp(HIDDEN, HIDDEN, 2 * N_LATENTS))
        self.encoders = nn.ModuleDict({"image": image, "text": text})
        sizes = N_LATENTS, HIDDEN, HIDDEN, HIDDEN  # then the logits of Bernoulli pixels or of classes
        self.decoders = nn.ModuleDict({"image": mlp(*sizes, 784), "text": mlp(*sizes, 10)})

    def expert(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each (batch, latents), of one modality's expert."""
        mu, logvar = self.encoders[name](x).chunk(2, dim=1)
        return mu, logvar

    def log_prob(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x | z) of one modality, (batch,), in nats."""
        logits = self.decoders[name](z)
        if name == "text":
            return -F.cross_entropy(logits, x, reduction="none")
        # A grey pixel counts as the probability of a white one, as in the paper.
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)

    def loss(self, batch: dict[str, Tensor], beta: float, noise: Tensor) -> Tensor:
        """Return the negative sum of the ELBO terms, in nats per example. noise: (terms, batch, latents)."""
        experts = {name: self.expert(name, x) for name, x in batch.items()}
        elbos = []
        for (inputs, reconstructs), ε in zip(TERMS, noise, strict=True):
            # ELBO = E_q[sum of λ_i log p(x_i | z)] - β KL(q || prior), q = q(z | inputs). One draw of z estimates E_q.
            mu, logvar = product_of_experts([experts[name] for name in inputs])
            z = draw(mu, logvar, ε)
            log_prob = torch.stack([LAMBDA[name] * self.log_prob(name, batch[name], z) for name in reconstructs])
            kl = 0.5 * (mu.square() + logvar.expm1() - logvar).sum(dim=1)  # in closed form
            elbos.append(log_prob.sum(dim=0) - beta * kl)
        return -torch.stack(elbos).sum(dim=0).mean()


@torch.no_grad()
def label_accuracy(model: MVAE, data: dict[str, Tensor]) -> float:
    """Return the fraction of images whose most probable label is right."""
    mu, _ = product_of_experts([model.expert("image", data["image"])])  # no text: its expert is left out
    return (model.decoders["text"](mu).argmax(dim=1) == data["text"]).double().mean().item()


@torch.no_grad()
def digits(model: MVAE, n: int) -> Tensor:
    """Return n images (their pixels' means) conditioned on each label, (10 * n, 1, 28, 28)."""
    mu, logvar = product_of_experts([model.expert("text", torch.arange(10, device=DEVICE))])
    noise = torch.randn(1, n, N_LATENTS, device=DEVICE)  # the same for all labels: a column has one handwriting
    return model.decoders["image"](draw(mu.unsqueeze(1), logvar.unsqueeze(1), noise)).sigmoid().view(-1, 1, 28, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the data (default: {EPOCHS})")
    n_epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = load("train"), load("t10k")
    model = MVAE().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)

    for epoch in range(n_epochs):
        start, losses = time.perf_counter(), []
        batches = torch.randperm(len(train["text"]), device=DEVICE).split(BATCH_SIZE)
        for step, rows in enumerate(batches, 1):
            # KL annealing: β rises from 0 to 1. At a small β z first learns to carry information about x.
            beta = min(1.0, (epoch + step / len(batches)) / ANNEALING_EPOCHS)
            noise = torch.randn(len(TERMS), len(rows), N_LATENTS, device=DEVICE)
            loss = model.loss({name: x[rows] for name, x in train.items()}, beta, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        mean, accuracy = torch.stack(losses).mean().item(), label_accuracy(model, test)
        print(f"epoch {epoch + 1}/{n_epochs}  β {beta:.2f}  loss {mean:.2f} nats", end="  ")
        print(f"label accuracy on test images {accuracy:.1%}  {time.perf_counter() - start:.0f} s", flush=True)

    save_image(digits(model, 10), "minimal.png", nrow=10)
    print("wrote minimal.png: digits conditioned on their label, a row for each label from 0 to 9")


if __name__ == "__main__":
    main()
