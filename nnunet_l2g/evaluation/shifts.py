"""Ways in which images of another scanner differ: noise, blur, bias field, contrast, resolution; each in three strengths."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

STRENGTHS = {
    "noise": (0.05, 0.1, 0.2),  # standard deviation, as a fraction of the intensity range
    "blur": (0.5, 1.0, 2.0),  # standard deviation of the Gaussian, in the smallest voxel size
    "bias": (0.2, 0.4, 0.8),  # logarithm of the field's largest factor
    "contrast": (1.25, 1.6, 2.0),  # exponent of the intensity range
    "resolution": (1.5, 2.0, 3.0),  # factor by which the finest axes get coarser, and back
}
TITLES = {
    "noise": "noise: SD / intensity range",
    "blur": "blur: SD / smallest voxel size",
    "bias": "bias field: log of largest factor",
    "contrast": "contrast: exponent",
    "resolution": "resolution: factor, and back",
}


def perturb(image: np.ndarray, spacing: tuple[float, ...], kind: str, strength: float, seed: int) -> np.ndarray:
    """A perturbed copy of an image: x (*spatial) to float64 of the same shape. The labels stay valid, because nothing moves.

    With low, high the 0.5th and 99.5th percentile, range = high - low:

    noise : x + strength range N(0, 1)
    blur : Gaussian filter of SD strength min(spacing)
    bias : low + (x - low) exp(strength f), f a smooth random polynomial of degree 2 with max |f| = 1
    contrast : low + range ((x - low) / range)^strength inside [low, high], unchanged outside
    resolution : axes no coarser than twice the finest are sampled down by `strength` with a matching blur, and up again
        linearly

    Raises
    ------
    ValueError : unknown kind, or a spacing of another length than the image's dimensions
    """
    if kind not in STRENGTHS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(STRENGTHS)}")
    if len(spacing) != image.ndim:
        raise ValueError(f"spacing {spacing}: expected {image.ndim} numbers")
    image, spacing, generator = image.astype(np.float64), np.asarray(spacing, float), np.random.default_rng(seed)
    low, high = np.percentile(image, [0.5, 99.5])
    width = max(high - low, 1e-12)
    if kind == "noise":
        return image + strength * width * generator.standard_normal(image.shape)
    if kind == "blur":
        return gaussian_filter(image, strength * spacing.min() / spacing, mode="nearest")
    if kind == "bias":
        return low + (image - low) * np.exp(strength * _smooth_field(image.shape, generator))
    if kind == "contrast":
        scaled = (image - low) / width
        return np.where((scaled > 0) & (scaled < 1), low + width * np.clip(scaled, 0, 1) ** strength, image)
    return _coarser(image, np.where((spacing <= 2 * spacing.min()) & (np.array(image.shape) > 1), strength, 1.0))


def _smooth_field(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """A random polynomial of degree 2 in the coordinates, with mean 0 and largest absolute value 1; (*shape)."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij", sparse=True)
    field = np.zeros(shape)
    for i, first in enumerate(axes):
        field = field + generator.normal() * first
        for second in axes[i:]:
            field = field + generator.normal() * first * second
    field -= field.mean()
    return field / max(np.abs(field).max(), 1e-12)


def _coarser(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Every axis sampled down by its factor, and up again."""
    coarse = np.maximum(np.round(np.array(image.shape) / factors), 1).astype(int)
    blurred = gaussian_filter(image, np.where(factors > 1, factors / 2.355, 0), mode="nearest")  # FWHM: one coarse voxel
    small = zoom(blurred, coarse / image.shape, order=1, mode="nearest", grid_mode=True)
    scale = np.array(small.shape) / image.shape
    grid = np.meshgrid(*((np.arange(n) + 0.5) * s - 0.5 for n, s in zip(image.shape, scale, strict=True)), indexing="ij")
    return map_coordinates(small, grid, order=1, mode="nearest")
