"""Is a channel of the source bright where the target is dark?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TURNED_BELOW = 0.75  # of the distance as it is: doubt leaves a channel alone
WORTH_IT = 0.05  # standard deviations: below it, a distance is the draw of cases, also between equal domains
CASES, PLANES, VOXELS = 50, 8, 1024  # cases of each domain, planes of a case, voxels of a plane


class Polarity(NamedTuple):
    """Of one channel: Wasserstein distances to the target's intensities, of the source as it is and turned over."""

    as_it_is: float
    turned: float

    @property
    def sign(self) -> int:
        """1, or -1 if the source is off as it is and clearly nearer turned over."""
        return -1 if self.as_it_is > WORTH_IT and self.turned < TURNED_BELOW * self.as_it_is else 1


def measure_polarity(source, target, seed: int = 0) -> list[Polarity]:
    r""":math:`W_1(\pm x_s, x_t)` of normalised intensities, exact and in one dimension, for each channel.

    A translation would have to learn the sign of contrast from shapes. Where one channel is close to the other's negative,
    as with bright and dark fluid in a tight field of view, the histograms say so beforehand; where air or a black background
    is in both domains, they speak against it. Over means about 0, a z-score's mean: intensities normalised to be positive are
    never nearer so.

    Parameters
    ----------
    source, target : datasets of nnU-Net
        Preprocessed cases; no label is read. A few random planes of up to `CASES` cases each.
    seed : int
        Same cases, same numbers.
    """
    from scipy.stats import wasserstein_distance

    samples = [_samples(dataset, np.random.default_rng(seed)) for dataset in (source, target)]  # (C, n) each
    return [Polarity(*(float(wasserstein_distance(sign * s, t)) for sign in (1, -1))) for s, t in zip(*samples, strict=True)]


def _samples(dataset, generator: np.random.Generator) -> np.ndarray:
    """(C, n) voxels, float64."""
    names = sorted(dataset.identifiers)
    found = []
    for name in generator.permutation(names)[:CASES]:
        data = dataset.load_case(str(name))[0]  # (C, *spatial), on disk
        for plane in generator.integers(data.shape[1], size=PLANES):
            values = np.asarray(data[:, int(plane)], dtype=np.float64).reshape(len(data), -1)  # (C, voxels)
            found.append(values[:, generator.integers(values.shape[1], size=VOXELS)])
    return np.concatenate(found, axis=1)
