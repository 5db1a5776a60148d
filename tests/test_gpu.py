"""What a step asks of a GPU, found out without one: on fake CUDA tensors, and in compiled steps.

On a fake tensor whatever would make the host wait for the device fails, as do tensors of two devices in one operation.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from celeba19.datasets import apart
from mvae.data import pictures_and_labels
from mvae.datasets.celeba import ATTRIBUTES, pictures_and_attributes
from mvae.model import shown
from mvae.objective import Objective
from mvae.stats import Totals
from vision.datasets import six

from helpers import small_data, small_model

CUDA = torch.device("cuda")
N = 6


class Stored(NamedTuple):
    """An experiment's data: the shape of each stored tensor, how they become a batch, and some modalities to name."""

    shapes: Mapping[str, tuple[int, ...]]
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    named: tuple[str, ...]


SIX = {"image": (3, 64, 64), "gray": (1, 64, 64), "edge": (1, 64, 64), "mask": (1, 64, 64)}
FACE = {"image": (3, 64, 64), "attrs": (len(ATTRIBUTES),)}
STORED = {
    "mnist": Stored({"image": (1, 28, 28), "text": ()}, pictures_and_labels, ("text",)),
    "fashionmnist": Stored({"image": (1, 28, 28), "text": ()}, pictures_and_labels, ("text",)),
    "multimnist": Stored({"image": (1, 50, 50), "text": (4,)}, pictures_and_labels, ("text",)),
    "celeba": Stored(FACE, pictures_and_attributes, ("attrs",)),
    "celeba19": Stored(FACE, apart, ATTRIBUTES),
    "vision": Stored(SIX, six, ("image", "edge")),
}


FAKE = FakeTensorMode()
"""In it tensors are fake, and may say that they are on a GPU."""


@contextmanager
def on_a_gpu(precision: str = "fp32") -> Iterator[None]:
    """Within it, tensors are fake, and networks of a GPU run in this precision."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision == "bf16")  # torch.autocast itself asks for a device
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        # cuDNN's GRU asks for a driver. The other one is fused, and fake tensors know the operations it is made of.
        with FAKE, torch.no_grad(), torch.backends.cudnn.flags(enabled=False), enable_python_dispatcher():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize(
    ("reconstruct", "lacking", "precision"),
    [("given", True, "bf16"), ("named", False, "fp32"), ("all", True, "fp32")],
)
@pytest.mark.parametrize("name", STORED)
def test_a_step_asks_a_gpu_for_nothing(name: str, reconstruct: str, lacking: bool, precision: str) -> None:
    """If examples lack modalities there are random subsets, too."""
    stored, model = STORED[name], importlib.import_module(f"{name}.model").build_model(5)
    objective = Objective(model, reconstruct=stored.named if reconstruct == "named" else reconstruct).train()
    weights = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    n_subsets = 2 if lacking and len(model.modalities) > 2 else 0
    with on_a_gpu(precision):
        there = {
            key: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA) for key, x in weights.items()
        }
        rows = {key: torch.empty(N, *shape, dtype=torch.uint8, device=CUDA) for key, shape in stored.shapes.items()}
        present = {key: torch.empty(N, dtype=torch.bool, device=CUDA) for key in model.modalities[1:]}
        subsets = torch.empty(n_subsets, len(model.modalities), dtype=torch.bool, device=CUDA)
        arguments = torch.empty((), device=CUDA), subsets if n_subsets else (), present if lacking else None
        loss, totals = torch.func.functional_call(objective, there, (stored.transform(rows), *arguments))
        sums = totals.vector()
    n_terms = len(objective.terms) + n_subsets
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert (sums.device.type, sums.dtype) == ("cuda", torch.float64)
    assert totals.log_prob.shape == (n_terms, len(model.modalities))
    assert totals.log_prob.dtype == totals.kl.dtype == torch.float32


@pytest.mark.parametrize(
    "ask", [torch.Tensor.item, torch.nonzero, bool, lambda x: x[x > 0], lambda x: x + torch.ones(2)]
)
def test_what_would_make_the_host_wait_fails_on_fake_tensors(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)), on_a_gpu():
        ask(torch.empty(2, device=CUDA).sum() if ask in (torch.Tensor.item, bool) else torch.empty(2, device=CUDA))


# Compiled steps.


BATCH = small_data(N, seed=0).batch(torch.arange(N))[0]
PRESENT = {"image": torch.arange(N) != 1, "label": torch.arange(N) % 2 == 0}
SUBSETS = [("image", "label"), ("attrs", "label"), ("image", "attrs")]


def sums(step: Callable[..., tuple[Tensor, Totals]], subsets: object, present: Mapping[str, Tensor] | None) -> Tensor:
    """The sums of the parts of a step, with the same noise each time."""
    torch.manual_seed(0)
    return step(BATCH, torch.tensor(0.5), subsets, present)[1].vector()


def test_a_compiled_step_takes_any_subsets_and_missing_modalities_without_compiling_anew() -> None:
    """It finds what the step finds that is not compiled, and runs networks on the rows that are there."""
    objective, counter = Objective(small_model()), CompileCounter()
    step = torch.compile(objective, backend=counter, fullgraph=True)
    for subset in SUBSETS:
        found = sums(step, objective.mask([subset]), PRESENT)
        torch.testing.assert_close(found, sums(objective, [subset], PRESENT), rtol=1e-6, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("present", [None, PRESENT])
def test_subsets_are_names_or_a_mask(present: Mapping[str, Tensor] | None) -> None:
    objective = Objective(small_model(), reconstruct=["label"])
    found, expected = (sums(objective, subsets, present) for subsets in (objective.mask(SUBSETS), SUBSETS))
    torch.testing.assert_close(found, expected)


def test_stand_ins_are_rows_that_are_there_in_turn() -> None:
    here = torch.tensor([False, True, False, False, True, False])
    assert torch.compile(lambda x: shown(x), backend="eager")(here).tolist() == [1, 1, 4, 1, 4, 4]
    assert shown(here).tolist() == [1, 4]
