"""One phantom case as SimpleITK images: how tissues look, and on which grid."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.phantom import anatomy

# Mean signal of each tissue, in the order of anatomy.TISSUES; 1 is the brightest. Cine has bright blood and dark muscle, and a
# scar looks like myocardium. Late enhancement has dark myocardium, grey blood and bright scars. Black blood (T2-weighted spin
# echo) has dark blood and brighter muscle, so that a network that knows cine alone finds nothing.
CONTRASTS = {
    "cine": (0.02, 0.75, 0.32, 0.08, 0.42, 0.85, 0.62, 0.33, 0.78, 0.33, 0.88, 0.36, 0.33),
    "late_enhancement": (0.02, 0.66, 0.22, 0.06, 0.33, 0.52, 0.58, 0.12, 0.46, 0.10, 0.52, 0.14, 0.95),
    "black_blood": (0.02, 0.85, 0.40, 0.06, 0.36, 0.07, 0.78, 0.48, 0.10, 0.50, 0.07, 0.46, 0.66),
}
NOISE = {"cine": (0.03, 0.06), "late_enhancement": (0.05, 0.09), "black_blood": (0.04, 0.08)}  # range of its standard deviation
# range of scanner units for one unit of signal
GAIN = {"cine": (300.0, 700.0), "late_enhancement": (120.0, 400.0), "black_blood": (200.0, 500.0)}
LABELS = {"anatomy": {"left_ventricle": 1, "myocardium": 2, "right_ventricle": 3}}
LABELS["anatomy_scar"] = LABELS["anatomy"] | {"scar": 4}
SIZE, SPACING = (64, 64, 10), (1.8, 1.8, 8.0)  # voxels and mm, x y z
SMALLEST = (32, 32, 6)  # voxels that show every structure
SUBSAMPLES = 3  # in-plane points of a voxel along each axis, over which the signal is averaged: partial volume


def make_case(
    seed: int, contrast: str = "cine", scar: bool = False, size: tuple[int, ...] = SIZE, spacing: tuple[float, ...] = SPACING
):
    """One short-axis case: SimpleITK images of int16 intensities and uint8 labels (see LABELS) on the same oblique grid.

    The seed alone decides the anatomy: in two contrasts it shows the same heart on the same grid, with other noise, bias and
    gain. The same arguments give the same voxels.

    Parameters
    ----------
    contrast : a key of CONTRASTS
    scar : whether the myocardium holds 1 to 3 scars, which have a label of their own
    size : voxels (x, y, z), or (x, y) for a 2D slice near the middle of the heart
    spacing : mm, as many numbers as `size`
        In-plane, the anatomy is scaled to the field of view. Along z, the heart covers most of the grid.

    Raises
    ------
    ValueError : a size below 32 x 32 x 6, which cannot show every structure
    """
    images, label = make_channels(seed, (contrast,), scar, size, spacing)
    return images[0], label


def make_channels(seed: int, contrasts: tuple[str, ...], scar: bool = False, size: tuple = SIZE, spacing: tuple = SPACING):
    """Like `make_case`, with a list of aligned images, one for each contrast."""
    if any(n < smallest for n, smallest in zip(size, SMALLEST, strict=False)):
        raise ValueError(f"size={tuple(size)}: expected at least {SMALLEST} voxels (x, y, z), to show every structure")
    slices, thickness = (size[2], spacing[2]) if len(size) == 3 else (1, 8.0)
    rng = np.random.default_rng([seed, 0])
    heart = anatomy.draw_heart(rng, depth=(slices if len(size) == 3 else 10) * thickness)
    z = (np.arange(slices) - (slices - 1) / 2) * thickness
    if len(size) == 2:
        z = np.array([heart.base + heart.length * rng.uniform(0.15, 0.6)])
    unit = anatomy.FIELD_OF_VIEW / min(size[0] * spacing[0], size[1] * spacing[1])
    x, y = (unit * spacing[axis] * _points(size[axis]) for axis in (0, 1))
    grid = x[None, None, :], y[None, :, None], z[:, None, None]
    # float32 halves the time
    tissue = anatomy.tissue_map(heart, *(points.astype(np.float32) for points in grid), rng if scar else None)
    geometry = tuple(map(float, spacing)), *_draw_pose(rng, len(size))

    images = []
    for contrast in contrasts:
        signal = np.array(CONTRASTS[contrast])[tissue].reshape(slices, size[1], SUBSAMPLES, size[0], SUBSAMPLES).mean((2, 4))
        noise = np.random.default_rng([seed, 1 + list(CONTRASTS).index(contrast)])
        images.append(_to_image(_acquire(noise, signal, contrast), geometry))
    centres = tissue[:, SUBSAMPLES // 2 :: SUBSAMPLES, SUBSAMPLES // 2 :: SUBSAMPLES]  # of the voxels
    label = np.array([LABELS["anatomy_scar"].get(name, 0) for name in anatomy.TISSUES], np.uint8)  # of each tissue
    label[anatomy.PAPILLARY] = label[anatomy.LEFT]
    return images, _to_image(label[centres], geometry)


def _points(voxels: int) -> np.ndarray:
    """Positions in voxels, from the middle of the grid, of evenly spread points, SUBSAMPLES in each voxel."""
    return (np.arange(voxels * SUBSAMPLES) + 0.5) / SUBSAMPLES - voxels / 2


def _draw_pose(rng: np.random.Generator, dims: int):
    """A random origin within 100 mm, and an oblique direction as in a short-axis scan; none in 2D, for PNG."""
    if dims == 2:
        return (0.0, 0.0), (1.0, 0.0, 0.0, 1.0)
    yaw, pitch = np.deg2rad(rng.uniform(20, 60)), np.deg2rad(rng.uniform(20, 50))
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    return np.round(rng.uniform(-100, 100, 3), 2).tolist(), (about_z @ about_x).ravel().tolist()


def _acquire(rng: np.random.Generator, signal: np.ndarray, contrast: str) -> np.ndarray:
    r"""The image that a scanner makes of a signal s: int16, in scanner units.

    .. math:: gain \cdot | s (1 + 0.05 f_{texture}) \exp(0.12 f_{bias}) + n_1 + i n_2 |

    n are normal with a standard deviation drawn from NOISE (the magnitude is Rician), f smooth random fields.
    """
    textured = signal * (1 + 0.05 * _smooth_field(rng, signal.shape, waves=10, terms=12))
    biased = textured * np.exp(0.12 * _smooth_field(rng, signal.shape, waves=0.8))
    sigma = rng.uniform(*NOISE[contrast])
    magnitude = np.hypot(biased + sigma * rng.standard_normal(signal.shape), sigma * rng.standard_normal(signal.shape))
    return np.rint(np.clip(magnitude * rng.uniform(*GAIN[contrast]), 0, np.iinfo(np.int16).max)).astype(np.int16)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], waves: float, terms: int = 6) -> np.ndarray:
    r"""A smooth random field of mean 0 and standard deviation 1, with at most `waves` periods along each axis.

    .. math:: f(u) = \sqrt{2 / terms} \sum_k \cos(2 \pi \langle w_k, u \rangle + \phi_k), \quad u \in [0, 1]^{dims}
    """
    axes = np.meshgrid(*[np.linspace(0, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij", sparse=True)
    total = np.zeros(shape)
    for _ in range(terms):
        frequency, phase = rng.uniform(-waves, waves, len(shape)), rng.uniform(0, 2 * np.pi)
        total += np.cos(2 * np.pi * sum(w * u for w, u in zip(frequency, axes, strict=True)) + phase)
    return total * np.sqrt(2 / terms)


def _to_image(array: np.ndarray, geometry: tuple):
    import SimpleITK  # heavy, and not needed for --help

    image = SimpleITK.GetImageFromArray(array if len(geometry[0]) == 3 else array[0])
    image.SetSpacing(geometry[0])
    image.SetOrigin(geometry[1])
    image.SetDirection(geometry[2])
    return image
