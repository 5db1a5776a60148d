"""CelebA-19: attributes' networks that run together against the same ones apart, what a step costs, and the scripts."""

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mvae.attributes import lines
from PIL import Image
from torch import Tensor, nn

from mvae import checkpoint
from mvae.datasets.celeba import ATTRIBUTES
from mvae.errors import UsageError
from mvae.model import MVAE
from mvae.objective import Objective, random_subsets

from helpers import assert_ended, environment, experiment_module, run, stats

datasets = experiment_module("celeba19/datasets.py")
with mock.patch.dict(sys.modules, {"datasets": datasets}):
    networks = experiment_module("celeba19/model.py")
with mock.patch.dict(sys.modules, {"datasets": datasets, "model": networks}):
    training, sampling, estimating = (experiment_module(f"celeba19/{n}.py") for n in ("train", "sample", "loglike"))

ALL = ("image", *ATTRIBUTES)
N, LATENTS = 5, 6
RunHere = Callable[..., None]


class OneByOne(networks.MVAE19):  # type: ignore[name-defined]
    """The attributes' networks run one by one, as the base class runs those of any modalities."""

    encode, log_prob = MVAE.encode, MVAE.log_prob


def model_of(n_latents: int = LATENTS) -> Any:
    torch.manual_seed(0)
    return networks.build_model(n_latents)


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def plain(model: Any) -> Any:
    """The same networks, one by one."""
    result = copy.copy(model)
    result.__class__ = OneByOne
    return result


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


def test_each_weight_is_saved_once(model: Any) -> None:
    saved = model.state_dict()
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)
    assert set(dict(model.named_parameters())) <= set(saved)


def test_attributes_have_networks_that_begin_differently(model: Any) -> None:
    for weight in (*model.attribute_encoders.parameters(), *model.attribute_decoders.parameters()):
        assert len(weight.flatten(1).unique(dim=0)) == 18


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bald", "Male", "Wearing_Hat"])
def test_an_attributes_networks_are_the_papers_layers_with_swish(model: Any, name: str) -> None:
    i, swish, values, z = ATTRIBUTES.index(name), nn.functional.silu, torch.tensor([0.0, 1.0, 1.0]), noise_of(0)[0]
    encoders, decoders = model.attribute_encoders, model.attribute_decoders

    def linear(layer: Any, x: Tensor) -> Tensor:
        return x @ layer.weight[i] + layer.bias[i]

    hidden = swish(linear(encoders.hidden, swish(encoders.embedding[i][values.long()])))
    expected = linear(encoders.mu, hidden), linear(encoders.logvar, hidden)
    torch.testing.assert_close(model.encoders[name](values), expected)
    hidden = z
    for layer in decoders.layers[:-1]:
        hidden = swish(linear(layer, hidden))
    expected_mean = linear(decoders.layers[-1], hidden).squeeze(1).sigmoid()
    torch.testing.assert_close(model.likelihood(name).mean(z), expected_mean)


@torch.no_grad()
def test_absent_and_there_are_different_conditions(model: Any) -> None:
    for name in ATTRIBUTES:
        absent, there = (model.posterior({name: torch.tensor([value])})[0] for value in (0.0, 1.0))
        assert absent.any()
        assert not torch.equal(absent, there)


@torch.no_grad()
@pytest.mark.parametrize("given", [ALL, ("image",), ("Male",), ("image", "Wearing_Hat"), ("Smiling", "Bald", "Male")])
@pytest.mark.parametrize("missing", [False, True])
def test_encodings_are_those_one_by_one(
    model: Any, plain: Any, batch: dict[str, Tensor], given: Sequence[str], missing: bool
) -> None:
    part = {name: batch[name] for name in given}
    in_order = [name for name in ALL if name in given]
    everyone = torch.ones(N, dtype=torch.bool)
    present = torch.stack([presence().get(name, everyone) for name in in_order]) if missing else None
    here = torch.ones(len(given), N, dtype=torch.bool) if present is None else present
    model.eval()
    for found, expected in zip(model.encode(part, present), plain.encode(part, present), strict=True):
        torch.testing.assert_close(found[here], expected[here])


@torch.no_grad()
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "scored",
    [
        [ALL],
        [("image",)],
        [("Male",), ("Smiling",)],
        [(), ("image", "Bald"), ("Bald", "Wearing_Hat"), ALL, ("Bald",), ()],
        [ATTRIBUTES, ATTRIBUTES],
        [()],
    ],
)
def test_scores_are_those_one_by_one(
    model: Any, plain: Any, batch: dict[str, Tensor], scored: Sequence[Sequence[str]], missing: bool
) -> None:
    z, mask = noise_of(0)[: len(scored)], None
    if missing:
        everyone = torch.ones(N, dtype=torch.bool)
        present = torch.stack([presence().get(name, everyone) for name in ALL])
        mask = present & torch.tensor([[name in names for name in ALL] for names in scored]).unsqueeze(-1)
    model.eval()
    found, expected = (one.log_prob(z, batch, scored, mask) for one in (model, plain))
    assert found.shape == (len(scored), 19, N)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize(
    ("reconstruct", "missing"),
    [("given", False), ("given", True), ("all", False), (ATTRIBUTES, False), (("Male",), True)],
)
def test_objective_and_gradients_are_those_one_by_one(
    model: Any, plain: Any, batch: dict[str, Tensor], reconstruct: str | Sequence[str], missing: bool
) -> None:
    present = presence() if missing else None
    if present:  # an absent row may hold anything finite
        batch = {name: x.clone() for name, x in batch.items()}
        for name, here in present.items():
            batch[name][~here] = 7.0
    results = []
    model.train()
    for one in (model, plain):
        torch.manual_seed(0)  # of the dropout
        objective = Objective(one, weights=dict.fromkeys(ATTRIBUTES, 10.0), reconstruct=reconstruct)
        loss, totals = objective(batch, 0.3, subsets_of(3), present, noise_of(3))
        names, weights = zip(*one.named_parameters(), strict=True)
        results.append((loss, totals, torch.autograd.grad(loss, weights, materialize_grads=True)))
    (loss, totals, gradients), (expected_loss, expected_totals, expected_gradients) = results
    assert_near(loss, expected_loss, 1e-6, "the loss")
    for part, expected in zip(totals, expected_totals, strict=True):
        torch.testing.assert_close(part, expected)
    for name, gradient, expected in zip(names, gradients, expected_gradients, strict=True):
        assert_near(gradient, expected, 1e-4, f"the gradient of {name}")
    assert all(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_bfloat16_changes_the_loss_by_less_than_a_hundredth(model: Any, batch: dict[str, Tensor]) -> None:
    objective = Objective(model.eval(), weights={"image": 1e-3})
    arguments = batch, 1.0, subsets_of(1), None, noise_of(1)
    expected, _ = objective(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, totals = objective(*arguments)
    assert loss.dtype == totals.log_prob.dtype == totals.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


# What a step computes


@torch.no_grad()
def counts_of_step(model: Any, batch: dict[str, Tensor], *subsets: Sequence[str], **settings: Any) -> dict[str, float]:
    """How often networks run in the objective; encodings and decodings in units of the batch, for each modality."""
    counts = {"image encodings": 0.0, "attribute encodings": 0.0, "decodings": 0.0, "attribute decoders' calls": 0.0}

    def count(name: str, amount: Callable[[Any], float]) -> Callable[..., None]:
        return lambda module, inputs, output: counts.update({name: counts[name] + amount(output)})

    encoders, decoders = model.attribute_encoders, model.attribute_decoders
    handles = [
        model.encoders["image"].register_forward_hook(count("image encodings", lambda output: len(output[0]) / N)),
        encoders.register_forward_hook(
            count("attribute encodings", lambda output: output[0].flatten(0, 1).shape[0] / N)
        ),
        model.likelihood("image").decoder.register_forward_hook(count("decodings", lambda output: len(output) / N)),
        decoders.register_forward_hook(count("decodings", lambda output: output.numel() / N)),  # a logit each
        decoders.register_forward_hook(count("attribute decoders' calls", lambda output: 1)),
    ]
    Objective(model.train(), **settings)(batch, 1.0, subsets)
    for handle in handles:
        handle.remove()
    return counts


def test_a_step_decodes_what_its_terms_score_48_on_average(model: Any, batch: dict[str, Tensor]) -> None:
    """The complete term and the single ones decode 19 each; a random subset's size is uniform from 2 to 18."""
    decodings = []
    for size in range(2, 19):
        subset = ALL[:size] if size % 2 else ALL[-size:]  # with the image, and without
        counts = counts_of_step(model, batch, subset)
        assert counts["decodings"] == pytest.approx(19 + 19 + size)
        assert counts["attribute decoders' calls"] <= 2
        decodings.append(counts["decodings"])
    assert sum(decodings) / len(decodings) == pytest.approx(48)


def test_a_step_encodes_each_modality_once(model: Any, batch: dict[str, Tensor]) -> None:
    counts = counts_of_step(model, batch, *subsets_of(3), reconstruct="all")
    assert (counts["image encodings"], counts["attribute encodings"]) == (1, 18)


def test_k_subsets_are_decoded_in_at_most_k_more_calls(model: Any, batch: dict[str, Tensor]) -> None:
    subsets = subsets_of(3)
    counts = counts_of_step(model, batch, *subsets)
    assert counts["decodings"] == pytest.approx(38 + sum(map(len, subsets)))
    assert counts["attribute decoders' calls"] <= 4


@torch.no_grad()
def test_weight_of_an_attribute_applies_in_every_term(model: Any, batch: dict[str, Tensor]) -> None:
    """In the complete one, its own, and a subset's: the loss changes by λ's change times its scores in all three."""
    subset = ("image", "Bald", "Smiling")
    losses = {}
    for weight in (10.0, 60.0):
        objective = Objective(model.eval(), weights={"image": 1e-3, "Smiling": weight})
        losses[weight], totals = objective(batch, 1.0, [subset], None, noise_of(1))
    scores = totals.log_prob[:, ALL.index("Smiling")] / N
    terms = [*(term.given for term in objective.terms), subset]
    assert [terms[t] for t in scores.nonzero().flatten()] == [ALL, ("Smiling",), subset]
    assert (losses[60.0] - losses[10.0]).item() == pytest.approx(-50 * scores.sum().item(), rel=1e-4)


# Conditions


@torch.no_grad()
def test_attributes_that_are_not_given_are_left_out_of_the_product(model: Any) -> None:
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
    assert_ended(run("celeba19/train.py", *flags, cwd=folder, env=env))
    return folder / "trained_models"


def test_training_reports_each_modality_and_the_subsets(trained: Path) -> None:
    (record,) = stats(trained)
    terms = record["train"]["terms"]
    assert list(terms) == ["+".join(ALL), *ALL, "subset"]
    assert all(math.isfinite(term["elbo"]) for term in terms.values())
    assert list(record["validation"]["terms"]) == list(terms)[:-1]


def test_reconstruct_attrs_scores_all_attributes_in_every_term(trained: Path) -> None:
    (record,) = stats(trained)
    for name in ("image", *ATTRIBUTES):
        assert set(record["train"]["terms"][name]["reconstruction"]) == {name, *ATTRIBUTES}


def test_subsets_and_compiling_exclude_each_other(run_here: RunHere, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--approx-m 0") as caught:
        run_here(training, "--approx-m", 1, "--compile", "--out-dir", tmp_path / "new")
    assert caught.value.status == 2
    assert list(tmp_path.iterdir()) == []


def test_approx_m_is_one_unless_it_is_told(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(training, "-h")
    assert ended.value.code == 0
    described = " ".join(capsys.readouterr().out.split()).split(" --approx-m ")[-1]
    assert described.split("(default: ")[1].startswith("1)")


Sample = Callable[..., tuple[bytes, str]]


@pytest.fixture
def sample(run_here: RunHere, trained: Path, tmp_path: Path) -> Sample:
    """Draws 8 faces under conditions: the bytes of their grid, and their lines of attributes."""

    def draw(*condition: object) -> tuple[bytes, str]:
        run_here(sampling, trained / checkpoint.BEST, "--out-dir", tmp_path, "--n-samples", 8, *condition)
        return (tmp_path / "sample_image.png").read_bytes(), (tmp_path / "sample_attrs.txt").read_text()

    return draw


def test_attributes_that_are_not_named_are_inferred(sample: Sample, trained: Path) -> None:
    model, _ = checkpoint.load_model(trained / checkpoint.BEST, "celeba19", networks.build_model, torch.device("cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        z = model.draw({"Male": torch.ones(1), "Smiling": torch.zeros(1)}, 8, torch.device("cpu"))
        there = torch.stack([model.likelihood(name).mean(z) > 0.5 for name in ATTRIBUTES], dim=1)
    assert sample("--condition-on-attrs", "Male,-Smiling", "--seed", 3)[1] == lines(there)


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


def test_loglike_reports_sets_of_modalities_and_accuracies(
    run_here: RunHere, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    run_here(estimating, trained / checkpoint.BEST, "--limit", 20, "--n-samples", 4, "--json", file)
    said = capsys.readouterr().out
    found = json.loads(file.read_text())
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
        assert f"{name}: {value['mean']:.4f} ± {value['standard_error']:.4f}" in said.splitlines()
