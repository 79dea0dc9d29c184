"""Tokens of an image: cut and put together, their positions, their size for a plan, and complementary masks of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

MIN_TOKENS, MAX_TOKENS = 8, 8192  # of a patch; attention grows with their square


def token_grid(spatial: Sequence[int], token_size: Sequence[int]) -> tuple[int, ...]:
    """Number of tokens along each axis. ValueError if a token size does not divide its axis."""
    if len(spatial) != len(token_size) or any(s % t for s, t in zip(spatial, token_size, strict=False)):
        raise ValueError(
            f"spatial shape {tuple(spatial)} is not divisible by token size {tuple(token_size)}: each axis has to be a multiple"
        )
    return tuple(s // t for s, t in zip(spatial, token_size, strict=True))


def patchify(x: torch.Tensor, token_size: Sequence[int]) -> torch.Tensor:
    """(B, C, *spatial) -> (B, N, C T): tokens in row-major order, each of T = prod(token_size) voxels with C channels."""
    grid, dims = token_grid(x.shape[2:], token_size), len(token_size)
    split = [n for pair in zip(grid, token_size, strict=True) for n in pair]
    x = x.reshape(*x.shape[:2], *split)  # (B, C, g_1, t_1, g_2, t_2, ...)
    order = [0, *(2 + 2 * a for a in range(dims)), 1, *(3 + 2 * a for a in range(dims))]
    return x.permute(order).flatten(1, dims).flatten(2)  # (B, N, C T)


def unpatchify(tokens: torch.Tensor, token_size: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """(B, N, C T) -> (B, C, *spatial): the inverse of `patchify`."""
    dims = len(token_size)
    channels = tokens.shape[2] // math.prod(token_size)
    x = tokens.reshape(tokens.shape[0], *grid, channels, *token_size)  # (B, g_1, g_2, ..., C, t_1, t_2, ...)
    order = [0, 1 + dims, *(n for a in range(dims) for n in (1 + a, 2 + dims + a))]
    return x.permute(order).reshape(tokens.shape[0], channels, *(g * t for g, t in zip(grid, token_size, strict=True)))


def sincos_positions(grid: Sequence[int], dim: int) -> torch.Tensor:
    r"""Fixed positions of a token grid: (N, dim). Each axis has an equal share of the channels, the rest is zero.

    For coordinate x on an axis with f frequencies: :math:`\sin(x / 10000^{k/f}), \cos(x / 10000^{k/f})`, k = 0 .. f - 1 [1].

    Raises ValueError if dim is under 2 for each axis.

    References
    ----------
    .. [1] Vaswani et al. Attention is all you need. NeurIPS 2017.
    """
    frequencies = dim // (2 * len(grid))
    if frequencies < 1:
        raise ValueError(f"dim is {dim}, expected at least {2 * len(grid)}: a sine and a cosine for each of {len(grid)} axes")
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)  # (f,)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    phases = [axis.reshape(-1, 1) * omega for axis in axes]  # (N, f) for each axis
    positions = torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], 1)  # (N, 2 f D)
    return F.pad(positions, (0, dim - positions.shape[1])).float()  # (N, dim)


def choose_token_size(patch_size: Sequence[int], spacing: Sequence[float], multiples: Sequence[int]) -> tuple[int, ...]:
    """A token size that divides the patch: 16 voxels in 2D and 8 in 3D, fewer along coarse axes, so that tokens are near cubes.

    Tokens are doubled while a patch has more than 8192 of them, and halved while it has fewer than 8.

    Parameters
    ----------
    patch_size : (D,) voxels
    spacing : (D,) mm or any other unit
    multiples : (D,)
        Each token size has to be a multiple of it (the stride of the deepest decoder level that uses tokens).

    Raises
    ------
    ValueError
        If on some axis no divisor of the patch is within a factor of 4 of what is wanted and leaves two tokens to an axis
        that is long enough for them, or if the patch has fewer than 8 tokens of any size. Names axis, patch and remedy.
    """
    edge = {2: 16.0, 3: 8.0}[len(patch_size)]
    sizes = _sizes(patch_size, spacing, multiples, edge)
    while _tokens(patch_size, sizes) > MAX_TOKENS:
        edge *= 2
        sizes = _sizes(patch_size, spacing, multiples, edge)
    while _tokens(patch_size, sizes) < MIN_TOKENS and edge > 1:
        edge /= 2
        sizes = _sizes(patch_size, spacing, multiples, edge)
    if _tokens(patch_size, sizes) < MIN_TOKENS:
        raise ValueError(
            f"patch {tuple(patch_size)} has only {_tokens(patch_size, sizes)} tokens of {sizes} voxels, expected at least "
            f"{MIN_TOKENS}: the masked autoencoder would have nothing to see. Use plans with a larger patch."
        )
    return sizes


def _sizes(patch_size, spacing, multiples, edge: float) -> tuple[int, ...]:
    # no more than the axis has: one token covers a whole axis of two or three voxels
    targets = [max(1.0, min(n, edge * min(spacing) / s)) for n, s in zip(patch_size, spacing, strict=True)]
    return tuple(
        _nearest_divisor(axis, *values) for axis, values in enumerate(zip(patch_size, targets, multiples, strict=True))
    )


def _tokens(patch_size, sizes) -> int:
    return math.prod(token_grid(patch_size, sizes))


def _nearest_divisor(axis: int, length: int, target: float, multiple: int) -> int:
    divisors = [n for n in range(multiple, length + 1, multiple) if length % n == 0]
    fitting = [n for n in divisors if max(n / target, target / n) <= 4 and (n < length or length < 2 * target)]
    if not fitting:
        raise ValueError(
            f"no token size divides the patch on axis {axis}: {length} voxels, wanted about {target:.3g} and a multiple of "
            f"{multiple}. Give that axis of patch_size in the plans a length such as {_next_length(length, target, multiple)}."
        )
    return min(fitting, key=lambda n: abs(math.log(n / target)))


def _next_length(length: int, target: float, multiple: int) -> int:
    step = multiple * max(1, round(target / multiple))
    return max(2, -(-length // step)) * step


class Partition(NamedTuple):
    """Complementary masks: S sets, each of which sees 1/S of N tokens.

    Attributes
    ----------
    visible : (S, ceil(N / S)) token numbers; the rows are disjoint and cover all tokens
    masked : (S, N - floor(N / S)) token numbers; row s has those that row s of `visible` leaves out
    inverse : (N, S - 1) places of token n in the flattened `masked`, one for each time it is masked

    All rows have equal length, so that all sets run as one batch. Where S does not divide N, a short row repeats its own last
    token, so that no masked token is ever seen.
    """

    visible: torch.Tensor
    masked: torch.Tensor
    inverse: torch.Tensor


def make_partition(order: torch.Tensor, sets: int) -> Partition:
    """The partition of a permutation (N,) of at least `sets` tokens into `sets` runs of equal length.

    Two sets mask 50 %, four mask 75 %. Either way all sets together are one encoder pass over N tokens.
    """
    tokens = len(order)
    device = order.device
    owner = torch.empty(tokens, dtype=torch.long, device=device)
    owner[order] = torch.arange(tokens, device=device) * sets // tokens  # set that sees token n
    is_visible = owner == torch.arange(sets, device=device)[:, None]  # (S, N)
    visible = _rows(is_visible, -(-tokens // sets))
    masked = _rows(~is_visible, tokens - tokens // sets)
    position = (~is_visible).long().cumsum(1) - 1 + torch.arange(sets, device=device)[:, None] * masked.shape[1]  # (S, N)
    # sorted, because a boolean index would make the CPU wait for the GPU
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
