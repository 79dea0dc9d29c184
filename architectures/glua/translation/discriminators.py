"""Least-squares discriminators of images and of content, with small fields: they shall judge appearance, not anatomy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from nnunet_l2g.training.precision import full_precision


class SpectralConvolution(nn.Conv2d):
    """A convolution with spectral norm 1, computed in float32 whatever autocast says: its vectors would else change type."""

    def __init__(self, *arguments: int):
        super().__init__(*arguments)
        spectral_norm(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device.type):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


def _layers(inputs: int, width: int, first: int) -> nn.Sequential:
    """Field of 18 pixels with first = 4, of 10 with first = 3."""
    slope = nn.LeakyReLU(0.2)
    stride = 2 if first == 4 else 1
    return nn.Sequential(
        SpectralConvolution(inputs, width, first, stride, 1), slope,
        SpectralConvolution(width, 2 * width, 4, 2, 1), slope,
        SpectralConvolution(2 * width, 4 * width, 3, 1, 1), slope,
        nn.Conv2d(4 * width, 1, 1),
    )  # fmt: skip


class ImageDiscriminator(nn.Module):
    """(N, C, H, W) -> a map of scores for each of three scales: 1, 1/2, 1/4; fields of 18, 37 and 75 pixels."""

    def __init__(self, channels: int, width: int, scales: int = 3):
        super().__init__()
        self.scales = nn.ModuleList(_layers(channels, width, 4) for _ in range(scales))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        scores = []
        for number, layers in enumerate(self.scales):
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if number else x
            scores.append(layers(x))
        return scores


class ContentDiscriminator(nn.Module):
    """(N, channels, h, w) -> one map of scores: which domain is this content of?"""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.layers = _layers(channels, width, 3)

    def forward(self, content: torch.Tensor) -> list[torch.Tensor]:
        return [self.layers(content)]


def judge(discriminator: nn.Module, *groups: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Of groups of images or of content, (N, C, H, W) each, the scores of all scales, in one pass of the discriminator."""
    return list(zip(*(score.chunk(len(groups)) for score in discriminator(torch.cat(groups))), strict=True))


def least_squares(scores: Sequence[torch.Tensor], aim: float) -> torch.Tensor:
    r""":math:`\sum_s \mathrm{mean}\,(D_s - aim)^2` over scales s, in float32."""
    return sum((score.float() - aim).square().mean() for score in scores)
