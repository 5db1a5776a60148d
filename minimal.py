"""The Multimodal Variational Autoencoder (MVAE) of Wu & Goodman (2018) in one file, on MNIST: an image and its label.

    python minimal.py        # some minutes on one CPU core; writes minimal.png

A latent z ~ N(0, I) generates both modalities: p(z) p(image | z) p(text | z), where the text is the label. Each has an
encoder, an "expert" that returns a Gaussian over z. The posterior given any set of modalities is the product of their
experts and the prior. So one model generates images from labels, labels from images, or both from nothing.

This is a copy for reading. The library `mvae` has the same mathematics with resume, missing modalities and more; a test
compares their losses and gradients.
"""

import argparse
import gzip
import os
import time
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image

N_LATENTS = 64
HIDDEN = 512
BATCH_SIZE = 100
EPOCHS = 8  # the paper: 500
ANNEALING_EPOCHS = 4  # the paper: 200
LEARNING_RATE = 1e-3

# Weights λ of log p(x_i | z). An image has 784 pixels and a label is one symbol, of 2.3 nats at most: without a large
# weight the model would ignore the label.
LAMBDA = {"image": 1.0, "text": 50.0}

# Each ELBO term: the modalities that z is inferred from, and those that are reconstructed from z. Without the last two
# terms the encoders would only be trained together, and neither would be of use alone.
# In the paper a term reconstructs its inputs, so only the joint term links the label to the image. The label then gets
# latents that no image predicts, until hundreds of epochs of small β have merged the two. In a few epochs we get there
# by one more reconstruction: the image's term predicts the label. (The paper's term here: (("image",), ("image",)).)
TERMS = [
    (("image", "text"), ("image", "text")),
    (("image",), ("image", "text")),
    (("text",), ("text",)),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = Path(os.environ.get("MVAE_DATA_DIR") or "data") / "MNIST" / "raw"
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, with the paper's Swish, x * sigmoid(x), between them."""
    layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def product_of_experts(experts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return mu and logvar of the product of Gaussian experts, each a (mu, logvar), and of the prior N(0, I).

    With precisions T_i = 1 / var_i (the prior's is 1): T = 1 + sum T_i, mu = sum T_i mu_i / T, var = 1 / T. A missing
    modality is simply not in the list. T_i / T is a softmax of log-precisions, which needs no epsilon and can't overflow.
    """
    prior = torch.zeros_like(experts[0][0])
    mu = torch.stack([prior, *(mu for mu, _ in experts)])
    log_precision = torch.stack([prior, *(-logvar for _, logvar in experts)])
    return (log_precision.softmax(dim=0) * mu).sum(dim=0), -log_precision.logsumexp(dim=0)


class MVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({
            "image": nn.Sequential(nn.Flatten(), mlp(784, HIDDEN, HIDDEN, 2 * N_LATENTS)),
            "text": nn.Sequential(nn.Embedding(10, HIDDEN), mlp(HIDDEN, HIDDEN, 2 * N_LATENTS)),
        })
        self.decoders = nn.ModuleDict({
            "image": mlp(N_LATENTS, HIDDEN, HIDDEN, HIDDEN, 784),  # logits of Bernoulli pixels
            "text": mlp(N_LATENTS, HIDDEN, HIDDEN, HIDDEN, 10),  # logits of the ten classes
        })

    def expert(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, each (batch, latents), of one modality's expert."""
        mu, logvar = self.encoders[name](x).chunk(2, dim=1)
        return mu, logvar

    def log_prob(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x | z) of one modality in nats, (batch,)."""
        logits = self.decoders[name](z)
        if name == "image":  # grey pixels have the cross-entropy, as in the paper
            return -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(dim=1)
        return -F.cross_entropy(logits, x, reduction="none")

    def loss(self, batch: dict[str, Tensor], beta: float, noise: Tensor) -> Tensor:
        """Return the negative sum of the ELBO terms, in nats per example. noise: normal, (terms, batch, latents)."""
        experts = {name: self.expert(name, x) for name, x in batch.items()}
        elbos = []
        for (inputs, reconstructs), ε in zip(TERMS, noise):
            # ELBO = E_q[sum of λ_i log p(x_i | z)] - β KL(q || p), with one draw z from q = q(z | inputs)
            mu, logvar = product_of_experts([experts[name] for name in inputs])
            z = mu + (logvar / 2).exp() * ε
            reconstruction = sum(LAMBDA[name] * self.log_prob(name, batch[name], z) for name in reconstructs)
            kl = 0.5 * (mu.square() + logvar.expm1() - logvar).sum(dim=1)  # to the prior, in closed form
            elbos.append(reconstruction - beta * kl)
        return -torch.stack(elbos).sum(dim=0).mean()


def load(part: str) -> dict[str, Tensor]:
    """Return the images, uint8 (N, 28, 28), and labels (N,) of "train" or "t10k" (test); download what isn't there."""
    found = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = DATA / f"{part}-{kind}-ubyte.gz"
        if not path.exists():
            content = urlopen(MIRROR + path.name, timeout=60).read()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        found.append(torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header))
    return {"image": found[0].view(-1, 28, 28).to(DEVICE), "text": found[1].long().to(DEVICE)}


def batch_of(data: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    return {"image": data["image"][rows].float() / 255, "text": data["text"][rows]}


@torch.no_grad()
def label_accuracy(model: MVAE, data: dict[str, Tensor]) -> float:
    """Return how often the most probable label, given the image alone, is right."""
    batch = batch_of(data, slice(None))
    mu, _ = product_of_experts([model.expert("image", batch["image"])])
    return (model.decoders["text"](mu).argmax(dim=1) == batch["text"]).double().mean().item()


@torch.no_grad()
def digits(model: MVAE, n: int = 10) -> Tensor:
    """Return n digits conditioned on each label, (10 * n, 1, 28, 28). All labels have the same noise."""
    mu, logvar = product_of_experts([model.expert("text", torch.arange(10, device=DEVICE))])
    z = mu.unsqueeze(1) + (logvar / 2).exp().unsqueeze(1) * torch.randn(n, N_LATENTS, device=DEVICE)
    return model.decoders["image"](z).sigmoid().view(-1, 1, 28, 28)  # the pixels' means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the data (default: {EPOCHS})")
    n_epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = load("train"), load("t10k")
    model = MVAE().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)

    for epoch in range(n_epochs):
        start, total = time.perf_counter(), 0.0
        batches = torch.randperm(len(train["text"]), device=DEVICE).split(BATCH_SIZE)
        for step, rows in enumerate(batches, 1):
            # KL annealing: with β = 0 z learns to carry information at no cost, which a full KL term would prevent.
            beta = min(1.0, (epoch + step / len(batches)) / ANNEALING_EPOCHS)
            noise = torch.randn(len(TERMS), len(rows), N_LATENTS, device=DEVICE)
            loss = model.loss(batch_of(train, rows), beta, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        mean, accuracy, seconds = total / len(batches), label_accuracy(model, test), time.perf_counter() - start
        print(f"epoch {epoch + 1}/{n_epochs}  β {beta:.2f}  loss {mean:.2f} nats  ", end="")
        print(f"test labels predicted from images {accuracy:.1%}  {seconds:.0f} s", flush=True)

    save_image(digits(model), "minimal.png", nrow=10)
    print("wrote minimal.png: each row has digits conditioned on one label, from 0 to 9")


if __name__ == "__main__":
    main()
