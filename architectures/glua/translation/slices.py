"""What the translation sees of nnU-Net's patches: 2D slices, in training encoded along random intensity maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunet_l2g.training.precision import full_precision

MULTIPLE, MINIMUM = 4, 16  # of a slice's sides: for two halvings, and since instance norms and reflections need some pixels
MAP_VALUES = 4  # of an intensity map, linear between them: few keep it an image, four let it fall and rise again


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


def random_slices(
    x: torch.Tensor, number: int, size: tuple[int, int], generator: torch.Generator, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`number` random slices of a batch, drawn uniformly without replacement, and one random crop of all of them.

    Constant slices, such as padding, are taken only where there are too few others: nothing can be learnt from them.

    Parameters
    ----------
    x, labels : (B, C or L, *patch)
    number, size : int, (h, w)
        At most as many as there are, and at most the slice's size.
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
    top, left = (int(torch.randint(n - s + 1, (), generator=generator)) for n, s in zip(slices.shape[-2:], size, strict=True))

    def taken(y: torch.Tensor) -> torch.Tensor:
        return pad(to_slices(y)[order.to(y.device)][..., top : top + size[0], left : left + size[1]])

    return taken(x), None if labels is None else taken(labels)


def random_intensity_maps(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Maps the intensities of each channel of each image by a random function of its own; shapes stay.

    With u the intensity between the channel's smallest and largest, 0 to 1, f piecewise linear through four equally
    spaced values drawn from U(0, 1), :math:`\tilde f` the same with the mean and the deviation of x, and a drawn from U(0, 1),

    .. math::
        y = a\,\tilde f(u) + (1 - a)\,x

    Most maps rise and fall. With a = 0, y is x: images that are encoded as they are lie within the range seen in training.

    Parameters
    ----------
    x : (N, C, H, W)
    generator : torch.Generator or None
        On the device; None: torch's own.

    Returns
    -------
    (N, C, H, W), float32; x itself where it is constant
    """
    with full_precision(x.device.type):
        x = x.float()
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        mean, deviation = _moments(x)
        place = (x - low) / (high - low).clamp_min(1e-6) * (MAP_VALUES - 1)  # (N, C, H, W), 0 ... MAP_VALUES - 1
        values = torch.rand(*x.shape[:2], MAP_VALUES, generator=generator, device=x.device)
        share = torch.rand(*x.shape[:2], 1, 1, generator=generator, device=x.device)
        left = place.long().clamp(0, MAP_VALUES - 2).flatten(2)  # (N, C, H W)
        at, step = values.gather(2, left), values.diff(dim=2).gather(2, left)
        mapped = (at + step * (place.flatten(2) - left)).view_as(x)
        own_mean, own_deviation = _moments(mapped)
        mapped = (mapped - own_mean) / own_deviation * deviation
        return share * (mapped + mean) + (1 - share) * x


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of each image, (N, C, 1, 1)."""
    mean = x.mean((2, 3), keepdim=True)
    return mean, (x - mean).square().mean((2, 3), keepdim=True).clamp_min(1e-12).sqrt()
