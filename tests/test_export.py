"""Models leave PyTorch: posterior and decoder as an ONNX graph of any batch size."""

from pathlib import Path

from mnist.model import build_model
from mvae import MVAE

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn


class Network(nn.Module):
    def __init__(self, model: MVAE):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.model.fused({"image": image, "text": text})
        return mu, logvar, self.model.mean(mu, ["image"])["image"]


def examples(n: int) -> dict[str, Tensor]:
    return {"image": torch.rand(n, 1, 28, 28), "text": torch.randint(10, (n,))}


@pytest.mark.filterwarnings("ignore")
def test_a_graph_of_any_batch_size_computes_what_the_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, some, given = Network(build_model(5)).eval(), examples(2), examples(7)
    any_size = {name: {0: torch.export.Dim("batch")} for name in some}
    path = tmp_path / "it.onnx"
    torch.onnx.export(network, tuple(some.values()), path, dynamic_shapes=any_size, dynamo=True, verbose=False)
    found = onnxruntime.InferenceSession(path).run(None, {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        expected = network(**given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)
