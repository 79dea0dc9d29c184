"""Slices of patches: nnU-Net gives 2D or 3D patches, the translation sees 2D."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MULTIPLE, MINIMUM = 4, 16  # of a slice's sides: up to two halvings, and instance norms and reflections need a few pixels


def to_slices(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as it is; (B, C, D, H, W) -> (B D, C, H, W), sample by sample."""
    return x if x.dim() == 4 else x.transpose(1, 2).flatten(0, 1)


def from_slices(slices: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse: (B D, C, H, W) -> the batch's shape."""
    if len(shape) == 4:
        return slices
    return slices.view(shape[0], shape[2], *slices.shape[1:]).transpose(1, 2).contiguous()


def pad(slices: torch.Tensor) -> torch.Tensor:
    """Repeats the last row and column up to the next size that the networks take."""
    more = [max(MINIMUM, -(-n // MULTIPLE) * MULTIPLE) - n for n in slices.shape[-2:]]
    if not any(more):
        return slices
    return F.pad(slices.float(), (0, more[1], 0, more[0]), mode="replicate").to(slices.dtype)


def random_choice(
    x: torch.Tensor, number: int, size: tuple[int, int], generator: torch.Generator, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`number` random slices of a batch, each slice as likely as any other, and one random crop of all of them.

    Constant ones, such as padding, are taken only where there are too few others: there is nothing to learn from them.

    Parameters
    ----------
    x, labels : (B, C or L, *patch)
    number : int
        At most as many as there are; drawn without replacement.
    size : (h, w)
        Of the crop, at most the slice's.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    (number, C, h, w) and the labels in the same places or None; both padded, see `pad`.
    """
    slices = to_slices(x)
    order = torch.randperm(len(slices), generator=generator).to(x.device)
    flat = slices.flatten(1)
    constant = flat.amax(1) == flat.amin(1)  # (N,)
    order = order[constant[order].int().argsort(stable=True)][:number]
    (top, left) = (int(torch.randint(n - s + 1, (), generator=generator)) for n, s in zip(slices.shape[-2:], size, strict=True))

    def taken(y: torch.Tensor) -> torch.Tensor:
        return pad(to_slices(y)[order.to(y.device)][..., top : top + size[0], left : left + size[1]])

    return taken(x), None if labels is None else taken(labels)
