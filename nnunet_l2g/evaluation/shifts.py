"""Ways in which images of another scanner differ: noise, blur, bias field, contrast, resolution; each in three strengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STRENGTHS = {
    "noise": (0.05, 0.1, 0.2),  # standard deviation, of the intensity range
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
    """The image as if taken otherwise: x (*spatial) to float64 of the same shape.

    With lo, hi the 0.5th and 99.5th percentile, range = hi - lo:

    noise : x + strength range N(0, 1)
    blur : Gaussian filter of SD strength min(spacing)
    bias : lo + (x - lo) exp(strength f), f a smooth random polynomial of degree 2 with max |f| = 1
    contrast : lo + range ((x - lo) / range)^strength inside [lo, hi], unchanged outside
    resolution : axes no coarser than twice the finest are sampled down by `strength` with a matching blur, and up again
        linearly

    The labels stay valid: nothing moves.

    Raises
    ------
    ValueError : unknown kind, or a spacing of another length than the image's dimensions
    """
    functions: dict[str, Callable] = {
        "noise": _noise,
        "blur": _blur,
        "bias": _bias,
        "contrast": _contrast,
        "resolution": _resolution,
    }
    if kind not in functions:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(functions)}")
    if len(spacing) != image.ndim:
        raise ValueError(f"spacing {spacing}: expected {image.ndim} numbers")
    return functions[kind](image.astype(np.float64), np.asarray(spacing, float), strength, np.random.default_rng(seed))


def _range(image: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(image, [0.5, 99.5])
    return float(low), max(float(high - low), 1e-12)


def _noise(image, spacing, strength, generator):
    return image + strength * _range(image)[1] * generator.standard_normal(image.shape)


def _blur(image, spacing, strength, generator):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, strength * spacing.min() / spacing, mode="nearest")


def _bias(image, spacing, strength, generator):
    axes = [
        np.linspace(-1, 1, size).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
        for axis, size in enumerate(image.shape)
    ]
    field = np.zeros(image.shape)
    for i, first in enumerate(axes):
        field = field + generator.normal() * first
        for second in axes[i:]:
            field = field + generator.normal() * first * second
    field -= field.mean()
    low, _ = _range(image)
    return low + (image - low) * np.exp(strength * field / max(np.abs(field).max(), 1e-12))


def _contrast(image, spacing, strength, generator):
    low, width = _range(image)
    scaled = (image - low) / width
    return np.where((scaled > 0) & (scaled < 1), low + width * np.clip(scaled, 0, 1) ** strength, image)


def _resolution(image, spacing, strength, generator):
    from scipy.ndimage import gaussian_filter, map_coordinates, zoom

    factors = np.where((spacing <= 2 * spacing.min()) & (np.array(image.shape) > 1), strength, 1.0)
    coarse = np.maximum(np.round(np.array(image.shape) / factors), 1).astype(int)
    blurred = gaussian_filter(image, np.where(factors > 1, factors / 2.355, 0), mode="nearest")  # FWHM: one coarse voxel
    small = zoom(blurred, coarse / image.shape, order=1, mode="nearest", grid_mode=True)
    scale = np.array(small.shape) / image.shape
    grid = np.meshgrid(*((np.arange(n) + 0.5) * s - 0.5 for n, s in zip(image.shape, scale, strict=True)), indexing="ij")
    return map_coordinates(small, grid, order=1, mode="nearest")
