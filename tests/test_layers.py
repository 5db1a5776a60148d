"""Layers against torch's."""

import pytest
import torch
from torch import nn

from mvae.layers import FoldConvTranspose2d


@pytest.mark.parametrize("channels", [(8, 1), (3, 5), (1, 2)])
@pytest.mark.parametrize("geometry", [(4, 2, 1), (4, 2, 0), (4, 1, 0), (5, 2, 1), (3, 3, 2), (1, 1, 0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fold_is_torchs_transposed_convolution(
    channels: tuple[int, int], geometry: tuple[int, int, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.ConvTranspose2d(*channels, *geometry, bias=False).double()
    fold = FoldConvTranspose2d(*channels, *geometry).double()
    fold.load_state_dict(plain.state_dict())
    fold, x = fold.to(memory_format=memory_format), torch.randn(2, channels[0], 4, 5).double()
    x = x.to(memory_format=memory_format).requires_grad_()
    found, expected = fold(x), plain(x)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, [x, fold.weight], direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, plain.weight], direction))


def test_fold_begins_with_torchs_weights() -> None:
    torch.manual_seed(0)
    plain = nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False)
    torch.manual_seed(0)
    assert torch.equal(FoldConvTranspose2d(8, 3, 4, 2, 1).weight, plain.weight)
