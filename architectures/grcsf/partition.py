"""Complementary masks: a partition of tokens into sets, one of them visible at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Partition(NamedTuple):
    """S ways to see 1/S of N tokens.

    Attributes
    ----------
    visible : (S, ceil(N / S)) token numbers; the rows are disjoint and cover all tokens
    masked : (S, N - floor(N / S)) token numbers; row s is what row s of `visible` leaves out
    inverse : (N, S - 1) where token n stands in `masked`, flattened: once for each time it is masked

    Rows of equal length are needed to run all sets as one batch. Where S does not divide N, a short row repeats its own last
    token: nothing masked is ever seen.
    """

    visible: torch.Tensor
    masked: torch.Tensor
    inverse: torch.Tensor


def make_partition(order: torch.Tensor, sets: int) -> Partition:
    """The partition of a permutation (N,) into `sets` runs of equal length.

    Two sets mask 50 %, four 75 %: both cost one encoder pass over N tokens in all.

    Raises ValueError if there are fewer tokens than sets, or fewer than two sets.
    """
    tokens = len(order)
    if sets < 2 or tokens < sets:
        raise ValueError(f"cannot split {tokens} tokens into {sets} sets, expected at least 2 sets and a token for each")
    device = order.device
    owner = torch.empty(tokens, dtype=torch.long, device=device)
    owner[order] = torch.arange(tokens, device=device) * sets // tokens  # set that sees token n
    is_visible = owner == torch.arange(sets, device=device)[:, None]  # (S, N)
    visible = _rows(is_visible, -(-tokens // sets))
    masked = _rows(~is_visible, tokens - tokens // sets)
    position = (~is_visible).long().cumsum(1) - 1 + torch.arange(sets, device=device)[:, None] * masked.shape[1]  # (S, N)
    # sorted, as a boolean index would wait for the GPU
    hidden = is_visible.T.long().argsort(dim=1, stable=True)[:, : sets - 1]  # (N, S - 1)
    inverse = position.T.gather(1, hidden)
    return Partition(visible, masked, inverse)


def _rows(chosen: torch.Tensor, length: int) -> torch.Tensor:
    """(S, N) bool -> (S, length): the chosen numbers in order, the last repeated."""
    tokens = chosen.shape[1]
    numbers = torch.arange(tokens, device=chosen.device).expand_as(chosen)
    rows = torch.where(chosen, numbers, tokens).sort(1).values[:, :length]
    last = torch.where(chosen, numbers, -1).amax(1, keepdim=True)
    return torch.where(rows == tokens, last, rows)
