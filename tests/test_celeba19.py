"""CelebA-19's networks: the attributes' networks that run together equal single ones, and what a step computes."""

from collections.abc import Callable, Sequence
from typing import Any

import mvae.model
from celeba19.model import MVAE19, build_model
from mvae import MVAE, Objective, Term
from mvae.data.celeba import ATTRIBUTES
from mvae.objective import Totals

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL = ("image", *ATTRIBUTES)
N, LATENTS = 5, 6
SETS: list[list[Sequence[str]]] = [
    [ALL],
    [("image",)],
    [("Male",), ("Smiling",)],
    [(), ("image", "Bald"), ("Bald", "Wearing_Hat"), ALL, ("Bald",), ()],
    [("Smiling",), (), ("Smiling", "Male"), ("image", "Smiling")],
    [ATTRIBUTES, ATTRIBUTES],
    [()],
]
"""What the terms of a step reconstruct."""


@pytest.fixture(scope="module")
def model() -> MVAE19:
    torch.manual_seed(0)
    found = build_model(LATENTS)
    assert isinstance(found, MVAE19)
    return found.eval()


@pytest.fixture(scope="module")
def single(model: MVAE19) -> MVAE:
    """The same networks, each run on its own by the methods of MVAE."""
    likelihoods = {name: model.likelihood(name) for name in ALL}
    encoders = {name: model.encoders[name] for name in ALL}
    return MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=LATENTS).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    attributes = {name: torch.randint(2, (N,), generator=rng).float() for name in ATTRIBUTES}
    return {"image": torch.rand(N, 3, 64, 64, generator=rng), **attributes}


def presence() -> dict[str, Tensor]:
    """Return masks: example 0 has every modality, the last few, no example has Bangs; Male isn't named: all have it."""
    present = torch.rand(19, N, generator=torch.Generator().manual_seed(1)) < 0.5
    present[:, 0], present[:, -1], present[ALL.index("Bangs")] = True, False, False
    return {name: here for name, here in zip(ALL, present, strict=True) if name != "Male"}


def mask_of(model: MVAE, batch: dict[str, Tensor], decoded: Sequence[Sequence[str]]) -> Tensor:
    """Return what is reconstructed of the examples that have it, (terms, modalities, batch)."""
    wanted = torch.tensor([[name in names for name in ALL] for names in decoded])
    return model.presence(batch, presence()) & wanted.unsqueeze(-1)


def mask_of_subsets(*subsets: Sequence[str]) -> Tensor:
    return torch.tensor([[name in subset for name in ALL] for subset in subsets], dtype=torch.bool).view(-1, 19)


SUBSETS = mask_of_subsets(("image", "Male", "Bald"), ATTRIBUTES[3:9], ("Smiling", "Bangs"))


def noise_of(k: int) -> Tensor:
    """Return noise for 20 terms and k subsets."""
    return torch.randn(20 + k, N, LATENTS, generator=torch.Generator().manual_seed(0))


def terms_of(also: Sequence[str] = ()) -> list[Term]:
    return [Term(ALL, ALL), *(Term((name,), (name, *also)) for name in ALL)]


def assert_near(found: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Equal to a relative error in the Euclidean norm; zero only if zero."""
    error = (found - expected).norm().item()
    assert error <= relative * expected.norm().item(), f"{what} is {error} off"


# The networks


def test_weights_are_those_of_19_encoders_and_19_decoders_each_saved_once() -> None:
    model = build_model(100)
    of_encoder = 2 * 512 + (512 + 1) * 512 + (512 + 1) * 200
    of_decoder = (100 + 1) * 512 + 2 * (512 + 1) * 512 + (512 + 1)
    images = (model.encoders["image"], model.likelihood("image"))
    of_image = sum(weight.numel() for module in images for weight in module.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == of_image + 18 * (of_encoder + of_decoder)
    saved = model.state_dict()
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)
    assert set(dict(model.named_parameters())) <= set(saved)
    for name, weight in model.named_parameters():  # each attribute begins with its own
        if name.startswith("attribute"):
            assert len(weight.flatten(1).unique(dim=0)) == 18


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bald", "Male", "Wearing_Hat"])
def test_an_attributes_networks_are_linear_layers_with_swish(model: MVAE19, name: str) -> None:
    i, values, z = ATTRIBUTES.index(name), torch.tensor([0.0, 1.0, 1.0]), noise_of(0)[0]

    def linear(layer: Any, x: Tensor) -> Tensor:
        return x @ layer.weight[i] + layer.bias[i]

    encoders = model.attribute_encoders
    hidden = F.silu(linear(encoders.hidden, F.silu(encoders.embedding[i][values.long()])))
    expected = linear(encoders.mu, hidden), linear(encoders.logvar, hidden)
    torch.testing.assert_close(model.encoders[name](values), expected)
    first, *others = model.attribute_decoders.layers
    logits = linear(first, z)
    for layer in others:
        logits = linear(layer, F.silu(logits))
    torch.testing.assert_close(model.likelihood(name).mean(z), logits.squeeze(1).sigmoid())


@torch.no_grad()
def test_encodings_and_means_are_those_of_single_attributes(
    model: MVAE19, single: MVAE, batch: dict[str, Tensor]
) -> None:
    z = torch.randn(2, 3, N, LATENTS, generator=torch.Generator().manual_seed(0))
    for names in (ALL, ("image",), ("Male",), ("image", "Wearing_Hat"), ("Smiling", "image", "Bald"), ATTRIBUTES):
        means = model.mean(z, names)
        assert tuple(means) == names
        torch.testing.assert_close(means, single.mean(z, names))
        part = {name: batch[name] for name in names}
        for present in ({}, {name: here for name, here in presence().items() if name in part}):
            torch.testing.assert_close(model.posterior(part, present), single.posterior(part, present))
    zero, one = (model.posterior({"Bald": torch.tensor([value])})[0] for value in (0.0, 1.0))
    assert zero.any()  # an absent attribute is a condition
    assert not torch.equal(zero, one)


@torch.no_grad()
@pytest.mark.parametrize("missing", [False, True])
def test_scores_are_those_of_single_attributes(
    model: MVAE19, single: MVAE, batch: dict[str, Tensor], missing: bool
) -> None:
    for decoded in SETS:
        mask = mask_of(model, batch, decoded) if missing else None
        z = noise_of(0)[: len(decoded)]
        found, expected = (one.log_prob(z, batch, decoded, mask) for one in (model, single))
        assert found.shape == (len(decoded), 19, N)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)
        if part := {name: x for name, x in batch.items() if any(name in names for names in decoded)}:
            torch.testing.assert_close(model.log_prob(z, part, decoded, mask), found)  # others need not be there


@pytest.mark.parametrize(
    ("also", "missing", "fixed"),
    [((), False, True), ((), True, False), (ALL, False, True), (ATTRIBUTES, False, False), (("Male",), True, True)],
)
def test_objective_and_gradients_are_those_of_single_attributes(
    model: MVAE19,
    single: MVAE,
    batch: dict[str, Tensor],
    also: Sequence[str],
    missing: bool,
    fixed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Absent rows may hold any finite value."""
    present = presence() if missing else None
    names, weights = zip(*model.named_parameters(), strict=True)
    results: list[tuple[Tensor, Totals, tuple[Tensor, ...]]] = []
    for one, value in ((single, 0.75), (model, -3.0)):
        given = {
            name: torch.where((present or {}).get(name, torch.ones(N).bool()).view(-1, *[1] * (x.dim() - 1)), x, value)
            for name, x in batch.items()
        }
        how: dict[str, Any] = {"weights": dict.fromkeys(ATTRIBUTES, 10.0), "subset_also": also}
        loss, totals = Objective(one, terms_of(also), **how)(given, 0.3, SUBSETS, present, noise_of(3))
        results.append((loss, totals, torch.autograd.grad(loss, weights)))
        monkeypatch.setattr(mvae.model, "has_fixed_shapes", lambda device: fixed)  # of the second model
    (expected_loss, expected_totals, expected), (loss, totals, found) = results
    assert_near(loss, expected_loss, 1e-6, "the loss")
    assert totals[:2] == expected_totals[:2]
    for part, expected_part in zip(totals[2:], expected_totals[2:], strict=True):
        torch.testing.assert_close(part, expected_part)
    for name, gradient, expected_gradient in zip(names, found, expected, strict=True):
        assert_near(gradient, expected_gradient, 1e-4, f"the gradient of {name}")
        assert gradient.any()


@torch.no_grad()
def test_bfloat16_changes_the_loss_by_less_than_a_hundredth(model: MVAE19, batch: dict[str, Tensor]) -> None:
    objective = Objective(model, weights={"image": 1e-3})
    arguments = batch, 1.0, SUBSETS, None, noise_of(3)
    expected, _ = objective(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, totals = objective(*arguments)
    assert loss.dtype == totals.log_prob.dtype == totals.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


# What a step computes


@torch.no_grad()
def counts_of_step(model: MVAE19, batch: dict[str, Tensor], subsets: Tensor, also: Sequence[str]) -> list[float]:
    """Return image and attribute encodings, then decodings, in units of the batch; and calls of the decoders."""
    counts = [0.0] * 5

    def count(which: int, amount: Callable[[Any], float]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            counts[which] += amount(output)

        return hook

    image_encoder, image_decoder = model.encoders["image"], model.likelihood("image").decoder
    encoders, decoders = model.attribute_encoders, model.attribute_decoders
    handles = [
        image_encoder.register_forward_hook(count(0, lambda output: len(output[0]) / N)),
        encoders.register_forward_hook(count(1, lambda output: output[0].flatten(0, 1).shape[0] / N)),
        image_decoder.register_forward_hook(count(2, lambda output: len(output) / N)),
        decoders.register_forward_hook(count(3, lambda output: output.numel() / N)),  # a logit each
        decoders.register_forward_hook(count(4, lambda output: 1)),
    ]
    Objective(model, terms_of(also), subset_also=also)(batch, 1.0, subsets)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(
    ("subsets", "also", "images", "attributes"),
    [
        ([], (), 2, 2),  # each modality in the joint term and in its own
        ([ALL[-7:]], (), 2, 3),  # all attributes have as many rows
        ([ALL[:7], ALL[5:9], ("Male", "Bald")], (), 3, 5),
        ([ALL[:7]], ALL, 21, 21),
    ],
)
def test_a_step_encodes_once_and_decodes_what_its_terms_reconstruct(
    model: MVAE19,
    batch: dict[str, Tensor],
    subsets: list[Sequence[str]],
    also: Sequence[str],
    images: int,
    attributes: int,
) -> None:
    found = counts_of_step(model, batch, mask_of_subsets(*subsets), also)
    assert found == [1, 18, images, 18 * attributes, 1]


def test_with_fixed_shapes_the_image_is_decoded_for_the_terms_that_may_reconstruct_it(
    model: MVAE19, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvae.model, "has_fixed_shapes", lambda device: True)
    assert counts_of_step(model, batch, mask_of_subsets(ALL[-7:]), ()) == [1, 18, 3, 18 * 3, 1]
