"""Global Compensation Unit: marks in a skip connection what the level below could not give back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class SqueezeExcitation(nn.Module):
    """x times a sigmoid weight for each channel, from its spatial mean [1]: (B, C, *spatial) -> the same, 2D and 3D alike.

    References
    ----------
    .. [1] Hu et al. Squeeze-and-excitation networks. CVPR 2018.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.reduce = nn.Linear(channels, max(4, channels // reduction))
        self.expand = nn.Linear(max(4, channels // reduction), channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.sigmoid(self.expand(F.leaky_relu(self.reduce(x.flatten(2).mean(2)))))  # (B, C)
        return x * weight.reshape(*weight.shape, *[1] * (x.dim() - 2))


class GlobalCompensationUnit(nn.Module):
    r"""Strengthens encoder features F_l where the level below, brought up again, differs from them.

    .. math::
        RU = \mathrm{Up}(W F_{l+1}), \quad m = 1 - \cos(\mathrm{SE}(F_l), \mathrm{SE}(RU)), \quad
        F_l' = F_l (1 + \gamma m), \quad L = 0.1\,\mathrm{mean}(1 - \cos(\mathrm{sg}\,F_l, RU))

    with the cosine over channels, m in [0, 2] for each voxel, SE shared (two of them would make m > 0 even for RU = F_l).
    W is a 1x1 convolution before the upsampling (they commute, and it is cheaper there); L makes W learn to give back what
    can be given back; without it, m is near 1 everywhere. :math:`\gamma` starts at 0: F_l' = F_l.

    Parameters
    ----------
    channels, channels_below : int
        C_l and C_{l+1}.
    dims : int
        2 or 3.

    Shapes
    ------
    forward: (B, C_l, *spatial), (B, C_{l+1}, *spatial below) -> (F_l' (B, C_l, *spatial), m (B, 1, *spatial), L ()).
    m and L are float32; L is None in eval.
    """

    weight = 0.1  # of L

    def __init__(self, channels: int, channels_below: int, dims: int):
        super().__init__()
        self.match = {2: nn.Conv2d, 3: nn.Conv3d}[dims](channels_below, channels, 1)
        self.excitation = SqueezeExcitation(channels)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, features: torch.Tensor, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        matched = self.match(below)  # (B, C_l, *spatial below)
        # Kept for the backward: the two inputs. Full-size products and float32 copies of them would be half a network's memory.
        gap, loss = checkpoint(self._compare, features, matched, use_reentrant=False, preserve_rng_state=False)
        return features * (1 + self.gamma * gap).to(features.dtype), gap, loss

    def _compare(self, features: torch.Tensor, matched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """m (B, 1, *spatial) and L () of features (B, C_l, *spatial) and the matched level below (B, C_l, *spatial below)."""
        linear = "bilinear" if features.dim() == 4 else "trilinear"
        restored = F.interpolate(matched, features.shape[2:], mode=linear, align_corners=False)  # (B, C_l, *spatial)
        gap = 1 - _cosine(self.excitation(features), self.excitation(restored))  # (B, 1, *spatial)
        loss = self.weight * (1 - _cosine(features.detach(), restored)).mean() if self.training else None
        return gap, loss


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Over channels, (B, 1, *spatial) in float32: half precision overflows at features of a few hundred."""
    return F.cosine_similarity(a.float(), b.float(), dim=1, eps=1e-6).unsqueeze(1)
