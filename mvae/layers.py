"""Layers of several experiments, and the networks for 64x64 faces that three of them share."""

from torch import Tensor, nn
from torch.nn import functional as F


class FoldConvTranspose2d(nn.ConvTranspose2d):
    """A square transposed convolution with bias=False, without dilation or groups, as one matrix product and a fold.

    Weights and results are those of nn.ConvTranspose2d: the product computes each input pixel's square of the output,
    and `fold` adds up the squares. On a CPU this is faster for an output of one channel.
    (n, in_channels, h, w) -> (n, out_channels, stride * (h - 1) + kernel_size - 2 * padding, likewise for w).
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        n, channels = x.shape[:2]
        squares = x.permute(0, 2, 3, 1).reshape(-1, channels) @ self.weight.flatten(1)
        squares = squares.view(n, -1, squares.shape[1]).transpose(1, 2)
        kernel_size, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        height, width = ((n - 1) * stride - 2 * padding + kernel_size for n in x.shape[2:])
        return F.fold(squares, (height, width), kernel_size, padding=padding, stride=stride)


class Permute(nn.Module):
    """Permute the dimensions."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class FaceEncoder(nn.Module):
    """q(z | picture): (batch, channels, 64, 64) in [0, 1] -> mu, logvar, each (batch, latents).

    The layers of Wu & Goodman (2018) for CelebA's image.
    """

    def __init__(self, n_channels: int, n_latents: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(n_channels, 32, 4, 2, 1, bias=False), nn.SiLU(),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
            nn.Conv2d(128, 256, 4, 1, 0, bias=False), nn.BatchNorm2d(256), nn.SiLU(),
            Permute(0, 2, 3, 1), nn.Flatten(), nn.Linear(5 * 5 * 256, 512), nn.SiLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.mu = nn.Linear(512, n_latents)
        self.logvar = nn.Linear(512, n_latents)

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(picture)
        return self.mu(hidden), self.logvar(hidden)


def face_decoder(n_channels: int, n_latents: int) -> nn.Sequential:
    """Map z to the logits of the pixels, (rows, channels, 64, 64): the encoder's layers in reverse."""
    return nn.Sequential(
        nn.Linear(n_latents, 5 * 5 * 256), nn.SiLU(), nn.Unflatten(1, (5, 5, 256)), Permute(0, 3, 1, 2),
        nn.ConvTranspose2d(256, 128, 4, 1, 0, bias=False), nn.BatchNorm2d(128), nn.SiLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        FoldConvTranspose2d(32, 1, 4, 2, 1, bias=False)
        if n_channels == 1
        else nn.ConvTranspose2d(32, n_channels, 4, 2, 1, bias=False),
    )  # fmt: skip
