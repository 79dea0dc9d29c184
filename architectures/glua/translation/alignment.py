"""Do two images of different contrast show the same shapes at the same places? A loss, and a measure in pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from nnunet_l2g.training.gaussian_blur import gaussian_blur
from nnunet_l2g.training.precision import full_precision

SMOOTHING = 1.0  # pixels; less would compare noise
FLOOR = 1e-2  # a gradient, in units of the normalised image per pixel, under which nothing is an edge


def structure_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""Distance of edges in place and direction, blind to the sign of contrast and to which channel shows them.

    With gradients of the smoothed image, :math:`T = \sum_c \nabla x_c \nabla x_c^T / (\sum_c |\nabla x_c|^2 + \eta^2)` and
    :math:`\eta` the image's mean gradient [1],

    .. math::
        L = 1 - \frac{2 \sum \langle T_a, T_b \rangle_F}{\sum |T_a|_F^2 + |T_b|_F^2} \in [0, 1]

    the sums over pixels and images. For one channel :math:`\langle T_a, T_b \rangle = \langle n_a, n_b \rangle^2` with n the
    normalised gradient field. 0 if the images are equal or inverted, 1 if they share no edge; edges that only one of them has
    count too.

    Parameters
    ----------
    a, b : (N, C, H, W)

    Returns
    -------
    scalar, float32

    References
    ----------
    .. [1] Haber and Modersitzki. Intensity gradient based registration and fusion of multi-modal images. MICCAI 2006.
    """
    with full_precision(a.device.type):
        first, second = _edge_tensor(a.float()), _edge_tensor(b.float())  # (N, 3, H, W)
        common = (first * second).sum()
        total = (first.square() + second.square()).sum()
        return 1 - (2 * common + 1e-6) / (total + 1e-6)  # two images without edges agree


def _edge_tensor(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> T_yy, T_xx, sqrt(2) T_xy as (N, 3, H, W): its dot product is Frobenius'."""
    dy, dx = _gradient(x)
    yy, xx, xy = dy.square().sum(1), dx.square().sum(1), (dy * dx).sum(1)  # (N, H, W)
    energy = yy + xx
    eta = energy.detach().sqrt().mean((1, 2), keepdim=True) + FLOOR
    return torch.stack([yy, xx, 2**0.5 * xy], 1) / (energy + eta.square())[:, None]


def _gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences of the smoothed image along H and W, each (N, C, H, W); edges replicated."""
    x = F.pad(gaussian_blur(x, SMOOTHING), (1, 1, 1, 1), mode="replicate")
    return (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2, (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2


@torch.no_grad()
def shift_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""How far b is shifted against a, by phase correlation of their edges: :math:`b(x) \approx a(x - shift)`, up to contrast.

    Correlates the magnitudes of gradients, windowed, with the spectrum whitened by its square root (full whitening would
    listen to noise), and refines the peak by a parabola. All slices of a sample together give one answer, so one slice
    without edges does no harm.

    Parameters
    ----------
    a, b : (B, C, H, W) or (B, C, D, H, W)

    Returns
    -------
    (B, 2) float32, pixels along H and W, each at most a quarter of the image. 0 where there is no edge.

    Raises
    ------
    ValueError
        If the shapes differ or are no images.
    """
    if a.shape != b.shape or a.dim() not in (4, 5):
        raise ValueError(f"shift_of got {tuple(a.shape)} and {tuple(b.shape)}, expected two equal (B, C, [D,] H, W)")
    if a.dim() == 4:
        a, b = a[:, :, None], b[:, :, None]
    height, width = a.shape[-2:]
    with full_precision(a.device.type):
        first, second = (torch.fft.rfft2(_edges(x.float())) for x in (a, b))  # (B, D, H, W/2+1)
        cross = (first.conj() * second).sum(1)
        cross = cross / cross.abs().sqrt().clamp_min(1e-6)
        correlation = torch.fft.irfft2(cross, s=(height, width))  # (B, H, W), its origin in the corner
    reach = (max(1, height // 4), max(1, width // 4))
    correlation = torch.roll(correlation, reach, (1, 2))[:, : 2 * reach[0] + 1, : 2 * reach[1] + 1]
    rows, columns = correlation.shape[1:]
    peak, index = correlation.flatten(1).max(1)  # (B,)
    row, column = index // columns, index % columns
    sample = torch.arange(len(peak), device=peak.device)
    down = _refined(row, rows, lambda r: correlation[sample, r, column])
    right = _refined(column, columns, lambda c: correlation[sample, row, c])
    found = torch.stack([down - reach[0], right - reach[1]], 1)  # (B, 2)
    found = torch.where(torch.isnan(peak)[:, None], torch.nan, found)
    return torch.where(peak[:, None] <= 1e-12, 0.0, found)  # no edges


def _edges(x: torch.Tensor) -> torch.Tensor:
    """(B, C, D, H, W) -> (B, D, H, W): magnitude of the gradient over channels, its mean removed, faded out at the border."""
    batch, channels, depth, height, width = x.shape
    dy, dx = _gradient(x.transpose(1, 2).reshape(-1, channels, height, width))
    edges = (dy.square() + dx.square()).sum(1).sqrt()  # (B D, H, W)
    edges = edges - edges.mean((1, 2), keepdim=True)
    window = torch.outer(*(torch.hann_window(n + 2, False, device=x.device)[1:-1] for n in (height, width)))
    return (edges * window).view(batch, depth, height, width)


def _refined(place: torch.Tensor, length: int, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Where the parabola through a line's peak and its neighbours is highest; (B,), no further than half a pixel from it."""
    before, peak, after = (value((place + step).clamp(0, length - 1)) for step in (-1, 0, 1))
    curvature = before - 2 * peak + after
    inside = (place > 0) & (place < length - 1) & (curvature < 0)
    return place + torch.where(inside, 0.5 * (before - after) / torch.where(inside, curvature, -1.0), 0.0)
