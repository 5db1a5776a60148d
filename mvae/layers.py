"""Layers that several experiments' networks have."""

from torch import Tensor, nn
from torch.nn import functional as F


class FoldConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution without bias, dilation or groups, as one matrix product and a fold.

    It has the weights and gives the numbers of nn.ConvTranspose2d: a product makes each place's values for its kernel's
    square, and `fold` adds up the squares. On a CPU that takes half the time where the output has one channel, or the
    input few places.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.geometry = kernel_size, stride, padding

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        n, channels = x.shape[:2]
        squares = x.permute(0, 2, 3, 1).reshape(-1, channels) @ self.weight.flatten(1)
        squares = squares.view(n, -1, squares.shape[1]).transpose(1, 2)
        kernel_size, stride, padding = self.geometry
        height, width = ((n - 1) * stride - 2 * padding + kernel_size for n in x.shape[2:])
        return F.fold(squares, (height, width), kernel_size, padding=padding, stride=stride)
