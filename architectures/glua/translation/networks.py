"""Networks of the translation on 2D slices: encoders, AdaIN decoder, segmentation head, discriminators.

The sides of all slices are multiples of 4 and at least 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from nnunet_l2g.training.precision import full_precision

EPS = 1e-2  # of instance norms; with the usual 1e-5, a flat slice multiplies gradients by 300 in each norm
DOMAINS = ("source", "target")


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """With stride 2 the kernel is even: an output pixel lies in the middle of its four, so nothing shifts by half a pixel."""
    padding = (kernel - stride) // 2 if stride > 1 else kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode="reflect")


def _normalised(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, kernel, stride), nn.InstanceNorm2d(outputs, EPS), nn.ReLU())


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv(x)))))."""

    def __init__(self, width: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            _normalised(width, width, 3), _convolution(width, width, 3), nn.InstanceNorm2d(width, EPS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convolutions(x)


class ContentEncoder(nn.Sequential):
    """Content, shared by both domains: (N, C, H, W) -> (N, m width, H/m, W/m) with m = 2^halvings.

    Instance norms remove the mean and contrast of each channel: these belong to the style.
    """

    def __init__(self, channels: int, width: int, halvings: int):
        super().__init__(
            _normalised(channels, width, 7),
            *[_normalised(width * 2**i, width * 2 ** (i + 1), 4, 2) for i in range(halvings)],
            *[ResidualBlock(width * 2**halvings) for _ in range(4)],
        )


class StyleEncoder(nn.Module):
    """Style of a domain: (N, C, H, W) -> (N, style_dim). Without norms, which would remove the style."""

    def __init__(self, channels: int, width: int, style_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, width, 7), nn.ReLU(),
            _convolution(width, 2 * width, 4, 2), nn.ReLU(),
            _convolution(2 * width, 4 * width, 4, 2), nn.ReLU(),
            _convolution(4 * width, 4 * width, 4, 2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, style_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class AdaptiveBlock(nn.Module):
    """ResidualBlock whose two norms take scale and offset from the style: (1 + scale) IN(x) + offset."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = _convolution(width, width, 3), _convolution(width, width, 3)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """x (N, width, h, w), modulation (N, 4, width)."""
        scale_1, offset_1, scale_2, offset_2 = modulation[..., None, None].to(x.dtype).unbind(1)  # (N, width, 1, 1) each
        y = F.relu(F.instance_norm(self.first(x), eps=EPS) * (1 + scale_1) + offset_1)
        return x + F.instance_norm(self.second(y), eps=EPS) * (1 + scale_2) + offset_2


class Decoder(nn.Module):
    """Content (N, m width, H/m, W/m) and style (N, style_dim) -> image (N, C, H, W) of the domain that the style is of.

    Resolution is doubled by a convolution to four times the channels, which are then shuffled to pixels [1]: a quarter fewer
    operations of a translation step than 5x5 convolutions after upsampling.

    References
    ----------
    .. [1] Shi et al. Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural
       network. CVPR 2016.
    """

    def __init__(self, channels: int, width: int, style_dim: int, halvings: int, blocks: int = 4):
        super().__init__()
        deepest, hidden = width * 2**halvings, 8 * width
        self.blocks = nn.ModuleList(AdaptiveBlock(deepest) for _ in range(blocks))
        self.modulation = nn.Sequential(
            nn.Linear(style_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, blocks * 4 * deepest),
        )  # fmt: skip
        layers = []
        for wide in (width * 2**i for i in range(halvings, 0, -1)):
            # one group: an instance norm would remove the channel means that the style has just set
            layers += [_convolution(wide, 2 * wide, 3), nn.PixelShuffle(2), nn.GroupNorm(1, wide // 2), nn.ReLU()]
        self.up = nn.Sequential(*layers, _convolution(width, channels, 7))

    def forward(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        modulations = self.modulation(style).view(len(style), len(self.blocks), 4, -1)  # (N, blocks, 4, m width)
        x = content
        for block, modulation in zip(self.blocks, modulations.unbind(1), strict=True):
            x = block(x, modulation)
        return self.up(x)  # no tanh: normalised intensities have no fixed range


class Generator(nn.Module):
    """Encoders and decoder. A moving average of them is used to translate."""

    def __init__(self, channels: int, width: int, style_dim: int, halvings: int):
        super().__init__()
        self.content = ContentEncoder(channels, width, halvings)
        self.styles = nn.ModuleDict({domain: StyleEncoder(channels, width, style_dim) for domain in DOMAINS})
        self.decoder = Decoder(channels, width, style_dim, halvings)


class SegmentationHead(nn.Module):
    """Content (N, m width, h, w) -> logits (N, outputs, m h, m w) with m = 2^halvings."""

    def __init__(self, width: int, outputs: int, halvings: int):
        super().__init__()
        self.scale = float(2**halvings)
        self.layers = nn.Sequential(_normalised(width * 2**halvings, 2 * width, 3), nn.Conv2d(2 * width, outputs, 1))

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.layers(content), scale_factor=self.scale, mode="bilinear", align_corners=False)


class SpectralConvolution(nn.Conv2d):
    """A convolution with spectral norm 1, computed in float32 also inside autocast, which would change its vectors' type."""

    def __init__(self, *arguments: int):
        super().__init__(*arguments)
        spectral_norm(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device.type):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Discriminator(nn.Module):
    """(N, C, H, W) -> a map of scores for each scale: 1, 1/2, 1/4, ...

    Receptive fields are small, so that scores depend on appearance and not on anatomy. That of the first scale has 18 pixels
    with a first kernel of 4, and 10 with a first kernel of 3, which has no stride.
    """

    def __init__(self, channels: int, width: int, scales: int, first: int):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(
                SpectralConvolution(channels, width, first, 2 if first == 4 else 1, 1), nn.LeakyReLU(0.2),
                SpectralConvolution(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
                SpectralConvolution(2 * width, 4 * width, 3, 1, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(4 * width, 1, 1),
            ) for _ in range(scales)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        scores = []
        for number, layers in enumerate(self.scales):
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if number else x
            scores.append(layers(x))
        return scores


def score_groups(discriminator: nn.Module, *groups: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The scores of all scales for each group (N, C, H, W), in one pass of the discriminator, which has no norms."""
    return list(zip(*(score.chunk(len(groups)) for score in discriminator(torch.cat(groups))), strict=True))


def least_squares(scores: Sequence[torch.Tensor], aim: float) -> torch.Tensor:
    r""":math:`\sum_s \mathrm{mean}\,(D_s - aim)^2` over scales s, in float32."""
    return sum((score.float() - aim).square().mean() for score in scores)
