"""What the segmenter is shown of an image beside the image: two residual maps of the same channels, whatever their source."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_l2g.training.gaussian_blur import gaussian_blur

CLIP = 4.0  # residuals are in units of the expected error; beyond this a voxel is just wrong


def num_map_channels(channels: int) -> int:
    """Channels of one residual map of an image with `channels` channels."""
    return channels + 2


def stack_residuals(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Two residuals (B, C, *spatial), of 50 % and 75 % masking, to two maps (B, C + 2, *spatial).

    Channels of the map of r, clipped to +-4: r itself for each image channel (a lesion may be darker or brighter, and in one
    channel only), the mean of \|r\| over channels, and the difference of that mean between the two ratios, \|high\| - \|low\|
    (what more context would have explained is texture).
    """
    low, high = low.clamp(-CLIP, CLIP), high.clamp(-CLIP, CLIP)
    size_low, size_high = (r.abs().mean(1, keepdim=True) for r in (low, high))  # (B, 1, *spatial)
    difference = size_high - size_low
    return torch.cat((low, size_low, difference), 1), torch.cat((high, size_high, difference), 1)


class DifferenceOfGaussians(nn.Module):
    r"""Twin of the autoencoder's residuals: :math:`(G_\sigma x - G_{2\sigma} x) / \mathrm{std}`, for two sigma.

    The standard deviation is that of the difference over the image, for each channel.

    Parameters
    ----------
    dims : int
        2 or 3.
    sigmas : tuple of float
        Voxels, the finer in the place of 50 %, the coarser of 75 %.

    Shapes
    ------
    forward: (B, C, *spatial) -> two residuals of that shape, float32
    """

    def __init__(self, dims: int, sigmas: tuple[float, float] = (1.0, 2.0)):
        super().__init__()
        self.dims, self.sigmas = dims, tuple(sigmas)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self._difference(x.float(), sigma) for sigma in self.sigmas)

    def _difference(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        difference = gaussian_blur(x, sigma) - gaussian_blur(x, 2 * sigma)  # (B, C, *spatial)
        axes = tuple(range(2, x.dim()))
        return difference / difference.std(axes, keepdim=True).clamp_min(1e-3)
