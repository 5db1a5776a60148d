"""Models leave PyTorch: posterior and decoder as ONNX graphs of any batch size."""

from pathlib import Path

from mnist.model import build_model
from mvae import MVAE

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn


class Posterior(nn.Module):
    def __init__(self, model: MVAE):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.fused({"image": image, "text": text})


class Decoder(Posterior):
    def forward(self, z: Tensor) -> Tensor:  # type: ignore[override]
        return self.model.mean(z, ["image"])["image"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Posterior, Decoder])
def test_a_graph_of_any_batch_size_computes_what_the_model_does(kind: type[Posterior], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = kind(build_model(5)).eval()

    def examples(n: int) -> dict[str, Tensor]:
        if kind is Decoder:
            return {"z": torch.randn(n, 5)}
        return {"image": torch.rand(n, 1, 28, 28), "text": torch.randint(10, (n,))}

    any_size = {name: {0: torch.export.Dim("batch")} for name in examples(2)}
    arguments = tuple(examples(2).values())
    torch.onnx.export(network, arguments, tmp_path / "it.onnx", dynamic_shapes=any_size, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    given = examples(7)
    found = session.run(None, {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        expected = network(**given)
    for one, other in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)
