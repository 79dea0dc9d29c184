"""Content encoder, style encoder and AdaIN decoder on 2D slices; all sizes are multiples of 4 and at least 16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-2  # of instance norms; a usual 1e-5 multiplies gradients by 300 in each norm where a slice is flat


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """With stride 2 the kernel is even: output pixels lie in the middle of their four, so nothing shifts by half a pixel."""
    padding = (kernel - stride) // 2 if stride > 1 else kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode="reflect")


def _normalised(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, kernel, stride), nn.InstanceNorm2d(outputs, EPS), nn.ReLU())


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv(x)))))."""

    def __init__(self, width: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            _convolution(width, width, 3), nn.InstanceNorm2d(width, EPS), nn.ReLU(),
            _convolution(width, width, 3), nn.InstanceNorm2d(width, EPS),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convolutions(x)


class ContentEncoder(nn.Module):
    """What is where: (N, C, H, W) -> (N, m width, H/m, W/m) with m = 2^halvings, shared by both domains.

    Instance norms remove each channel's mean and contrast: these are the style's.
    """

    def __init__(self, channels: int, width: int, halvings: int):
        super().__init__()
        self.layers = nn.Sequential(
            _normalised(channels, width, 7),
            *[_normalised(width * 2**i, width * 2 ** (i + 1), 4, 2) for i in range(halvings)],
            *[ResidualBlock(width * 2**halvings) for _ in range(4)],
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class StyleEncoder(nn.Module):
    """How it looks: (N, C, H, W) -> (N, style_dim). No norm, which would remove just that."""

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
    """Content (N, m width, H/m, W/m) in a style (N, style_dim) -> image (N, C, H, W); the style alone says which domain."""

    def __init__(self, channels: int, width: int, style_dim: int, halvings: int, blocks: int = 4):
        super().__init__()
        deepest = width * 2**halvings
        self.blocks = nn.ModuleList(AdaptiveBlock(deepest) for _ in range(blocks))
        hidden = 8 * width
        self.modulation = nn.Sequential(
            nn.Linear(style_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, blocks * 4 * deepest),
        )  # fmt: skip
        layers = []
        for wide in (width * 2**i for i in range(halvings, 0, -1)):
            # one group: an instance norm would remove the channel means that the style has just set
            layers += [nn.Upsample(scale_factor=2), _convolution(wide, wide // 2, 5), nn.GroupNorm(1, wide // 2), nn.ReLU()]
        self.up = nn.Sequential(*layers, _convolution(width, channels, 7))

    def forward(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        modulations = self.modulation(style).view(len(style), len(self.blocks), 4, -1)  # (N, blocks, 4, m width)
        x = content
        for block, modulation in zip(self.blocks, modulations.unbind(1), strict=True):
            x = block(x, modulation)
        return self.up(x)  # no tanh: normalised intensities have no fixed range


class SegmentationHead(nn.Module):
    """Content (N, m width, h, w) -> logits (N, outputs, m h, m w) with m = 2^halvings."""

    def __init__(self, width: int, outputs: int, halvings: int):
        super().__init__()
        self.scale = float(2**halvings)
        self.layers = nn.Sequential(_normalised(width * 2**halvings, 2 * width, 3), nn.Conv2d(2 * width, outputs, 1))

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.layers(content), scale_factor=self.scale, mode="bilinear", align_corners=False)


class Generator(nn.Module):
    """All that makes images: encoders and decoder; of these an EMA copy is kept for use."""

    def __init__(self, channels: int, width: int, style_dim: int, halvings: int):
        super().__init__()
        self.content = ContentEncoder(channels, width, halvings)
        self.styles = nn.ModuleDict(
            {"source": StyleEncoder(channels, width, style_dim), "target": StyleEncoder(channels, width, style_dim)}
        )
        self.decoder = Decoder(channels, width, style_dim, halvings)
