"""One phantom case as SimpleITK images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nnunet_l2g.phantom import anatomy as a
from nnunet_l2g.phantom.appearance import CONTRASTS, acquire, signal

if TYPE_CHECKING:
    import SimpleITK

# what `labels=` means: tissue code -> label value; everything else is background
LABELS = {
    "anatomy": {"left_ventricle": 1, "myocardium": 2, "right_ventricle": 3},
    "anatomy_scar": {"left_ventricle": 1, "myocardium": 2, "right_ventricle": 3, "scar": 4},
    "scar": {"scar": 1},
}
_TISSUES = {
    "left_ventricle": (a.LEFT_VENTRICLE, a.PAPILLARY),
    "myocardium": (a.MYOCARDIUM,),
    "right_ventricle": (a.RIGHT_VENTRICLE,),
    "scar": (a.SCAR,),
}
DEFAULT_SIZE = (64, 64, 10)  # voxels, x y z
DEFAULT_SPACING = (1.8, 1.8, 8.0)  # mm
MINIMUM_SIZE = (32, 32, 6)
_SUBSAMPLES = 3  # signal is averaged over 3 x 3 points per voxel in-plane: partial volume


def make_case(
    seed: int,
    contrast: str = "cine",
    scar: bool = False,
    labels: str | None = None,
    size: tuple[int, ...] = DEFAULT_SIZE,
    spacing: tuple[float, ...] = DEFAULT_SPACING,
) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """One short-axis case: an image (int16) and its label map (uint8) on the same oblique grid.

    The seed alone decides the anatomy: the same seed in two contrasts shows the same heart on the same grid, with
    other noise, bias and gain. The same arguments give bit-identical images.

    Parameters
    ----------
    seed : non-negative int
    contrast : "cine", "late_enhancement" or "black_blood"
    scar : whether the myocardium holds 1 to 3 scars (bright in late enhancement, invisible in cine)
    labels : "anatomy" (1 left ventricular blood with papillary muscles, 2 myocardium with any scar, 3 right ventricle),
        "anatomy_scar" (scar is 4 instead of 2) or "scar" (1 is scar); default "anatomy_scar" with scar, else "anatomy"
    size : voxels (x, y, z), at least (32, 32, 6); or (x, y) for a 2D slice near the middle of the heart
    spacing : mm, as many numbers as `size`. In-plane anatomy is scaled to the field of view, z covers the heart.

    Raises
    ------
    ValueError : unknown contrast or labels, scar labels without scar, a seed, size or spacing that cannot be used
    """
    images, label = make_channels(seed, (contrast,), scar, labels, size, spacing)
    return images[0], label


def make_channels(
    seed: int,
    contrasts: tuple[str, ...] = ("cine", "late_enhancement"),
    scar: bool = False,
    labels: str | None = None,
    size: tuple[int, ...] = DEFAULT_SIZE,
    spacing: tuple[float, ...] = DEFAULT_SPACING,
) -> tuple[list[SimpleITK.Image], SimpleITK.Image]:
    """Like `make_case`, with one aligned image per contrast: the channels of one case."""
    labels = resolve_labels(labels, scar)
    check_grid(seed, contrasts, size, spacing)
    two_dimensional = len(size) == 2
    slices, thickness = (1, 8.0) if two_dimensional else (size[2], spacing[2])
    rng = np.random.default_rng([seed, 0])
    heart = a.draw_heart(rng, depth=(10 if two_dimensional else slices) * thickness)
    z = (np.arange(slices) - (slices - 1) / 2) * thickness
    if two_dimensional:
        z = np.array([heart.base + heart.length * rng.uniform(0.15, 0.6)])
    unit = a.REFERENCE_FOV / min(size[0] * spacing[0], size[1] * spacing[1])

    def grid(points_per_voxel: int):
        x, y = (unit * spacing[i] * (_voxel_points(size[i], points_per_voxel) - (size[i] - 1) / 2) for i in (0, 1))
        return x[None, None, :], y[None, :, None], z[:, None, None]

    if scar:
        heart.lesions = a.draw_lesions(rng, heart, *grid(1))
    tissue = a.tissue_map(heart, *grid(1))  # (z, y, x): labels are what lies at the voxel's centre
    fine = a.tissue_map(heart, *grid(_SUBSAMPLES))
    geometry = _draw_geometry(rng, size, spacing)

    images = []
    for contrast in contrasts:
        noise = np.random.default_rng([seed, 1 + list(CONTRASTS).index(contrast)])
        clean = signal(fine, contrast)
        clean = clean.reshape(slices, size[1], _SUBSAMPLES, size[0], _SUBSAMPLES).mean(axis=(2, 4))
        images.append(_to_image(acquire(noise, clean, contrast), geometry, two_dimensional))
    return images, _to_image(label_map(tissue, labels), geometry, two_dimensional)


def label_map(tissue: np.ndarray, labels: str) -> np.ndarray:
    """Tissue codes to label values (uint8), for a key of LABELS. A scar counts as myocardium if it has no label."""
    result = np.zeros(tissue.shape, np.uint8)
    for name, value in LABELS[labels].items():
        tissues = _TISSUES[name]
        if name == "myocardium" and "scar" not in LABELS[labels]:
            tissues = (*tissues, a.SCAR)
        result[np.isin(tissue, tissues)] = value
    return result


def resolve_labels(labels: str | None, scar: bool) -> str:
    """The key of LABELS that is meant. ValueError if unknown, or if it names a scar while there is none."""
    if labels is None:
        return "anatomy_scar" if scar else "anatomy"
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is unknown; choose one of {', '.join(map(repr, LABELS))}")
    if "scar" in LABELS[labels] and not scar:
        raise ValueError(f"labels={labels!r} has a scar label, but scar=False draws none; pass scar=True")
    return labels


def check_grid(seed: int, contrasts: tuple[str, ...], size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """ValueError for anything `make_channels` cannot draw."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r}: expected a non-negative integer")
    if not contrasts:
        raise ValueError("no contrast given; pass at least one of " + ", ".join(map(repr, CONTRASTS)))
    for contrast in contrasts:
        if contrast not in CONTRASTS:
            raise ValueError(f"contrast={contrast!r} is unknown; choose one of {', '.join(map(repr, CONTRASTS))}")
    if len(size) not in (2, 3) or any(int(n) != n or n < low for n, low in zip(size, MINIMUM_SIZE, strict=False)):
        raise ValueError(
            f"size={tuple(size)}: expected whole numbers (x, y, z) of at least {MINIMUM_SIZE}, or (x, y) "
            f"of at least {MINIMUM_SIZE[:2]}; smaller grids cannot show every structure"
        )
    if len(spacing) != len(size) or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing={tuple(spacing)}: expected {len(size)} positive numbers (mm), one per axis of size")


def _voxel_points(count: int, per_voxel: int) -> np.ndarray:
    """Positions in voxels (centre of voxel i is i) of `per_voxel` evenly spread points in each of `count` voxels."""
    return (np.arange(count * per_voxel) + 0.5) / per_voxel - 0.5


def _draw_geometry(rng: np.random.Generator, size, spacing):
    """Spacing, a random origin within 100 mm, and an oblique rotation (3D) as in a short-axis scan."""
    if len(size) == 2:
        return tuple(map(float, spacing)), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0)  # PNG files hold no geometry
    yaw, pitch = np.deg2rad(rng.uniform(20, 60)), np.deg2rad(rng.uniform(20, 50))
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    origin = np.round(rng.uniform(-100, 100, 3), 2)
    return tuple(map(float, spacing)), tuple(map(float, origin)), tuple(map(float, (about_z @ about_x).ravel()))


def _to_image(array: np.ndarray, geometry, two_dimensional: bool) -> SimpleITK.Image:
    import SimpleITK  # heavy, and not needed for --help

    image = SimpleITK.GetImageFromArray(array[0] if two_dimensional else array)
    spacing, origin, direction = geometry
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image
