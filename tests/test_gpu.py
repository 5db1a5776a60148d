"""What a step asks of a GPU, found out without one: on fake CUDA tensors, and in compiled steps.

On a fake tensor whatever would make the host wait for the device fails, as do tensors of two devices in one operation.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def compiled_once(
    objective: Objective, subsets: Sequence[Sequence[str]], present: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """The losses and sums of parts, compiled once, of steps that have other random subsets each."""
    counter = CompileCounter()
    step = torch.compile(objective, backend=counter, fullgraph=True)
    found = []
    for i, subset in enumerate(subsets):
        torch.manual_seed(i)
        _, totals = step(BATCH, torch.tensor(0.5), objective.mask([subset]), present)
        found.append(totals.vector())
    assert counter.frame_count == 1
    return found


BATCH = small_data(N, seed=0).batch(torch.arange(N))[0]
PRESENT = {"image": torch.arange(N) != 1, "label": torch.arange(N) % 2 == 0}


@pytest.mark.parametrize("present", [None, PRESENT])
def test_a_compiled_step_takes_any_subsets_and_missing_modalities_without_compiling_anew(
    present: Mapping[str, Tensor] | None,
) -> None:
    """It finds what the step finds that is not compiled, and runs networks on the rows that are there."""
    objective, subsets = Objective(small_model()), [("image", "label"), ("attrs", "label"), ("image", "attrs")]
    for i, (found, subset) in enumerate(zip(compiled_once(objective, subsets, present), subsets, strict=True)):
        torch.manual_seed(i)
        _, totals = objective(BATCH, torch.tensor(0.5), [subset], present)
        torch.testing.assert_close(found, totals.vector())


def test_stand_ins_are_rows_that_are_there_in_turn() -> None:
    here = torch.tensor([False, True, False, False, True, False])
    assert torch.compile(lambda x: shown(x), backend="eager")(here).tolist() == [1, 1, 4, 1, 4, 4]
    assert shown(here).tolist() == [1, 4]
