"""Multi-head attention from one set of tokens to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    r"""softmax(Q K^T / sqrt(d_h)) V in each head, with linear maps before and after.

    Parameters
    ----------
    dim : int
        Width of queries, keys, values and output, and of all heads together.
    heads : int
        A divisor of dim.

    Shapes
    ------
    forward: queries (B, n, dim), keys (B, m, dim), values (B, m, dim) -> (B, n, dim)
    """

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)  # a bias of the keys would not change the softmax
        self.value = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, n or m, d_h)
            for layer, tokens in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n, d_h)
        return self.project(attended.transpose(1, 2).flatten(2))  # (B, n, dim)


class CrossAttentionBlock(nn.Module):
    """Transformer block with pre-norm whose attention reads a context: (B, n, dim), (B, m, dim) -> (B, n, dim)."""

    def __init__(self, dim: int, heads: int = 4, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm_query, self.norm_context, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = CrossAttention(dim, heads=heads)
        hidden = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        context = self.norm_context(context)
        x = x + self.attention(self.norm_query(x), context, context)
        return x + self.mlp(self.norm_mlp(x))
