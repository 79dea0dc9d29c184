"""The distance of two domains, as a number."""

import numpy as np
import pytest
import torch

from nnunet_l2g.architectures.glua.domain_gap import DomainGap, feature_samples, intensity_samples, sliced_wasserstein


def test_the_gap_of_shifted_gaussians_is_their_shift():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, b + 2) == pytest.approx(2, abs=0.1)
    a, b = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) + np.array([3.0, 0, 0])
    assert sliced_wasserstein(a, b, 500) == pytest.approx(3 / 3**0.5, rel=0.1)  # E theta_1^2 = 1/3
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)


def test_samples_of_intensities_and_features():
    generator = torch.Generator().manual_seed(0)
    one, two, flat = torch.randn(2, 1, 8, 8), torch.arange(2.0 * 2 * 4 * 8 * 8).view(2, 2, 4, 8, 8), torch.randn(2, 2, 8, 2)
    assert intensity_samples(one, 50, generator).shape == (50, 1)
    patches = intensity_samples(two, 50, generator)
    assert patches.shape == (50, 18) and intensity_samples(flat, 5, generator).shape == (5, 2)
    patches = patches.reshape(50, 3, 3, 2)
    assert (patches[..., 1] - patches[..., 0] == 256).all() and (patches[:, 1] - patches[:, 0] == 8).all()
    assert feature_samples(torch.randn(2, 5, 3, 3), 100, generator).shape == (18, 5)


def test_the_gap_shrinks_by_a_right_translation_and_forgets_its_batches():
    gap, target = DomainGap(batches=2, samples=200), torch.randn(2, 1, 16, 16)
    for _ in range(3):
        gap.remember(torch.randn(2, 1, 16, 16) * 3 + 5, target)
    found = gap.measure(lambda x: torch.cat([x, -x], 1), lambda x: (x - 5) / 3)
    assert set(found) == {
        "gap_intensity", "gap_intensity_translated", "gap_features", "gap_features_translated",
    }  # fmt: skip
    for kind in ("intensity", "features"):
        assert found[f"gap_{kind}_translated"] < 0.2 * found[f"gap_{kind}"]
    assert gap.measure(lambda x: x, None) == {}
