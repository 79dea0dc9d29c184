"""Cuts images into tokens and back, in 2D and 3D, and says where each token stands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MIN_TOKENS = 8


def token_grid(spatial: Sequence[int], token_size: Sequence[int]) -> tuple[int, ...]:
    """Tokens along each axis.

    Raises
    ------
    ValueError
        If a token size does not divide its axis.
    """
    if len(spatial) != len(token_size) or any(s % t for s, t in zip(spatial, token_size, strict=False)):
        raise ValueError(
            f"spatial shape {tuple(spatial)} is not divisible by token size {tuple(token_size)}: each axis has to be a multiple"
        )
    return tuple(s // t for s, t in zip(spatial, token_size, strict=True))


def patchify(x: torch.Tensor, token_size: Sequence[int]) -> torch.Tensor:
    """(B, C, *spatial) -> (B, N, C T): tokens in row-major order, T = prod(token_size) voxels of C channels each."""
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
    r"""Fixed positions of a token grid: (N, dim), each axis with an equal share of the channels, the rest zero.

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
    return torch.nn.functional.pad(positions, (0, dim - positions.shape[1])).float()  # (N, dim)


def choose_token_size(
    patch_size: Sequence[int], spacing: Sequence[float], multiples: Sequence[int] | None = None, max_tokens: int = 8192
) -> tuple[int, ...]:
    """A token size that divides the patch: 16 voxels in 2D, 8 in 3D, fewer along coarse axes so that tokens are near cubes.

    Parameters
    ----------
    patch_size : (D,) voxels
    spacing : (D,) mm or any other unit
    multiples : (D,)
        Each token size has to be a multiple of it (the stride of the deepest decoder level that uses tokens).
    max_tokens : int
        Tokens become twice as large while a patch has more: attention grows with their square. They become half as large
        while a patch has fewer than 8.

    Raises
    ------
    ValueError
        If on some axis no divisor of the patch is within a factor of 4 of what is wanted and leaves two tokens to an axis
        that is long enough for them, or if even small tokens are fewer than 8. Names axis, patch and remedy.
    """
    multiples = multiples or [1] * len(patch_size)
    edge = {2: 16.0, 3: 8.0}[len(patch_size)]
    sizes = _sizes(patch_size, spacing, multiples, edge)
    while _tokens(patch_size, sizes) > max_tokens:
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
    # no more than the axis has: one token covers an axis of two or three voxels
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
