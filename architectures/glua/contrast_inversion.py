"""Contrast inversion: measures whether a channel of the source is bright where the target is dark, and inverts it."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import torch

INVERT_BELOW = 0.75  # of the distance without inversion; in doubt a channel stays as it is
SMALLEST_DISTANCE = 0.05  # standard deviations; smaller distances come from the choice of cases, also in equal domains
CASES, PLANES, VOXELS = 50, 8, 1024  # cases of each domain, planes of a case, voxels of a plane

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class ContrastDistances(NamedTuple):
    """Wasserstein distances of one channel to the target's intensities: of the source as it is, and of the inverted source."""

    as_it_is: float
    inverted: float

    @property
    def invert(self) -> bool:
        """True if the source is far from the target as it is, and clearly nearer after inversion."""
        return self.as_it_is > SMALLEST_DISTANCE and self.inverted < INVERT_BELOW * self.as_it_is


def measure_contrast_distances(source, target, seed: int = 0) -> list[ContrastDistances]:
    r""":math:`W_1(x_s, x_t)` and :math:`W_1(-x_s, x_t)` of normalised intensities for each channel, exact in one dimension.

    A translation would have to learn the direction of contrast from shapes. Where a channel of one domain resembles the
    inverted channel of the other, the histograms show it before training. Air or a black background in both domains makes the
    inverted source the more distant one. The inversion is about 0, the mean of z-scores: intensities that a normalisation made
    positive are never nearer after it.

    Parameters
    ----------
    source, target : datasets of nnU-Net
        Preprocessed cases. No label is read. A few random planes of up to `CASES` cases are.
    seed : int
        The same cases and the same seed give the same numbers.
    """
    from scipy.stats import wasserstein_distance

    samples = [_sample_intensities(dataset, np.random.default_rng(seed)) for dataset in (source, target)]  # (C, n) each
    return [
        ContrastDistances(float(wasserstein_distance(s, t)), float(wasserstein_distance(-s, t)))
        for s, t in zip(*samples, strict=True)
    ]


def _sample_intensities(dataset, generator: np.random.Generator) -> np.ndarray:
    """Random voxels of all channels, (C, n), float64."""
    names = sorted(dataset.identifiers)
    samples = []
    for name in generator.permutation(names)[:CASES]:
        data = dataset.load_case(str(name))[0]  # (C, *spatial), on disk
        for plane in generator.integers(data.shape[1], size=PLANES):
            values = np.asarray(data[:, int(plane)], dtype=np.float64).reshape(len(data), -1)  # (C, voxels)
            samples.append(values[:, generator.integers(values.shape[1], size=VOXELS)])
    return np.concatenate(samples, axis=1)


def invert_contrast(images: Array, inverted: Array, channel_axis: int = 0) -> Array:
    """:math:`-x_c` for the inverted channels c, :math:`x_c` for the others. Its own inverse.

    Parameters
    ----------
    images : (..., C, *spatial), C at `channel_axis`
    inverted : (C,) bool, on the same device

    Returns
    -------
    A copy of `images`, of the same type
    """
    inverted = inverted.reshape(-1, *[1] * (images.ndim - channel_axis - 1))
    where = torch.where if isinstance(images, torch.Tensor) else np.where
    return where(inverted, -images, images)


def inverted_dataset_class(dataset_class: type, inverted: np.ndarray) -> type:
    """nnU-Net's class of data sets, with inverted images (C, *spatial) in memory; inverted : (C,) bool.

    The class is made inside a function, so other processes cannot unpickle it.
    """

    class InvertedDataset(dataset_class):
        def load_case(self, identifier):
            data, *rest = super().load_case(identifier)
            return invert_contrast(np.asarray(data[:]), inverted), *rest

    return InvertedDataset
