"""GRCSF's units: the Global Compensation Unit in the skips and the Region Compensation Unit in the decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunet_l2g.architectures.grcsf.cross_attention import CrossAttention
from nnunet_l2g.architectures.grcsf.patches import patchify, token_grid, unpatchify


class SqueezeExcitation(nn.Module):
    """x times a sigmoid weight for each channel, computed from the spatial means [1]; (B, C, *spatial) in 2D and 3D.

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
    r"""Amplifies encoder features F_l where the upsampled features of the next lower level differ from them.

    .. math::
        RU = \mathrm{Up}(W F_{l+1}), \quad m = 1 - \cos(\mathrm{SE}(F_l), \mathrm{SE}(RU)), \quad
        F_l' = F_l (1 + \gamma m), \quad L = 0.1\,\mathrm{mean}(1 - \cos(\mathrm{sg}\,F_l, RU))

    The cosine is over channels, so m is in [0, 2] for each voxel. SE is one shared layer: with two, m > 0 even for RU = F_l.
    W is a 1x1 convolution before the upsampling, with which it commutes; there it is cheaper. L trains W to restore what can
    be restored. Without L, m is near 1 everywhere. :math:`\gamma` starts at 0, so that F_l' = F_l.

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
        # Only the two inputs are kept for the backward: the products and float32 copies would be half of a network's memory.
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
    """Cosine over channels, (B, 1, *spatial), in float32: float16 overflows at features of a few hundred."""
    return F.cosine_similarity(a.float(), b.float(), dim=1, eps=1e-6).unsqueeze(1)


class RegionCompensationUnit(nn.Module):
    r"""Adds to decoder features U what they read from the residual maps R_50 and R_75 by patch-based cross-attention.

    .. math::
        A_\rho = \mathrm{softmax}(Q K_\rho^T / \sqrt d) V_\rho, \quad
        w_j = \sigma(\mathrm{MLP}[token_j; \mathrm{GAP}(bottleneck)]), \quad
        U' = U + \mathrm{conv}(\mathrm{unpatch}(w (W_{50} A_{50} + W_{75} A_{75})))

    Q are tokens of U, K and V are patch embeddings of the maps. Q and K have positions added, without which attention cannot
    localise. The convolution starts at zero, so that U' = U. :math:`W_\rho` are learnable scalars that start at 1/2.

    Parameters
    ----------
    channels : int
        C of U.
    bottleneck_channels, map_channels : int
    token_size : sequence of int
        (D,) voxels of the full patch.
    stride : sequence of int
        (D,) factor by which U is smaller than the patch; it divides token_size.
    dim, heads : int
        Width d of the tokens and number of attention heads.
    detail : int
        Channels of the unpatched features, before the last convolution.

    Shapes
    ------
    forward: U (B, C, *spatial / stride), maps two of (B, map_channels, *spatial), bottleneck (B, C_b, *any)
    -> (U' with the shape of U, w (B, 1, *token grid) in (0, 1))

    Raises
    ------
    ValueError
        If the stride does not divide the token size, or U, maps and token size do not fit.
    """

    def __init__(
        self,
        channels: int,
        bottleneck_channels: int,
        map_channels: int,
        token_size: Sequence[int],
        stride: Sequence[int],
        dim: int = 128,
        heads: int = 4,
        detail: int = 8,
    ):
        super().__init__()
        if any(t % s for t, s in zip(token_size, stride, strict=True)):
            raise ValueError(f"stride {tuple(stride)} does not divide token size {tuple(token_size)}: choose another level")
        self.token_size = tuple(token_size)
        self.level_token = tuple(t // s for t, s in zip(token_size, stride, strict=True))
        self.dim = dim
        self.to_queries = nn.Linear(channels * math.prod(self.level_token), dim)
        self.embed = nn.ModuleList(nn.Linear(map_channels * math.prod(token_size), dim) for _ in range(2))
        self.norm_queries = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, heads=heads)
        self.mix = nn.Parameter(torch.full((2,), 0.5))  # W_50, W_75
        self.importance_token = nn.Linear(dim, dim // 2)
        self.importance_global = nn.Linear(bottleneck_channels, dim // 2, bias=False)
        self.importance = nn.Linear(dim // 2, 1)
        self.unpatch = nn.Linear(dim, detail * math.prod(self.level_token))
        self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(token_size)](detail, channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(
        self, features: torch.Tensor, maps: Sequence[torch.Tensor], bottleneck: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grid = token_grid(features.shape[2:], self.level_token)
        tokens = self.norm_queries(self.to_queries(patchify(features, self.level_token)))  # (B, N, d)
        queries, attended = tokens + position, 0
        for weight, embed, residual in zip(self.mix, self.embed, maps, strict=True):
            values = embed(patchify(residual, self.token_size).to(embed.weight.dtype))  # (B, N, d)
            attended = attended + weight * self.attention(queries, values + position, values)  # (B, N, d)
        context = bottleneck.flatten(2).mean(2)  # (B, C_b)
        hidden = F.gelu(self.importance_token(tokens) + self.importance_global(context).unsqueeze(1))  # (B, N, d / 2)
        importance = torch.sigmoid(self.importance(hidden))  # (B, N, 1)
        update = self.conv(unpatchify(self.unpatch(importance * attended), self.level_token, grid))  # (B, C, *level)
        return features + update.to(features.dtype), importance.transpose(1, 2).unflatten(2, grid)
