"""Do two images of different contrast show the same edges at the same places? A loss, and a measure in pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunet_l2g.training.gaussian_blur import gaussian_blur
from nnunet_l2g.training.precision import full_precision

SMOOTHING = 1.0  # pixels; with less, noise would count as edges
FLOOR = 1e-2  # gradient, in units of the normalised image per pixel, below which nothing is an edge


def structure_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""Distance of edges in place and direction, blind to contrast inversion and to the channel that shows an edge.

    With gradients of the smoothed image, :math:`T = \sum_c \nabla x_c \nabla x_c^T / (\sum_c |\nabla x_c|^2 + \eta^2)` and
    :math:`\eta` the image's mean gradient [1],

    .. math::
        L = 1 - \frac{2 \sum \langle T_a, T_b \rangle_F}{\sum |T_a|_F^2 + |T_b|_F^2} \in [0, 1]

    the sums over pixels and images. For one channel :math:`\langle T_a, T_b \rangle = \langle n_a, n_b \rangle^2` with n the
    normalised gradient field. L is 0 if the images are equal or inverted, and 1 if they share no edge. Edges that only one
    image has count too.

    Parameters
    ----------
    a, b : (N, C, H, W)

    Returns
    -------
    (), float32

    References
    ----------
    .. [1] Haber and Modersitzki. Intensity gradient based registration and fusion of multi-modal images. MICCAI 2006.
    """
    with full_precision(a.device.type):
        first, second = _edge_tensor(a.float()), _edge_tensor(b.float())  # (N, 3, H, W)
        common = (first * second).sum()
        total = (first.square() + second.square()).sum()
        return 1 - (2 * common + 1e-6) / (total + 1e-6)  # 0 for two images without edges


def _edge_tensor(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> T_yy, T_xx, sqrt(2) T_xy as (N, 3, H, W), whose dot product is Frobenius'."""
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
def measure_shift(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""How far all images b are shifted against a, by phase correlation of edges: :math:`b(x) \approx a(x - shift)`.

    Correlates the magnitudes of gradients. They are windowed, and the spectrum is whitened by its square root, since full
    whitening would amplify noise.

    Parameters
    ----------
    a, b : (N, C, H, W)
        Pairs with one common shift, such as the slices of a volume. They need not have the same contrast.

    Returns
    -------
    (2,) float32, whole pixels along H and W, each at most a quarter of the image. 0 without edges, NaN for NaN.
    """
    height, width = a.shape[-2:]
    with full_precision(a.device.type):
        first, second = (torch.fft.rfft2(_windowed_edges(x.float())) for x in (a, b))  # (N, H, W/2+1)
        cross = (first.conj() * second).sum(0)
        cross = cross / cross.abs().sqrt().clamp_min(1e-6)
        correlation = torch.fft.irfft2(cross, s=(height, width))  # (H, W), its origin in the corner
    reach = (max(1, height // 4), max(1, width // 4))
    correlation = torch.roll(correlation, reach, (0, 1))[: 2 * reach[0] + 1, : 2 * reach[1] + 1]
    peak, index = correlation.flatten().max(0)
    columns = correlation.shape[1]
    shift = torch.stack([index // columns - reach[0], index % columns - reach[1]]).float()
    shift = torch.where(peak <= 1e-12, 0.0, shift)  # no edges
    return torch.where(peak.isnan(), torch.nan, shift)


def _windowed_edges(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H, W): magnitude of the gradient over channels, without its mean, faded out at the border."""
    dy, dx = _gradient(x)
    edges = (dy.square() + dx.square()).sum(1).sqrt()
    edges = edges - edges.mean((1, 2), keepdim=True)
    return edges * torch.outer(*(torch.hann_window(n + 2, False, device=x.device)[1:-1] for n in edges.shape[1:]))
