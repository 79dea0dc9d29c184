"""Region Compensation Unit: decoder features look into the residual maps, patch by patch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.architectures.grcsf.cross_attention import CrossAttention
from nnunet_l2g.architectures.grcsf.patches import patchify, token_grid, unpatchify


class RegionCompensationUnit(nn.Module):
    r"""Adds to decoder features U what the residual maps R_50 and R_75 say, patch by patch.

    .. math::
        A_\rho = \mathrm{softmax}(Q K_\rho^T / \sqrt d) V_\rho, \quad
        w_j = \sigma(\mathrm{MLP}[token_j; \mathrm{GAP}(bottleneck)]), \quad
        U' = U + \mathrm{conv}(\mathrm{unpatch}(w (W_{50} A_{50} + W_{75} A_{75})))

    Q are tokens of U, K and V patch embeddings of the maps, Q and K with positions (without them attention cannot localise).
    The convolution starts at zero, so U' = U; :math:`W_\rho` are learnable scalars and start at 1/2.

    Parameters
    ----------
    channels : int
        C of U.
    bottleneck_channels, map_channels : int
    token_size : sequence of int
        (D,) voxels of the full patch.
    stride : sequence of int
        (D,) how much smaller U is than the patch; divides token_size.
    dim, heads : int
        Width d of tokens and number of attention heads.
    detail : int
        Channels of the unpatched features, before the last convolution.

    Shapes
    ------
    forward: U (B, C, *spatial / stride), maps two of (B, map_channels, *spatial), bottleneck (B, C_b, *any)
    -> (U' like U, w (B, 1, *token grid) in (0, 1))

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
