"""What the translation sees, slices and random intensity maps, and what measures whether edges move: no network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_translation import noise, phantoms

from nnunet_l2g.architectures.glua.translation.slices import (
    MAP_VALUES,
    from_slices,
    pad,
    random_intensity_maps,
    random_slices,
    to_slices,
)
from nnunet_l2g.architectures.glua.translation.structure_loss import FLOOR, _gradient, measure_shift, structure_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- slices ----


def test_slices_there_and_back():
    x = noise(2, 3, 4, 5, 6)
    assert torch.equal(to_slices(x)[4 + 1], x[1, :, 1]) and torch.equal(from_slices(to_slices(x), x.shape), x)
    padded = pad(noise(2, 1, 17, 5))
    assert padded.shape == (2, 1, 20, 16) and torch.equal(padded[..., 5:], padded[..., 4:5].expand(-1, -1, -1, 11))


def test_constant_slices_are_taken_last():
    x = torch.cat([torch.zeros(3, 1, 16, 16), noise(2, 1, 16, 16)])
    for seed in range(20):
        chosen, _ = random_slices(x, 3, (16, 16), seeded(seed))
        assert (chosen.flatten(1).std(1) > 0).tolist() == [True, True, False]


def test_chosen_slices_are_uniform_without_repetition_and_labels_go_along():
    x = torch.arange(8.0).view(2, 1, 4, 1, 1) + torch.arange(24.0).view(1, 1, 1, 1, 24) / 100 + torch.zeros(2, 1, 4, 20, 24)
    generator, seen, lefts = seeded(), torch.zeros(8), set()
    for _ in range(200):
        chosen, labels = random_slices(x, 2, (16, 16), generator, x.repeat(1, 2, 1, 1, 1))
        assert chosen.shape == (2, 1, 16, 16) and torch.equal(labels[:, :1], chosen)
        numbers = chosen[:, 0, 0, 0].floor().long()
        assert numbers[0] != numbers[1]
        seen[numbers] += 1
        lefts.add(round(float(chosen[0, 0, 0, 0] % 1) * 100))
    assert seen.min() > 30 and lefts == set(range(9))


# ---- random intensity maps ----


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**30), st.floats(1e-2, 1e4), st.floats(-100, 100))
def test_equal_intensities_stay_equal_and_scale_and_location_do_not_matter(images, channels, seed, scale, location):
    """A map is a function of the intensity alone, and of its place between the extremes."""
    x = torch.randint(0, 9, (images, channels, 6, 7), generator=seeded(seed)).float()
    x[..., 0, 0], x[..., 0, 1] = 0, 8  # the same extremes everywhere
    y = random_intensity_maps(x, seeded(seed))
    assert y.shape == x.shape and y.dtype == torch.float32 and torch.isfinite(y).all()
    assert (y.std((2, 3)) < 1.001 * x.std((2, 3)) + 1e-4).all()
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), atol=1e-4, rtol=0)
    for image, mapped in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        for value in image.unique():
            assert mapped[image == value].max() - mapped[image == value].min() < 1e-4
    moved = random_intensity_maps(scale * (x + location), seeded(seed)) / scale - location
    torch.testing.assert_close(moved, y, atol=2e-2, rtol=0)


def test_maps_are_numpys_interpolation():
    x, generator = torch.rand(3, 2, 5, 4, generator=seeded(1)), seeded(2)
    values = torch.rand(3, 2, MAP_VALUES, generator=generator)
    share = torch.rand(3, 2, 1, 1, generator=generator)
    y = random_intensity_maps(x, seeded(2))
    for n in range(3):
        for c in range(2):
            image = x[n, c].numpy()
            places = (image - image.min()) / (image.max() - image.min())
            mapped = np.interp(places, np.linspace(0, 1, MAP_VALUES), values[n, c].numpy())
            a = float(share[n, c])
            mapped = (mapped - mapped.mean()) / mapped.std() * image.std()
            np.testing.assert_allclose(y[n, c].numpy(), a * (image.mean() + mapped) + (1 - a) * image, atol=1e-4)


def test_each_channel_of_each_image_has_its_own_map_and_many_fall_somewhere():
    x = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(50, 2, 1, 1)
    y = random_intensity_maps(x, seeded()).flatten(2)
    assert len({tuple(line.tolist()) for line in y.flatten(0, 1)}) == 100
    assert (y.diff(dim=2) < -1e-4).any(2).float().mean() > 0.5 and (y.diff(dim=2) > 1e-4).any(2).float().mean() > 0.5


def test_constant_images_stay_and_flat_ones_stay_flat():
    for value in (0.0, 7.3, 1e5 / 3):
        flat = torch.full((2, 1, 4, 4), value)
        torch.testing.assert_close(random_intensity_maps(flat), flat, atol=1e-5, rtol=1e-6)
    dithered = 3 + 0.01 * torch.randn(4, 1, 16, 16, generator=seeded())
    assert random_intensity_maps(dithered).std() < 0.02  # noise in a flat slice is not amplified to an image
    assert random_intensity_maps(dithered.bfloat16(), seeded(3)).dtype == torch.float32


# ---- edges ----


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (-5, 4)])
def test_a_shift_between_contrasts_is_found(shift):
    """The same hearts in two contrasts, with noise of their own."""
    cine, late = phantoms(range(6), "cine"), phantoms(range(6), "late_enhancement")
    moved = torch.roll(late, shift, (2, 3))
    assert measure_shift(cine, moved).tolist() == list(shift)
    assert all(measure_shift(cine[n : n + 1], moved[n : n + 1]).tolist() == list(shift) for n in range(6))


def test_the_shift_of_images_without_edges_is_0_and_that_of_nan_nan():
    assert measure_shift(torch.ones(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)).tolist() == [0, 0]
    assert measure_shift(torch.ones(1, 1, 16, 16), noise(1, 1, 16, 16)).tolist() == [0, 0]
    assert measure_shift(torch.full((1, 1, 16, 16), torch.nan), noise(1, 1, 16, 16)).isnan().all()


def test_structure_is_blind_to_contrast_and_not_to_place():
    cine, late = phantoms(range(4), "cine"), phantoms(range(4), "late_enhancement")
    assert structure_loss(cine, cine) < 1e-5 and structure_loss(cine, 2 - 3 * cine) < 1e-3
    losses = [float(structure_loss(cine, torch.roll(late, (0, k), (2, 3)))) for k in range(4)]
    assert losses == sorted(losses) and losses[2] > 1.5 * losses[0] and losses[3] < 1
    assert structure_loss(cine, torch.zeros_like(cine)) > 0.99
    assert abs(float(structure_loss(torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)))) < 1e-6
    swapped = torch.cat([cine, late], 1)
    torch.testing.assert_close(structure_loss(swapped, swapped.flip(1)), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_structure_is_the_normalised_gradient_field_for_one_channel_and_has_a_gradient():
    for image in (noise(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)):
        image.requires_grad_(True)
        structure_loss(noise(1, 1, 16, 16, seed=3), image).backward()
        assert torch.isfinite(image.grad).all()
    fields, x = [], noise(1, 1, 8, 8)
    for image in (x, x.flip(3)):
        dy, dx = _gradient(image)
        eta = torch.sqrt(dy**2 + dx**2).mean() + FLOOR
        fields.append(torch.stack([dy, dx]) / torch.sqrt(dy**2 + dx**2 + eta**2))
    a, b = fields
    expected = 1 - 2 * ((a * b).sum(0) ** 2).sum() / ((a * a).sum(0) ** 2 + (b * b).sum(0) ** 2).sum()
    torch.testing.assert_close(structure_loss(x, x.flip(3)), expected, atol=1e-5, rtol=1e-5)
