"""The networks of the experiments, and the layers that they share."""

from typing import Any

from celeba.model import build_model as build_celeba
from celeba19.model import build_model as build_celeba19
from fashionmnist.model import build_model as build_fashionmnist
from mnist.model import build_model as build_mnist
from mvae import MVAE
from mvae.layers import FoldConvTranspose2d, Permute

import pytest
import torch
from torch import nn

SWISH = {nn.Linear, nn.SiLU, nn.Embedding, nn.Flatten, nn.Unflatten}
NETWORKS = {
    "mnist": (build_mnist(64), 1_063_680, 730_240),
    "fashionmnist": (build_fashionmnist(64), 3_742_976, 3_409_536),
    "celeba": (build_celeba(100), 4_447_504, 4_070_472),
}
"""Models, and the paper's number of parameters of the inference networks, and of the image's alone."""


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("model", "n_all", "n_image"), NETWORKS.values(), ids=NETWORKS)
def test_inference_networks_have_the_papers_number_of_parameters(model: MVAE, n_all: int, n_image: int) -> None:
    assert n_parameters(model.encoders) == n_all
    assert n_parameters(model.encoders["image"]) == n_image


def test_layers_are_the_papers() -> None:
    def kinds(model: MVAE) -> set[type]:
        return {type(layer) for layer in model.modules() if not any(True for _ in layer.children())}

    convolutions = {nn.Conv2d, nn.ConvTranspose2d, Permute}
    assert kinds(NETWORKS["mnist"][0]) == SWISH
    assert kinds(NETWORKS["fashionmnist"][0]) == SWISH | convolutions | {FoldConvTranspose2d}
    assert kinds(NETWORKS["celeba"][0]) == SWISH - {nn.Embedding} | convolutions | {
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.Dropout,
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "image", "label"),
    [
        (NETWORKS["mnist"][0], (1, 28, 28), {"text": torch.arange(5)}),
        (NETWORKS["fashionmnist"][0], (1, 28, 28), {"text": torch.arange(5)}),
        (NETWORKS["celeba"][0], (3, 64, 64), {"attrs": torch.zeros(5, 18)}),
        (build_celeba19(100), (3, 64, 64), {"Male": torch.zeros(5), "Smiling": torch.ones(5)}),
    ],
    ids=[*NETWORKS, "celeba19"],
)
def test_networks_map_data_to_a_posterior_and_latents_to_means(
    model: MVAE, image: tuple[int, ...], label: dict[str, torch.Tensor]
) -> None:
    batch = {"image": torch.rand(5, *image), **label}
    model.eval().check(batch, names=tuple(batch))
    mu, logvar = model.posterior(batch)
    assert mu.shape == logvar.shape == (5, model.n_latents)
    assert model.posterior(label)[0].any()
    means = model.mean(mu, tuple(batch))
    assert means["image"].shape == (5, *image)
    if "text" in means:
        torch.testing.assert_close(means["text"].sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_label_encoder_is_the_network_run_on_each_label(name: str) -> None:
    encoder: Any = NETWORKS[name][0].encoders["text"]
    labels = torch.tensor([3, 0, 3, 9])
    hidden = encoder.hidden(encoder.embedding(labels))
    torch.testing.assert_close(encoder(labels), (encoder.mu(hidden), encoder.logvar(hidden)))


# Layers


@pytest.mark.parametrize(
    ("channels", "geometry"),
    [((8, 1), (4, 2, 1)), ((3, 5), (4, 2, 0)), ((1, 2), (5, 2, 1)), ((3, 5), (3, 3, 2)), ((1, 2), (1, 1, 0))],
)
def test_transposed_convolution_as_a_product_is_torchs(
    channels: tuple[int, int], geometry: tuple[int, int, int]
) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        plain = nn.ConvTranspose2d(*channels, *geometry, bias=False).double()
        torch.manual_seed(0)
        product = FoldConvTranspose2d(*channels, *geometry, bias=False).double()
        assert torch.equal(product.weight, plain.weight)
        product, x = product.to(memory_format=memory_format), torch.randn(2, channels[0], 4, 5).double()
        x = x.to(memory_format=memory_format).requires_grad_()
        found, expected = product(x), plain(x)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        gradients = torch.autograd.grad(found, [x, product.weight], direction)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, plain.weight], direction))
