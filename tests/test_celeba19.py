"""CelebA-19: attributes' networks that run together against the same ones apart, what a step costs, and the scripts."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from celeba19.datasets import CONTROLS
from celeba19.model import MVAE19, build_model
from mvae import MVAE, Bernoulli, Objective, checkpoint, random_subsets
from mvae.datasets.celeba import ATTRIBUTES

from helpers import RunHere, assert_ended, environment, run_warm, stats

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
"""What the terms of a step score."""


class AttributeEncoder(nn.Module):
    """An attribute's encoder of torch's own layers."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.embedding = nn.Embedding(2, 512)
        self.hidden, self.mu, self.logvar = nn.Linear(512, 512), nn.Linear(512, n_latents), nn.Linear(512, n_latents)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.hidden(F.silu(self.embedding(value.long()))))
        return self.mu(hidden), self.logvar(hidden)


class AttributeDecoder(nn.Module):
    """An attribute's decoder of torch's own layers."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(n_latents, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 1)]
        )

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = F.silu(layer(z))
        return self.layers[-1](z).squeeze(1)


def model_of(n_latents: int = LATENTS) -> MVAE19:
    torch.manual_seed(0)
    model = build_model(n_latents)
    assert isinstance(model, MVAE19)
    return model


@pytest.fixture(scope="module")
def model() -> MVAE19:
    return model_of()


@pytest.fixture(scope="module")
def apart(model: MVAE19) -> MVAE:
    """The same image networks beside 18 separate ones for the attributes, of the same weights."""
    result = MVAE(
        encoders={"image": model.encoders["image"], **{name: AttributeEncoder(LATENTS) for name in ATTRIBUTES}},
        likelihoods={
            "image": model.likelihood("image"),
            **{name: Bernoulli(AttributeDecoder(LATENTS)) for name in ATTRIBUTES},
        },
        n_latents=LATENTS,
    )
    together = dict(model.named_parameters())
    for name, weights in weights_apart(result).items():
        for weight, value in zip(weights, together[name].detach(), strict=True):
            weight.data = value.squeeze(0) if weight.dim() == 1 else value if "embedding" in name else value.T
    return result


def weights_apart(apart: MVAE) -> dict[str, list[Tensor]]:
    """By the names of the weights of MVAE19: each attribute's one, which is transposed if it is of a linear layer."""
    found: dict[str, list[Tensor]] = {}
    for kind, networks in (
        ("encoders", [apart.encoders[name] for name in ATTRIBUTES]),
        ("decoders", [apart.likelihood(name).decoder for name in ATTRIBUTES]),
    ):
        for network in networks:
            for name, weight in network.named_parameters():
                name = name.replace("embedding.weight", "embedding")
                found.setdefault(f"attribute_{kind}.{name}", []).append(weight)
    return found


def gradients(model: MVAE, loss: Tensor) -> dict[str, Tensor]:
    """Of all weights, by the names of the weights of MVAE19."""

    def of(weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()

    loss.backward()
    if isinstance(model, MVAE19):
        found = {name: of(weight) for name, weight in model.named_parameters()}
    else:
        found = {name: of(weight) for name, weight in model.named_parameters() if ".image." in name}
        for name, weights in weights_apart(model).items():
            of_all = torch.stack([of(weight) for weight in weights])
            found[name] = of_all.unsqueeze(1) if of_all.dim() == 2 else of_all if "embedding" in name else of_all.mT
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    attributes = {name: torch.randint(2, (N,), generator=rng).float() for name in ATTRIBUTES}
    return {"image": torch.rand(N, 3, 64, 64, generator=rng), **attributes}


def presence() -> dict[str, Tensor]:
    """Example 0 has every modality, the last none, the others some; Bangs is nobody's; Male isn't named: all's."""
    present = torch.rand(19, N, generator=torch.Generator().manual_seed(1)) < 0.5
    present[:, 0], present[:, -1], present[ALL.index("Bangs")] = True, False, False
    return {name: here for name, here in zip(ALL, present, strict=True) if name != "Male"}


def presence_of(names: Sequence[str]) -> Tensor:
    """(names, batch) of `presence`."""
    everyone = torch.ones(N, dtype=torch.bool)
    return torch.stack([presence().get(name, everyone) for name in names])


def mask_of(scored: Sequence[Sequence[str]]) -> Tensor:
    """(terms, modalities, batch): what is scored, of the examples that have it."""
    return presence_of(ALL) & torch.tensor([[name in names for name in ALL] for names in scored]).unsqueeze(-1)


def subsets_of(k: int) -> list[tuple[str, ...]]:
    return random_subsets(ALL, k, np.random.default_rng(0))


def noise_of(k: int) -> Tensor:
    """For 20 terms and k subsets."""
    return torch.randn(20 + k, N, LATENTS, generator=torch.Generator().manual_seed(0))


def assert_near(found: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Equal to a relative error in the Euclidean norm; zero only if zero."""
    error = (found - expected).norm().item()
    assert error <= relative * expected.norm().item(), f"{what} is {error} off"


# The networks


def test_weights_are_those_of_19_encoders_and_19_decoders() -> None:
    model = model_of(100)
    of_encoder = 2 * 512 + (512 + 1) * 512 + (512 + 1) * 200
    of_decoder = (100 + 1) * 512 + 2 * (512 + 1) * 512 + (512 + 1)
    images = {"encoder": model.encoders["image"], "decoder": model.likelihood("image")}
    of_image = {name: sum(weight.numel() for weight in module.parameters()) for name, module in images.items()}
    assert of_image["encoder"] == 4_070_472
    total = sum(weight.numel() for weight in model.parameters())
    assert total == sum(of_image.values()) + 18 * (of_encoder + of_decoder)


def test_each_weight_is_saved_once(model: MVAE19) -> None:
    saved = model.state_dict()
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)
    assert set(dict(model.named_parameters())) <= set(saved)


def test_attributes_have_networks_that_begin_differently(model: MVAE19) -> None:
    for weight in (*model.attribute_encoders.parameters(), *model.attribute_decoders.parameters()):
        assert len(weight.flatten(1).unique(dim=0)) == 18


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bald", "Male", "Wearing_Hat"])
def test_an_attributes_networks_are_the_papers_layers_with_swish(model: MVAE19, apart: MVAE, name: str) -> None:
    values, z = torch.tensor([0.0, 1.0, 1.0]), noise_of(0)[0]
    torch.testing.assert_close(model.encoders[name](values), apart.encoders[name](values))
    torch.testing.assert_close(model.likelihood(name).mean(z), apart.likelihood(name).mean(z))


@torch.no_grad()
def test_absent_and_there_are_different_conditions(model: MVAE19) -> None:
    for name in ATTRIBUTES:
        absent, there = (model.posterior({name: torch.tensor([value])})[0] for value in (0.0, 1.0))
        assert absent.any()
        assert not torch.equal(absent, there)


@torch.no_grad()
@pytest.mark.parametrize("given", [ALL, ("image",), ("Male",), ("image", "Wearing_Hat"), ("Smiling", "Bald", "Male")])
@pytest.mark.parametrize("missing", [False, True])
def test_encodings_are_those_of_networks_apart(
    model: MVAE19, apart: MVAE, batch: dict[str, Tensor], given: Sequence[str], missing: bool
) -> None:
    part = {name: batch[name] for name in given}
    in_order = [name for name in ALL if name in given]
    present = presence_of(in_order) if missing else None
    here = torch.ones(len(given), N, dtype=torch.bool) if present is None else present
    model.eval()
    for found, expected in zip(model.encode(part, present), apart.encode(part, present), strict=True):
        assert found.shape == (len(given), N, LATENTS)
        torch.testing.assert_close(found[here], expected[here])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, N)])
@pytest.mark.parametrize("names", [ALL, ATTRIBUTES, ("image",), ("Smiling", "image", "Bald"), ("Male",), ()])
def test_means_are_those_of_the_likelihoods(model: MVAE19, names: Sequence[str], shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, LATENTS, generator=torch.Generator().manual_seed(0))
    found = model.eval().mean(z, names)
    assert tuple(found) == tuple(names)
    for name in names:
        torch.testing.assert_close(found[name], model.likelihood(name).mean(z))


@torch.no_grad()
def test_scores_are_those_of_the_likelihoods(model: MVAE19, batch: dict[str, Tensor]) -> None:
    z = noise_of(0)[:3]
    found = model.eval().log_prob(z, batch, [ALL] * 3)
    expected = [model.likelihood(name).log_prob(z, batch[name]) for name in ALL]
    torch.testing.assert_close(found, torch.stack(expected, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("scored", SETS)
def test_scores_are_those_of_networks_apart(
    model: MVAE19, apart: MVAE, batch: dict[str, Tensor], scored: Sequence[Sequence[str]], missing: bool
) -> None:
    z, mask = noise_of(0)[: len(scored)], mask_of(scored) if missing else None
    model.eval()
    found, expected = (one.log_prob(z, batch, scored, mask) for one in (model, apart))
    assert found.shape == (len(scored), 19, N)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found == 0, expected == 0)


@torch.no_grad()
@pytest.mark.parametrize("scored", SETS)
def test_mask_lets_through_what_is_scored_and_nothing_else(
    model: MVAE19, batch: dict[str, Tensor], scored: Sequence[Sequence[str]]
) -> None:
    z, shape = noise_of(0)[: len(scored)], (len(scored), 19, N)
    model.eval()
    everything, nothing = (model.log_prob(z, batch, scored, torch.full(shape, value)) for value in (True, False))
    torch.testing.assert_close(everything, model.log_prob(z, batch, scored))
    assert not nothing.any()


@torch.no_grad()
def test_what_no_term_scores_need_not_be_in_the_batch(model: MVAE19, batch: dict[str, Tensor]) -> None:
    z, scored = noise_of(0)[:3], [("Male",), (), ("Male", "Smiling")]
    part = {name: batch[name] for name in ("Smiling", "Male")}
    torch.testing.assert_close(model.log_prob(z, part, scored), model.log_prob(z, batch, scored))
    found = model.log_prob(z, {"image": batch["image"]}, [("image",)] * 3)
    assert not found[:, 1:].any()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("scored", SETS)
def test_what_is_not_scored_has_no_gradient(
    model: MVAE19, batch: dict[str, Tensor], scored: Sequence[Sequence[str]], missing: bool
) -> None:
    """Neither of the latents of terms and examples without a score, nor of the decoders of unscored attributes."""
    z = noise_of(0)[: len(scored)].requires_grad_()
    mask = mask_of(scored) if missing else None
    of_attributes = [[name for name in names if name != "image"] for names in scored]
    counts = torch.tensor([[name in names for name in ATTRIBUTES] for names in of_attributes]).unsqueeze(-1)
    counts = counts.expand(-1, -1, N) if mask is None else counts & mask[:, 1:]
    loss = model.eval().log_prob(z, batch, of_attributes, mask).sum()
    if not counts.any():
        assert not loss.requires_grad or not torch.autograd.grad(loss, z, materialize_grads=True)[0].any()
        return
    of_z, *of_weights = torch.autograd.grad(loss, [z, *model.attribute_decoders.parameters()])
    assert torch.equal(of_z.any(dim=2), counts.any(dim=1))
    for gradient in of_weights:
        assert torch.equal(gradient.flatten(1).any(dim=1), counts.any(dim=2).any(dim=0))


@pytest.mark.parametrize(
    ("reconstruct", "missing"),
    [("given", False), ("given", True), ("all", False), (ATTRIBUTES, False), (("Male",), True)],
)
def test_objective_and_gradients_are_those_of_networks_apart(
    model: MVAE19, apart: MVAE, batch: dict[str, Tensor], reconstruct: str | Sequence[str], missing: bool
) -> None:
    present = presence() if missing else None
    if present:  # an absent row may hold anything finite
        batch = {name: x.clone() for name, x in batch.items()}
        for name, here in present.items():
            batch[name][~here] = 0.75
    results = []
    for one in (model.train(), apart.train()):
        torch.manual_seed(0)  # of the dropout
        objective = Objective(one, weights=dict.fromkeys(ATTRIBUTES, 10.0), reconstruct=reconstruct)
        loss, totals = objective(batch, 0.3, subsets_of(3), present, noise_of(3))
        results.append((loss, totals, gradients(one, loss)))
    (loss, totals, found), (expected_loss, expected_totals, expected) = results
    assert_near(loss, expected_loss, 1e-6, "the loss")
    assert totals[:2] == expected_totals[:2]
    for part, expected_part in zip(totals[2:], expected_totals[2:], strict=True):
        torch.testing.assert_close(part, expected_part)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_near(gradient, expected[name], 1e-4, f"the gradient of {name}")
        assert gradient.any()


@torch.no_grad()
def test_bfloat16_changes_the_loss_by_less_than_a_hundredth(model: MVAE19, batch: dict[str, Tensor]) -> None:
    objective = Objective(model.eval(), weights={"image": 1e-3})
    arguments = batch, 1.0, subsets_of(1), None, noise_of(1)
    expected, _ = objective(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, totals = objective(*arguments)
    assert loss.dtype == totals.log_prob.dtype == totals.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


# What a step computes


@torch.no_grad()
def counts_of_step(model: MVAE19, batch: dict[str, Tensor], *subsets: Sequence[str], **how: Any) -> dict[str, float]:
    """How often networks run in the objective; encodings and decodings in units of the batch, for each modality."""
    counts = {
        "image encodings": 0.0,
        "attribute encodings": 0.0,
        "image decodings": 0.0,
        "attribute decodings": 0.0,
        "attribute decoders' calls": 0.0,
    }

    def count(name: str, amount: Callable[[Any], float]) -> Callable[..., None]:
        return lambda module, inputs, output: counts.update({name: counts[name] + amount(output)})

    image_encoder, image_decoder = model.encoders["image"], model.likelihood("image").decoder
    encoders, decoders = model.attribute_encoders, model.attribute_decoders
    handles = [
        image_encoder.register_forward_hook(count("image encodings", lambda output: len(output[0]) / N)),
        encoders.register_forward_hook(
            count("attribute encodings", lambda output: output[0].flatten(0, 1).shape[0] / N)
        ),
        image_decoder.register_forward_hook(count("image decodings", lambda output: len(output) / N)),
        decoders.register_forward_hook(count("attribute decodings", lambda output: output.numel() / N)),  # a logit each
        decoders.register_forward_hook(count("attribute decoders' calls", lambda output: 1)),
    ]
    Objective(model.train(), **how)(batch, 1.0, subsets)
    for handle in handles:
        handle.remove()
    return counts


def test_without_subsets_a_step_decodes_just_what_its_terms_score(model: MVAE19, batch: dict[str, Tensor]) -> None:
    """The complete term and the single ones: each modality twice."""
    counts = counts_of_step(model, batch)
    assert (counts["image decodings"], counts["attribute decodings"]) == (2, 2 * 18)
    assert counts["attribute decoders' calls"] == 1


@pytest.mark.parametrize("size", [2, 7, 18])
@pytest.mark.parametrize("with_image", [False, True])
def test_subset_decodes_the_attributes_once_more_and_the_image_if_it_has_it(
    model: MVAE19, batch: dict[str, Tensor], size: int, with_image: bool
) -> None:
    counts = counts_of_step(model, batch, ALL[:size] if with_image else ALL[-size:])
    assert (counts["image decodings"], counts["attribute decodings"]) == (2 + with_image, 3 * 18)
    assert counts["attribute decoders' calls"] == 1


def test_k_subsets_are_decoded_at_most_k_more_times_in_the_same_call(model: MVAE19, batch: dict[str, Tensor]) -> None:
    subsets = subsets_of(3)
    counts = counts_of_step(model, batch, *subsets)
    assert counts["image decodings"] == 2 + sum("image" in subset for subset in subsets)
    assert counts["attribute decodings"] <= (2 + 3) * 18
    assert counts["attribute decoders' calls"] == 1


def test_a_step_encodes_each_modality_once(model: MVAE19, batch: dict[str, Tensor]) -> None:
    counts = counts_of_step(model, batch, *subsets_of(3), reconstruct="all")
    assert (counts["image encodings"], counts["attribute encodings"]) == (1, 18)


@torch.no_grad()
def test_weight_of_an_attribute_applies_in_every_term(model: MVAE19, batch: dict[str, Tensor]) -> None:
    """In the complete one, its own, and a subset's: the loss changes by λ's change times its scores in all three."""
    subset = ("image", "Bald", "Smiling")
    losses = {}
    for weight in (10.0, 60.0):
        objective = Objective(model.eval(), weights={"image": 1e-3, "Smiling": weight})
        losses[weight], totals = objective(batch, 1.0, [subset], None, noise_of(1))
    scores = totals.log_prob[:, ALL.index("Smiling")] / N
    assert [totals.terms[t] for t in scores.nonzero().flatten()] == ["joint", "Smiling", "subset"]
    assert (losses[60.0] - losses[10.0]).item() == pytest.approx(-50 * scores.sum().item(), rel=1e-4)


# Conditions


@torch.no_grad()
def test_attributes_that_are_not_given_are_left_out_of_the_product(model: MVAE19) -> None:
    given = {"Male": torch.tensor([1.0]), "Smiling": torch.tensor([0.0])}
    model.eval()
    experts = [model.encoders[name](value) for name, value in given.items()]
    precisions = [(-logvar).exp() for _, logvar in experts]
    precision = 1 + sum(precisions)
    mu, logvar = model.posterior(given)
    torch.testing.assert_close(logvar, -precision.log())
    expected = sum(part * mu for part, (mu, _) in zip(precisions, experts, strict=True)) / precision
    torch.testing.assert_close(mu, expected)


# The scripts


@pytest.fixture(scope="module")
def trained(faces_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of an epoch of two steps has written."""
    folder = tmp_path_factory.mktemp("celeba19")
    flags = ["--n-latents", 6, "--limit", 40, "--batch-size", 20, "--epochs", 1, "--annealing-epochs", 1]
    flags += ["--lambda-attrs", "10.", "--approx-m", 1, "--reconstruct", "attrs"]
    env = environment(MVAE_DATA_DIR=str(faces_dir), MVAE_CACHE_DIR=str(faces_dir / "cache"))
    assert_ended(run_warm("celeba19/train.py", *flags, cwd=folder, env=env))
    return folder / "trained_models"


def elbos(record: dict[str, Any], part: str) -> dict[str, float]:
    """By the names of the terms."""
    return {name.split("/")[1]: value for name, value in record.items() if name.startswith(part) and "/elbo" in name}


def test_training_reports_each_modality_and_the_subsets(trained: Path) -> None:
    (record,) = stats(trained)
    found = elbos(record, "train/")
    assert list(found) == ["joint", *ALL, "subset"]
    assert all(math.isfinite(elbo) for elbo in found.values())
    assert list(elbos(record, "validation/")) == ["joint", *ALL]
    assert 0 < record["validation/attribute_accuracy"] < 1


def test_reconstruct_attrs_scores_all_attributes_in_every_term(trained: Path) -> None:
    (record,) = stats(trained)
    for term in ALL:
        beginning = f"train/{term}/log_prob/"
        scored = {name.removeprefix(beginning) for name in record if name.startswith(beginning)}
        assert scored == {term, *ATTRIBUTES}


def test_approx_m_is_one_unless_it_is_told(run_here: RunHere) -> None:
    done = run_here("celeba19/train.py", "-h")
    assert_ended(done)
    described = " ".join(done.stdout.split()).split(" --approx-m ")[-1]
    assert described.split("(default: ")[1].startswith("1)")


Sample = Callable[..., tuple[bytes, str]]


@pytest.fixture
def sample(run_here: RunHere, trained: Path, tmp_path: Path) -> Sample:
    """Draws 8 faces under conditions: the bytes of their grid, and their lines of attributes."""

    def draw(*condition: object) -> tuple[bytes, str]:
        assert_ended(run_here("celeba19/sample.py", trained / checkpoint.BEST, "--n-samples", 8, *condition))
        return (tmp_path / "sample_image.png").read_bytes(), (tmp_path / "sample_attrs.txt").read_text()

    return draw


def test_attributes_that_are_not_named_are_inferred(sample: Sample, trained: Path) -> None:
    model, _ = checkpoint.load_model(trained / checkpoint.BEST, "celeba19", build_model, torch.device("cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        z = model.draw({"Male": torch.ones(1), "Smiling": torch.zeros(1)}, 8, torch.device("cpu"))
        there = torch.stack([model.likelihood(name).mean(z) > 0.5 for name in ATTRIBUTES], dim=1)
    lines = sample("--condition-on-attrs", "Male,-Smiling", "--seed", 3)[1].splitlines()
    assert lines == CONTROLS["attrs"].lines(there)


def test_every_condition_gives_other_faces(sample: Sample, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.new("L", (30, 70), 90).save(own)
    others = ",".join(f"-{name}" for name in ATTRIBUTES if name != "Male")
    conditions: list[list[object]] = [
        [],
        ["--condition-on-attrs", "Male"],
        ["--condition-on-attrs", "-Male"],
        ["--condition-on-attrs", f"Male,{others}"],
        ["--condition-on-image", own],
        ["--condition-on-image", own, "--condition-on-attrs", "Male,Eyeglasses,-Smiling"],
        ["--condition-on-image", "Male,-Smiling"],
    ]
    assert len({sample(*condition)[0] for condition in conditions}) == len(conditions)


def test_loglike_reports_sets_of_modalities_and_accuracies(run_here: RunHere, trained: Path, tmp_path: Path) -> None:
    few = ["--limit", 20, "--n-samples", 4, "--json", "found.json"]
    done = run_here("celeba19/loglike.py", trained / checkpoint.BEST, *few)
    assert_ended(done)
    found = json.loads((tmp_path / "found.json").read_text())
    short = "Bald, Bangs, ..., Wearing_Hat"
    names = {"image", "image, Bald, ..., Wearing_Hat", f"image | {short}", f"{short} | image", short}
    assert {row["quantity"] for row in found["log_likelihood"]} == {f"log p({name})" for name in names}
    means = {(row["quantity"], row["proposal"]): row["mean"] for row in found["log_likelihood"]}
    assert all(mean < 0 for mean in means.values())
    for proposal in ("q(z | image)", "q(z | image, Bald, ..., Wearing_Hat)"):
        joint, conditional = (means[f"log p({name})", proposal] for name in (
            "image, Bald, ..., Wearing_Hat", f"image | {short}"
        ))  # fmt: skip
        assert joint - conditional == pytest.approx(means[f"log p({short})", "p(z)"], abs=1e-6)
    assert {f"accuracy of {name}" for name in ATTRIBUTES} <= set(found["measures"])
    for name, value in found["measures"].items():
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in done.stdout.splitlines()


def test_coherence_of_faces_is_measured_given_all_attributes(run_here: RunHere, trained: Path, tmp_path: Path) -> None:
    few = ["--n-labels", 12, "--n-pictures", 3, "--n-prior", 5, "--classifier-epochs", 1, "--json", "found.json"]
    assert_ended(run_here("benchmarks/coherence.py", "celeba19", "--model", trained / checkpoint.BEST, *few))
    measures = json.loads((tmp_path / "found.json").read_text())["measures"]
    assert any(f"balanced coherence of {name}" in measures for name in ATTRIBUTES)
    assert all(0 <= value["mean"] <= 1 for value in measures.values())
