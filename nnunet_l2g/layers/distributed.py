"""What layers ask of torch.distributed; each has an answer without it."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of DDP processes; 1 outside DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' x, in place; x as it is outside DDP."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def from_rank_0(x: torch.Tensor) -> torch.Tensor:
    """Rank 0's x on every process, so that random or data-dependent choices agree. x itself outside DDP."""
    if world_size() > 1:
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x
