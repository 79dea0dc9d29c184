"""Random intensities for a batch of images, shapes unchanged: augmentation towards unseen modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunet_l2g.training.precision import full_precision


class RandomIntensity:
    r"""Changes each sample, with a probability, by one of two transforms [1, 2]:

    - random convolution: :math:`a\,g(x) + (1 - a)\,x`, g two random convolutions with a LeakyReLU between them, a uniform in
      [0, 1];
    - random curve: a cubic Bezier curve of intensities, inverted half of the time, a curve of its own for each channel;

    both rescaled to the mean and standard deviation that x has, for each channel. Then they are scaled by
    :math:`\mathcal N(1, 0.1)` and moved by :math:`\mathcal N(0, 0.5)` in units of that deviation. No label is needed, unlike
    the class-wise part of [1].

    Parameters
    ----------
    probability : float
    convolution : bool
        False: curves alone.
    invert : bool
        Whether a curve may fall.

    Shapes
    ------
    call: (B, C, *spatial) -> the same, same type and device; x itself is left alone

    References
    ----------
    .. [1] Su et al. Rethinking data augmentation for single-source domain generalization (SLAug). AAAI 2023.
    .. [2] Xu et al. Robust and generalizable visual representation learning via random convolutions. ICLR 2021.
    """

    def __init__(self, probability: float = 0.8, convolution: bool = True, invert: bool = True):
        self.probability, self.convolution, self.invert = probability, convolution, invert

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device.type):
            samples = [self._transform(s) if torch.rand(()) < self.probability else s for s in x.float()]
        return torch.stack(samples).to(x.dtype)

    def _transform(self, x: torch.Tensor) -> torch.Tensor:
        """x (C, *spatial)."""
        if self.convolution and torch.rand(()) < 0.5:
            y = random_convolution(x)
        else:
            y = torch.stack([random_curve(c, self.invert) for c in x])
        y = _with_moments_of(x, y)
        shape = (-1,) + (1,) * (x.dim() - 1)
        scale = (1 + 0.1 * torch.randn(len(x))).clamp(0.7, 1.3).view(shape).to(x.device)
        location = (0.5 * torch.randn(len(x))).clamp(-1, 1).view(shape).to(x.device)
        mean, std = _moments(x)
        return mean + (y - mean) * scale + location * std


def random_convolution(x: torch.Tensor, width: int = 4) -> torch.Tensor:
    """x (C, *spatial), mixed with the output of two random convolutions of 1 or 3 voxels a side."""
    dims = x.dim() - 1
    convolve = F.conv2d if dims == 2 else F.conv3d
    y = x[None]
    for inputs, outputs in ((len(x), width), (width, len(x))):
        side = 1 if torch.rand(()) < 0.5 else 3
        kernel = torch.randn(outputs, inputs, *[side] * dims) / (inputs * side**dims) ** 0.5
        y = F.leaky_relu(y, 0.2) if inputs == width else y
        y = convolve(y, kernel.to(x.device), torch.randn(outputs).to(x.device), padding=side // 2)
    share = torch.rand(()).to(x.device)
    return share * _with_moments_of(x, y[0]) + (1 - share) * x


def random_curve(x: torch.Tensor, invert: bool = True, points: int = 256) -> torch.Tensor:
    """x (*spatial), scaled to [0, 1], mapped by a random Bezier curve from (0, 0) to (1, 1); inverted, (0, 1) to (1, 0)."""
    low, high = x.min(), x.max()
    t = torch.linspace(0, 1, points)
    middle = torch.rand(2, 2)  # two control points, in the unit square: the curve is a function
    bezier = 3 * (1 - t) ** 2 * t * middle[:, :1] + 3 * (1 - t) * t**2 * middle[:, 1:] + t**3  # (2, points)
    along, height = bezier.to(x.device)
    if invert and torch.rand(()) < 0.5:
        height = 1 - height
    value = ((x - low) / (high - low).clamp_min(1e-6)).contiguous()
    right = torch.searchsorted(along.contiguous(), value).clamp(1, points - 1)
    share = (value - along[right - 1]) / (along[right] - along[right - 1]).clamp_min(1e-8)
    return torch.lerp(height[right - 1], height[right], share.clamp(0, 1))


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    axes = tuple(range(1, x.dim()))
    return x.mean(axes, keepdim=True), x.std(axes, keepdim=True, unbiased=False)


def _with_moments_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    (mean, std), (own_mean, own_std) = _moments(x), _moments(y)
    return (y - own_mean) / own_std.clamp_min(1e-6) * std + mean
