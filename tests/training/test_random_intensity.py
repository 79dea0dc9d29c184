"""Random intensities: shapes stay, and curves are monotone."""

import pytest
import torch

from nnunet_l2g.training.random_intensity import RandomIntensity, random_curve


@pytest.mark.parametrize("shape", [(2, 1, 12, 10), (3, 2, 4, 8, 8)])
def test_random_intensities_keep_shape_and_type_and_leave_the_image_alone(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    kept, transform = x.clone(), RandomIntensity(1.0)
    for _ in range(20):
        y = transform(x)
        assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all() and not torch.equal(x, y)
        axes = tuple(range(2, x.dim()))
        assert ((y.mean(axes) - x.mean(axes)).abs() <= 1.05 * x.std(axes)).all()
        assert (y.std(axes) / x.std(axes)).max() < 1.4
    assert torch.equal(x, kept)
    assert torch.equal(RandomIntensity(0.0)(x), x)
    assert torch.isfinite(transform(torch.full(shape, 3.0))).all()
    assert transform(x.half()).dtype == torch.float16


def test_curves_rise_unless_inverted_and_move_no_voxel():
    torch.manual_seed(0)
    x = torch.randn(200).sort().values
    for _ in range(20):
        assert (random_curve(x, invert=False).diff() >= -1e-6).all()
    assert any((random_curve(x).diff() <= 1e-6).all() for _ in range(20))
