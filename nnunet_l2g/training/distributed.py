"""Sums, means and broadcasts over DDP processes. Outside DDP all of them return their input."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of DDP processes; 1 outside DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def from_rank_0(x: torch.Tensor) -> torch.Tensor:
    """x of rank 0 in every process, so that random choices and choices by data agree."""
    if world_size() > 1:
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces gradients by their mean over processes, in one message, for modules that are trained outside the DDP wrapper."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = sum_over_ranks(torch.cat([g.flatten() for g in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_ranks(values: list[float]) -> list[float]:
    """The mean of each number over the processes."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return (sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=device)) / world_size()).tolist()
