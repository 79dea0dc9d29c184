"""A Gaussian filter of feature maps and images in torch, 2D and 3D."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from nnunet_l2g.training.precision import full_precision


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Separable Gaussian of `sigma` voxels, cut at 3 sigma, on (B, C, *spatial) with replicated edges. At least in float32."""
    with full_precision(x.device.type):
        return _blur(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, sigma)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()  # (2 r + 1,)
    for axis in range(2, x.dim()):
        lines = x.movedim(axis, -1)  # (B, C, ..., length)
        shape = lines.shape
        lines = F.pad(lines.reshape(-1, 1, shape[-1]), (radius, radius), mode="replicate")
        x = F.conv1d(lines, kernel[None, None]).reshape(shape).movedim(-1, axis)
    return x
