"""What a step does on a GPU, tested without one: on fake CUDA tensors, and in compiled steps.

On a fake tensor whatever would make the host wait for the device fails, as do tensors of two devices in one operation.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from celeba19.datasets import separated
from mvae import MVAE, Objective, Term
from mvae.data.celeba import ATTRIBUTES, pictures_and_attributes
from mvae.data.dataset import pictures_and_labels
from mvae.model import rows_of
from mvae.objective import Totals
from vision.datasets import six

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from helpers import small_data, small_model

CUDA = torch.device("cuda")
N = 6

FACE = {"image": (3, 64, 64), "attrs": (len(ATTRIBUTES),)}
STORED: dict[str, tuple[Mapping[str, tuple[int, ...]], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "mnist": ({"image": (1, 28, 28), "text": ()}, pictures_and_labels),
    "fashionmnist": ({"image": (1, 28, 28), "text": ()}, pictures_and_labels),
    "multimnist": ({"image": (1, 50, 50), "text": (4,)}, pictures_and_labels),
    "celeba": (FACE, pictures_and_attributes),
    "celeba19": (FACE, separated),
    "vision": ({name: (3 if name == "image" else 1, 64, 64) for name in ("image", "gray", "edge", "mask")}, six),
}
"""The shapes of each experiment's stored tensors, and how they become a batch."""

FAKE = FakeTensorMode()
"""In it tensors are fake, and may claim to be on a GPU."""


@contextmanager
def on_a_gpu(precision: str = "fp32") -> Iterator[None]:
    """Make tensors fake, and run networks of a GPU in this precision."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision == "bf16")  # torch.autocast itself asks for a device
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FAKE, torch.no_grad(), enable_python_dispatcher():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def terms_of(model: MVAE, also: Sequence[str]) -> list[Term]:
    """Return the paper's terms, which reconstruct `also` in addition to their inputs."""
    names = model.modalities
    return [Term(names, names), *(Term((name,), (name, *also)) for name in names)]


def fake_step(
    name: str, model: MVAE, also: Sequence[str], *, n_subsets: int = 0, lacking: bool = False, precision: str = "fp32",
    iw_samples: int = 1,
) -> tuple[Tensor, Totals]:  # fmt: skip
    """Compute the loss of a batch of N examples as on a GPU."""
    shapes, transform = STORED[name]
    objective = Objective(model, terms_of(model, also), iw_samples=iw_samples, iw="image", subset_also=also)
    weights = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    with on_a_gpu(precision):
        there = {
            key: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA) for key, x in weights.items()
        }
        rows = {key: torch.empty(N, *shape, dtype=torch.uint8, device=CUDA) for key, shape in shapes.items()}
        present = {key: torch.empty(N, dtype=torch.bool, device=CUDA) for key in model.modalities[1:]}
        subsets = torch.empty(n_subsets, len(model.modalities), dtype=torch.bool, device=CUDA)
        arguments = torch.empty((), device=CUDA), subsets, present if lacking else None
        loss, totals = torch.func.functional_call(objective.train(), there, (transform(rows), *arguments))
        assert (totals.vector().device.type, totals.vector().dtype) == ("cuda", torch.float64)
    return loss, totals


@pytest.mark.parametrize(
    ("name", "also", "lacking", "precision", "iw_samples"),
    [
        *((name, "given", True, "bf16", 1) for name in STORED),
        ("celeba19", "last", False, "fp32", 2),
        ("celeba19", "all", True, "fp32", 1),
    ],
)
def test_a_step_does_not_make_the_host_wait_for_a_gpu(
    name: str, also: str, lacking: bool, precision: str, iw_samples: int
) -> None:
    model = importlib.import_module(f"{name}.model").build_model(5)
    n_subsets = 2 if lacking and len(model.modalities) > 2 else 0
    others = {"given": (), "last": model.modalities[-1:], "all": model.modalities}[also]
    loss, totals = fake_step(
        name, model, others, n_subsets=n_subsets, lacking=lacking, precision=precision, iw_samples=iw_samples
    )
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert totals.log_prob.shape == (1 + len(model.modalities) + n_subsets, len(model.modalities))
    assert totals.log_prob.dtype == totals.kl.dtype == torch.float32


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x + torch.ones(2)])
def test_fake_tensors_fail_where_the_host_would_wait_or_devices_meet(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, DataDependentOutputException)), on_a_gpu():
        ask(torch.empty(2, device=CUDA))


# Compiled steps


@pytest.mark.parametrize("name", ["mnist", "multimnist", "celeba", "celeba19"])
def test_the_compiled_objective_is_one_graph_and_has_the_gradients_of_the_plain_one(name: str) -> None:
    """So its backward pass is one graph, too. Without dropout, whose values differ."""
    torch.manual_seed(0)
    model = importlib.import_module(f"{name}.model").build_model(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    shapes, transform = STORED[name]
    limits = {"text": 10, "attrs": 2}
    batch = transform({key: torch.randint(limits.get(key, 256), (N, *shape)).byte() for key, shape in shapes.items()})
    objective, counter = Objective(model, terms_of(model, ()), iw_samples=2, iw="image"), CompileCounter()
    compiled, noise, beta = torch.compile(objective, backend=counter), objective.noise(N), torch.tensor(0.5)
    results = []
    for step in (compiled, objective):
        loss, totals = step(batch, beta, None, None, noise)
        gradients = torch.autograd.grad(loss, [*objective.parameters()])
        results.append([totals.vector(), *gradients])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1


def test_a_compiled_step_takes_any_subsets_missing_modalities_and_beta_without_compiling_again() -> None:
    """It finds what a plain step finds."""
    objective, counter = Objective(small_model()), CompileCounter()
    compiled = torch.compile(objective, backend=counter, fullgraph=True)
    batch, _ = small_data(N, seed=0).batch(torch.arange(N))
    steps = [
        ([[1, 0, 1]], {"image": torch.arange(N) != 1, "label": torch.arange(N) % 2 == 0}, 0.5),
        ([[0, 1, 1]], {"image": torch.arange(N) < 1, "label": torch.arange(N) < N}, 0.7),
        ([[1, 1, 0]], {"image": torch.arange(N) < 0, "label": torch.arange(N) > 2}, 0.0),
        ([[1, 1, 0]], {"image": torch.arange(N) < N, "label": torch.arange(N) < 0}, 0.2),
    ]
    for subsets, present, beta in steps:
        given = {**batch, "label": batch["label"].masked_fill(~present["label"], -1)}
        arguments = given, torch.tensor(beta), torch.tensor(subsets).bool(), present, objective.noise(N, 1)
        found, expected = (step(*arguments)[1].vector() for step in (compiled, objective))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert counter.frame_count == 1


def test_absent_rows_are_replaced_by_present_ones_in_turn() -> None:
    here = torch.tensor([False, True, False, False, True, False])
    assert torch.compile(lambda x: rows_of(x), backend="eager")(here).tolist() == [1, 1, 4, 1, 4, 4]
    assert rows_of(here).tolist() == [1, 4]
