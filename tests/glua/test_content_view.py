"""What content is encoded of: shapes stay, intensities do not; without a gradient to translations unless asked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_l2g.architectures.glua.translation.content_view import VALUES, ContentView, random_maps


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**30), st.floats(1e-2, 1e4), st.floats(-100, 100))
def test_equal_intensities_stay_equal_and_scale_and_location_do_not_matter(images, channels, seed, scale, location):
    """A map is a function of the intensity: one value for each, whatever the place; and of its rank between the extremes."""
    x = torch.randint(0, 9, (images, channels, 6, 7), generator=seeded(seed)).float()
    x[..., 0, 0], x[..., 0, 1] = 0, 8  # the same extremes everywhere
    y = random_maps(x, seeded(seed))
    assert y.shape == x.shape and y.dtype == torch.float32 and torch.isfinite(y).all()
    assert (y.std((2, 3)) < 1.001 * x.std((2, 3)) + 1e-4).all()
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), atol=1e-4, rtol=0)
    for image, mapped in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        for value in image.unique():
            assert mapped[image == value].max() - mapped[image == value].min() < 1e-4
    moved = random_maps(scale * (x + location), seeded(seed)) / scale - location
    torch.testing.assert_close(moved, y, atol=2e-2, rtol=0)


def test_maps_are_numpys_interpolation():
    x, generator = torch.rand(3, 2, 5, 4, generator=seeded(1)), seeded(2)
    values = torch.rand(3, 2, VALUES, generator=generator)
    share = torch.rand(3, 2, 1, 1, generator=generator)
    y = random_maps(x, seeded(2))
    for n in range(3):
        for c in range(2):
            image = x[n, c].numpy()
            places = (image - image.min()) / (image.max() - image.min())
            mapped = np.interp(places, np.linspace(0, 1, VALUES), values[n, c].numpy())
            a = float(share[n, c])
            mapped = (mapped - mapped.mean()) / mapped.std() * image.std()
            expected = a * (image.mean() + mapped) + (1 - a) * image
            np.testing.assert_allclose(y[n, c].numpy(), expected, atol=1e-4)


def test_each_channel_of_each_image_has_its_own_map_and_many_fall_somewhere():
    x = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(50, 2, 1, 1)
    y = random_maps(x, seeded()).flatten(2)
    assert len({tuple(line.tolist()) for line in y.flatten(0, 1)}) == 100
    falls = (y.diff(dim=2) < -1e-4).any(2).float().mean()
    rises = (y.diff(dim=2) > 1e-4).any(2).float().mean()
    assert falls > 0.5 and rises > 0.5


def test_constant_images_stay_and_flat_ones_stay_flat_and_drawing_is_the_generators():
    for value in (0.0, 7.3, 1e5 / 3):
        flat = torch.full((2, 1, 4, 4), value)
        torch.testing.assert_close(random_maps(flat), flat, atol=1e-5, rtol=1e-6)
    dithered = 3 + 0.01 * torch.randn(4, 1, 16, 16, generator=seeded())
    assert random_maps(dithered).std() < 0.02  # noise in a flat slice is not blown up to an image
    x = torch.rand(2, 1, 8, 8, generator=seeded())
    assert torch.equal(random_maps(x, seeded(3)), random_maps(x, seeded(3)))
    assert not torch.equal(random_maps(x, seeded(3)), random_maps(x, seeded(4)))
    assert random_maps(x.bfloat16(), seeded(3)).dtype == torch.float32


def test_the_gradient_through_maps_is_that_of_finite_differences():
    x = torch.rand(1, 1, 4, 4, generator=seeded(5), dtype=torch.float64).float().requires_grad_(True)
    weights = torch.randn(1, 1, 4, 4, generator=seeded(6))

    def total(image):
        return (random_maps(image, seeded(7)) * weights).sum()

    total(x).backward()
    inner = x.detach().flatten().argsort()[8]  # neither extreme, which others are measured by
    with torch.no_grad():
        step = torch.zeros(16)
        step[inner] = 1e-3
        step = step.view_as(x)
        slope = (total(x + step) - total(x - step)) / 2e-3
    assert float(x.grad.flatten()[inner]) == pytest.approx(float(slope), rel=0.02, abs=0.02)


def test_the_view_passes_a_gradient_only_if_asked_and_is_the_image_itself_by_default():
    x = torch.rand(1, 1, 8, 8, generator=seeded(), requires_grad=True)
    assert ContentView()(x) is x
    assert not ContentView(remap=True, gradient=False)(x).requires_grad
    assert not ContentView(gradient=False)(x).requires_grad
    assert ContentView(remap=True)(x).requires_grad
