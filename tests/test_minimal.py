"""minimal.py: the same loss and gradients as the library's, and a picture at its end."""

from pathlib import Path

import minimal
from mnist.model import build_model
from mvae import MVAE, Objective, Term, experts

import cv2
import pytest
import torch
from torch import Tensor

from helpers import assert_ended, environment, run_warm

PAPER = [(("image", "text"), ("image", "text")), (("image",), ("image",)), (("text",), ("text",))]


def pairs(ours: MVAE, copy: minimal.MVAE) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Return the weights that correspond to each other: a layer for mu and one for logvar are one layer in the copy."""
    found: list[tuple[tuple[Tensor, ...], Tensor]] = []
    for name in ours.modalities:
        *hidden, mu_weight, mu_bias, logvar_weight, logvar_bias = ours.encoders[name].parameters()
        weights = [*((weight,) for weight in hidden), (mu_weight, logvar_weight), (mu_bias, logvar_bias)]
        found += zip(weights, copy.encoders[name].parameters(), strict=True)
        decoders = ours.decoders[name].parameters(), copy.decoders[name].parameters()
        found += (((one,), other) for one, other in zip(*decoders, strict=True))
    return found


@pytest.mark.parametrize("terms", [minimal.TERMS, PAPER], ids=["its terms", "the paper's"])
def test_loss_and_gradients_are_the_librarys(
    terms: list[tuple[tuple[str, ...], tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minimal, "TERMS", terms)
    torch.manual_seed(0)
    ours, copy = build_model(minimal.N_LATENTS), minimal.MVAE()
    image, label = torch.rand(20, 784), torch.randint(10, (20,))
    noise = torch.randn(len(terms), 20, minimal.N_LATENTS)
    with torch.no_grad():
        for weights, weight in pairs(ours, copy):
            weight.copy_(torch.cat(weights))

    objective = Objective(ours, [Term(*term) for term in terms], weights=minimal.LAMBDA)
    expected, _ = objective({"image": image.view(-1, 1, 28, 28), "text": label}, 0.3, noise=noise)
    loss = copy.loss({"image": image, "text": label}, 0.3, noise)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    for weights, weight in pairs(ours, copy):
        torch.testing.assert_close(weight.grad, torch.cat([one.grad for one in weights if one.grad is not None]))


def test_product_is_the_librarys_at_extreme_variances() -> None:
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, 500, 3), torch.rand(2, 500, 3) * 160 - 80
    found = minimal.product_of_experts(list(zip(mu, logvar, strict=True)))
    for part, expected in zip(found, experts.product(mu, logvar), strict=True):
        torch.testing.assert_close(part, expected[0])


def test_script_trains_and_draws_a_row_of_digits_for_each_label(digits_dir: Path, tmp_path: Path) -> None:
    env = environment(MVAE_DATA_DIR=str(digits_dir))
    done = run_warm("minimal.py", "--epochs", 1, cwd=tmp_path, env=env)
    assert_ended(done)
    assert done.stdout.startswith("epoch 1/1  β 0.33  loss ")
    picture = cv2.imread(str(tmp_path / "minimal.png"))
    assert picture is not None
    assert picture.shape == (10 * 30 + 2, 10 * 30 + 2, 3)  # 28 pixels each, and 2 between
    assert picture.std() > 10
