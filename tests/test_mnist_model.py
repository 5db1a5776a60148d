"""MNIST's networks, and what the MVAE does with the modalities that it is given."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist.model import build_model
from mvae import experts
from mvae.errors import UsageError
from mvae.likelihoods import Categorical
from mvae.model import MVAE

N_LATENTS = 64


@pytest.fixture(scope="module")
def model() -> MVAE:
    torch.manual_seed(0)
    return build_model(N_LATENTS)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Random pictures and labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(7, 1, 28, 28, generator=generator)
    return {"image": image, "text": torch.randint(10, (7,), generator=generator)}


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_inference_networks_have_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders) == 1_063_680


def test_image_encoder_has_the_papers_number_of_parameters(model: MVAE) -> None:
    assert n_parameters(model.encoders["image"]) == 730_240


def test_activations_are_swish(model: MVAE) -> None:
    kinds = {type(layer) for layer in model.modules() if not any(True for _ in layer.children())}
    assert kinds == {nn.Linear, nn.SiLU, nn.Embedding, nn.Flatten, nn.Unflatten}


def test_decoders_give_a_picture_and_ten_probabilities(model: MVAE) -> None:
    z = torch.zeros(5, N_LATENTS)
    assert model.likelihood("image").mean(z).shape == (5, 1, 28, 28)
    assert model.likelihood("text").mean(z).shape == (5, 10)
    assert isinstance(model.likelihood("text"), Categorical)


def test_label_encoder_is_the_network_run_on_each_label(model: MVAE, batch: dict[str, Tensor]) -> None:
    encoder: Any = model.encoders["text"]
    hidden = encoder.hidden(encoder.embedding(batch["text"]))
    torch.testing.assert_close(encoder(batch["text"]), (encoder.mu(hidden), encoder.logvar(hidden)))


@pytest.mark.parametrize("name", ["image", "text"])
def test_encode_takes_a_part_of_the_modalities(model: MVAE, batch: dict[str, Tensor], name: str) -> None:
    mu, logvar = model.encode({name: batch[name]})
    assert mu.shape == logvar.shape == (1, 7, N_LATENTS)
    torch.testing.assert_close((mu[0], logvar[0]), model.encoders[name](batch[name]))


def test_encode_is_in_the_models_order(model: MVAE, batch: dict[str, Tensor]) -> None:
    reverse = {"text": batch["text"], "image": batch["image"]}
    torch.testing.assert_close(model.encode(reverse), model.encode(batch))
    torch.testing.assert_close(model.encode(batch)[0][1], model.encoders["text"](batch["text"])[0])


def test_absent_examples_are_not_encoded(model: MVAE, batch: dict[str, Tensor]) -> None:
    present = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0] * 7]).bool()
    unseen = {"image": batch["image"].masked_fill(~present[0].view(7, 1, 1, 1), torch.nan), "text": batch["text"]}
    mu, logvar = model.encode(unseen, present)
    expected = model.encoders["image"](batch["image"])
    for found, part in zip((mu, logvar), expected, strict=True):
        torch.testing.assert_close(found[0, present[0]], part[present[0]])
        assert (found[0, ~present[0]] == 0).all()
        assert (found[1] == 0).all()


@pytest.mark.parametrize("given", [("image",), ("text",), ("image", "text")])
def test_posterior_is_the_product_of_prior_and_given_experts(
    model: MVAE, batch: dict[str, Tensor], given: tuple[str, ...]
) -> None:
    encoded = [model.encoders[name](batch[name]) for name in given]
    precision = 1 + torch.stack([(-logvar).exp() for _, logvar in encoded]).sum(dim=0)
    mu, logvar = model.posterior({name: batch[name] for name in given})
    torch.testing.assert_close(mu, sum(mu * (-logvar).exp() for mu, logvar in encoded) / precision)
    torch.testing.assert_close(logvar, -precision.log())


def test_draws_given_nothing_are_from_the_prior(model: MVAE) -> None:
    torch.manual_seed(0)
    z = model.draw({}, 20_000, torch.device("cpu"))
    assert z.shape == (20_000, N_LATENTS)
    assert z.mean(dim=0).abs().max() < 5 / 20_000**0.5
    assert (z.var(dim=0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("given", [("image",), ("text",), ("image", "text")])
def test_draws_given_an_example_are_from_its_posterior(
    model: MVAE, batch: dict[str, Tensor], given: tuple[str, ...]
) -> None:
    example = {name: batch[name][3:4] for name in given}
    mu, logvar = model.posterior(example)
    torch.manual_seed(0)
    z = model.draw(example, 1000, torch.device("cpu"))
    torch.manual_seed(0)
    noise = torch.randn(1000, N_LATENTS)
    torch.testing.assert_close(z, experts.draw(mu, logvar, noise))
    assert ((z.mean(dim=0) - mu[0]).abs() < 5 * (logvar[0] / 2).exp() / 1000**0.5).all()


def test_label_zero_is_a_label(model: MVAE) -> None:
    mu, _ = model.posterior({"text": torch.tensor([0])})
    assert not torch.equal(mu, torch.zeros_like(mu))
    assert not torch.equal(mu, model.posterior({"text": torch.tensor([1])})[0])


def test_encoders_and_likelihoods_are_for_the_same_modalities(model: MVAE) -> None:
    with pytest.raises(UsageError, match=r"\['image'\].*\['image', 'text'\]"):
        MVAE(
            encoders={"image": model.encoders["image"]},
            likelihoods={name: model.likelihood(name) for name in model.modalities},
            n_latents=N_LATENTS,
        )
