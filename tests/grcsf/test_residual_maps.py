"""The channels of a residual map, and the difference of Gaussians that replaces it in an ablation."""

import pytest
import torch
from scipy import ndimage

from nnunet_l2g.architectures.grcsf.residual_maps import CLIP, DifferenceOfGaussians, num_map_channels, stack_residuals
from nnunet_l2g.training.gaussian_blur import gaussian_blur


@pytest.mark.parametrize("channels", [1, 3])
def test_a_map_is_signed_absolute_and_the_difference_of_the_ratios(channels):
    low, high = 3 * torch.randn(2, channels, 6, 5), 3 * torch.randn(2, channels, 6, 5)
    maps = stack_residuals(low, high)
    for found, r in zip(maps, (low, high), strict=True):
        assert found.shape == (2, num_map_channels(channels), 6, 5) and found.abs().max() <= CLIP
        torch.testing.assert_close(found[:, :channels], r.clamp(-CLIP, CLIP))
        torch.testing.assert_close(found[:, channels], r.clamp(-CLIP, CLIP).abs().mean(1))
    torch.testing.assert_close(maps[0][:, -1], maps[1][:, channels] - maps[0][:, channels])
    torch.testing.assert_close(maps[0][:, -1], maps[1][:, -1])


def test_maps_of_perfect_reconstructions_are_zero():
    assert not any(m.any() for m in stack_residuals(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)))


@pytest.mark.parametrize("shape", [(9, 14), (6, 7, 8)])
def test_blur_equals_scipys(shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    found = gaussian_blur(x, 1.5)
    for b in range(2):
        for c in range(3):
            expected = ndimage.gaussian_filter(x[b, c].numpy(), 1.5, mode="nearest", radius=5)
            torch.testing.assert_close(found[b, c], torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_and_differences_keep_full_precision_under_autocast(dtype):
    x = 9 + torch.linspace(0, 1, 48).expand(1, 1, 48, 48)  # a small slope on a large offset
    plain = DifferenceOfGaussians()(x)
    with torch.autocast("cpu", dtype=dtype):
        found = DifferenceOfGaussians()(x)
        assert torch.equal(gaussian_blur(x, 1.0), gaussian_blur(x.clone(), 1.0))
    assert all(f.dtype == torch.float32 and torch.equal(f, p) for f, p in zip(found, plain, strict=True))


def test_difference_of_gaussians_has_unit_deviation_and_survives_constant_images():
    x = torch.randn(2, 3, 32, 32)
    for difference in DifferenceOfGaussians()(x):
        torch.testing.assert_close(difference.std((2, 3)), torch.ones(2, 3), rtol=1e-3, atol=1e-3)
    assert all(d.abs().max() < 0.01 for d in DifferenceOfGaussians()(torch.full((1, 1, 16, 16), 3.0)))
