"""Residual maps, the second input of the segmenter, and the difference of Gaussians that replaces them in an ablation."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_l2g.training.gaussian_blur import gaussian_blur

SIGMAS = (1.0, 2.0)  # voxels; the finer one replaces 50 % masking, the coarser one 75 %
CLIP = 4.0  # of residuals, which are in units of the expected error


def num_map_channels(channels: int) -> int:
    """Channels of one residual map of an image with `channels` channels."""
    return channels + 2


def stack_residuals(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Two residuals r (B, C, *spatial), of 50 % and 75 % masking, to two maps (B, C + 2, *spatial).

    Residuals are clipped to +-4. The channels of a map are r for each image channel (a lesion may be darker or brighter, and
    in one channel only), the mean of \|r\| over channels, and the difference of this mean between 75 % and 50 % (what more
    context would have explained is texture).
    """
    low, high = low.clamp(-CLIP, CLIP), high.clamp(-CLIP, CLIP)
    size_low, size_high = (r.abs().mean(1, keepdim=True) for r in (low, high))  # (B, 1, *spatial)
    difference = size_high - size_low
    return torch.cat((low, size_low, difference), 1), torch.cat((high, size_high, difference), 1)


class DifferenceOfGaussians(nn.Module):
    r"""Ablation of the autoencoder's residuals: :math:`(G_\sigma x - G_{2\sigma} x) / \mathrm{std}`, for two sigma.

    The standard deviation is that of the difference over the image, for each channel.

    Shapes
    ------
    forward: (B, C, *spatial) -> two residuals of that shape, float32
    """

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self._difference(x.float(), sigma) for sigma in SIGMAS)

    def _difference(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        difference = gaussian_blur(x, sigma) - gaussian_blur(x, 2 * sigma)  # (B, C, *spatial)
        axes = tuple(range(2, x.dim()))
        return difference / difference.std(axes, keepdim=True).clamp_min(1e-3)
