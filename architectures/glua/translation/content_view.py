"""What the content encoder sees in training: images whose intensities say as little as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_l2g.training.precision import full_precision

VALUES = 4  # of a map, between them it is linear: few enough to stay an image, enough to fall and rise again


@dataclass(frozen=True)
class ContentView:
    """x -> what content is encoded of; as constructed by default, x itself.

    Parameters
    ----------
    remap : bool
        Intensities along random maps, see random_maps: a content that knows how bright things are in their own domain
        needs not learn what they look like in the other one.
    gradient : bool
        Whether translations learn from what is encoded of them. If they do, the cycle pays them for keeping the intensities of
        the image they were made of.
    generator : torch.Generator or None
        On the device; None: torch's own.
    """

    remap: bool = False
    gradient: bool = True
    generator: torch.Generator | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.gradient else x.detach()
        return random_maps(x, self.generator) if self.remap else x


def random_maps(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Each channel of each image along an intensity map of its own, most of which rise and fall; shapes stay.

    With u the intensity between the channel's smallest and largest, 0 to 1, f piecewise linear through four equally
    spaced values drawn from U(0, 1), :math:`\tilde f` the same with the mean and the deviation of x, and a drawn from U(0, 1),

    .. math::
        y = a\,\tilde f(u) + (1 - a)\,x

    Parameters
    ----------
    x : (N, C, H, W)
        Its gradient goes through the maps.

    Returns
    -------
    (N, C, H, W), float32; x itself where it is constant, and with a = 0: what is encoded in use, as it is, is in the
    range of what is encoded in training.
    """
    with full_precision(x.device.type):
        x = x.float()
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        mean, deviation = _moments(x)
        place = (x - low) / (high - low).clamp_min(1e-6) * (VALUES - 1)  # (N, C, H, W), 0 ... VALUES - 1
        values = torch.rand(*x.shape[:2], VALUES, generator=generator, device=x.device)
        share = torch.rand(*x.shape[:2], 1, 1, generator=generator, device=x.device)
        left = place.detach().long().clamp(0, VALUES - 2).flatten(2)  # (N, C, H W)
        at, step = values.gather(2, left), values.diff(dim=2).gather(2, left)
        mapped = (at + step * (place.flatten(2) - left)).view_as(x)
        own_mean, own_deviation = _moments(mapped)
        mapped = (mapped - own_mean) / own_deviation * deviation
        return share * (mapped + mean) + (1 - share) * x


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of each image, (N, C, 1, 1)."""
    mean = x.mean((2, 3), keepdim=True)
    return mean, (x - mean).square().mean((2, 3), keepdim=True).clamp_min(1e-12).sqrt()
