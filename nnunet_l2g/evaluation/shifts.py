"""Ways in which images of another scanner differ: noise, blur, bias field, contrast, resolution. Each has three strengths."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from nnunet_l2g.images import check_whole, unreadable

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


def perturb_file(source: Path, target: Path, kind: str, strength: float) -> None:
    """Writes a perturbed copy on the same grid, in the source's pixel type (rounded and clipped for integers).

    The random numbers depend on the file's name and the kind. UserError if the source cannot be read.
    """
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(source))
    except RuntimeError as error:
        raise unreadable(source, "SimpleITK", error) from error
    check_whole(source)
    array = SimpleITK.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel()
    spacing = tuple(reversed(image.GetSpacing()))
    seed = zlib.crc32(f"{source.name} {kind}".encode())
    planes = [array] if channels == 1 else np.moveaxis(array, -1, 0)  # (*spatial) each
    changed = [perturb(plane, spacing, kind, strength, seed + index) for index, plane in enumerate(planes)]
    result = changed[0] if channels == 1 else np.stack(changed, axis=-1)
    if np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(array.dtype)
        result = np.clip(np.rint(result), limits.min, limits.max)
    written = SimpleITK.GetImageFromArray(result.astype(array.dtype), isVector=channels > 1)
    written.CopyInformation(image)
    SimpleITK.WriteImage(written, str(target), True)


def perturb(image: np.ndarray, spacing: tuple[float, ...], kind: str, strength: float, seed: int) -> np.ndarray:
    """A perturbed image: x (*spatial) to float64 of the same shape. Nothing moves, so the labels stay valid.

    With lo and hi the 0.5th and 99.5th percentile, and range = hi - lo:

    noise : x + strength range N(0, 1)
    blur : Gaussian filter of SD strength min(spacing)
    bias : lo + (x - lo) exp(strength f), f a smooth random polynomial of degree 2 with max |f| = 1
    contrast : lo + range ((x - lo) / range)^strength inside [lo, hi], unchanged outside
    resolution : axes no coarser than twice the finest are sampled down by `strength` with a matching blur, and up again
        linearly
    """
    from scipy import ndimage

    x, spacing = image.astype(np.float64), np.asarray(spacing, float)
    low, high = np.percentile(x, [0.5, 99.5])
    width = max(high - low, 1e-12)
    generator = np.random.default_rng(seed)
    if kind == "noise":
        return x + strength * width * generator.standard_normal(x.shape)
    if kind == "blur":
        return ndimage.gaussian_filter(x, strength * spacing.min() / spacing, mode="nearest")
    if kind == "bias":
        return low + (x - low) * np.exp(strength * _smooth_field(x.shape, generator))
    if kind == "contrast":
        scaled = (x - low) / width
        return np.where((scaled > 0) & (scaled < 1), low + width * np.clip(scaled, 0, 1) ** strength, x)
    if kind == "resolution":
        return _resample_and_back(x, np.where((spacing <= 2 * spacing.min()) & (np.array(x.shape) > 1), strength, 1.0))
    raise ValueError(f"kind {kind!r}: expected one of {', '.join(STRENGTHS)}")


def _smooth_field(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """A random polynomial of degree 2 in the coordinates, with mean 0 and the largest absolute value 1."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij", sparse=True)
    field = np.zeros(shape)
    for i, first in enumerate(axes):
        field = field + generator.normal() * first
        for second in axes[i:]:
            field = field + generator.normal() * first * second
    field -= field.mean()
    return field / max(np.abs(field).max(), 1e-12)


def _resample_and_back(x: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Makes each axis coarser by its factor, then samples the old grid linearly. Voxel centres do not move."""
    from scipy import ndimage

    coarse = np.maximum(np.round(np.array(x.shape) / factors), 1).astype(int)
    blurred = ndimage.gaussian_filter(x, np.where(factors > 1, factors / 2.355, 0), mode="nearest")  # FWHM: a coarse voxel
    small = ndimage.zoom(blurred, coarse / x.shape, order=1, mode="nearest", grid_mode=True)
    return ndimage.zoom(small, np.array(x.shape) / coarse, order=1, mode="nearest", grid_mode=True)
