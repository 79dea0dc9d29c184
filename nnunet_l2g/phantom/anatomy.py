"""Which tissue is where: a heart of random pose and shape between look-alike organs, as inequalities.

In-plane lengths are millimetres on a field of view of 120 mm. t runs along the long axis of the heart, 0 at the base and 1 at
the apex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TISSUES = (
    "air", "fat", "muscle", "lung", "liver", "vessel", "heart_fat", "right_wall", "right_ventricle", "myocardium",
    "left_ventricle", "papillary", "scar",
)  # fmt: skip
AIR, FAT, MUSCLE, LUNG, LIVER, VESSEL, HEART_FAT, RIGHT_WALL, RIGHT, MYOCARDIUM, LEFT, PAPILLARY, SCAR = range(len(TISSUES))
FIELD_OF_VIEW = 120.0  # mm
LEFT_END, RIGHT_END = 0.88, 0.84  # t where the cavities end; below, the myocardium closes the left one


@dataclass(frozen=True)
class Heart:
    """One subject. Lengths in mm, angles in rad."""

    centre: list[float]  # (2,) in-plane, at the base
    drift: list[float]  # (2,) how far the long axis moves in-plane from base to apex
    angle: float
    radius: float  # of the left cavity at the base
    wall: float
    squash: float  # ratio of the in-plane axes
    waves: list[list[float]]  # (3, 2) amplitude and phase of the harmonics 2 to 4 of the outline
    right_shift: float  # centre of the right ventricle, in outer radii of the left one
    right_radius: float  # likewise
    base: float  # along z
    length: float  # from base to apex
    papillary: list[float]  # (2,) angles of the papillary muscles
    organs: list[list[float]]  # (7, 2) shifts of the organs


def draw_heart(rng: np.random.Generator, depth: float) -> Heart:
    """Draws a subject. The heart covers 70 to 90 % of depth, the extent of the grid along z in mm."""
    length = depth * rng.uniform(0.7, 0.9)
    return Heart(
        centre=(np.array([10.0, 0.0]) + rng.uniform(-8, 8, 2)).tolist(),
        drift=rng.uniform(-7, 7, 2).tolist(),
        angle=rng.uniform(-0.8, 0.8),
        radius=rng.uniform(12, 17),
        wall=rng.uniform(6, 9.5),
        squash=rng.uniform(0.9, 1.1),
        waves=np.stack([rng.uniform(0, 0.03, 3), rng.uniform(0, 2 * np.pi, 3)], axis=1).tolist(),
        right_shift=rng.uniform(0.8, 1.0),
        right_radius=rng.uniform(0.85, 1.0),
        base=-length / 2 + rng.uniform(-0.5, 0.5) * (depth - length) * 0.8,
        length=length,
        papillary=(rng.uniform(-0.4, 0.4, 2) + np.array([1.2, -1.4])).tolist(),
        organs=rng.uniform(-5, 5, (7, 2)).tolist(),
    )


def tissue_map(heart: Heart, x: np.ndarray, y: np.ndarray, z: np.ndarray, scars: np.random.Generator | None) -> np.ndarray:
    """Tissue codes (D, H, W) uint8, painted from back to front: body, organs, fat, right heart, left heart, scars.

    Parameters
    ----------
    x (1, 1, W), y (1, H, 1) : mm on the field of view of 120 mm
    z (D, 1, 1) : mm
    scars : draws 1 to 3 scars; None for none
    """
    t = (z - heart.base) / heart.length
    dx, dy = x - heart.centre[0] - heart.drift[0] * t, y - heart.centre[1] - heart.drift[1] * t
    cosine, sine = float(np.cos(heart.angle)), float(np.sin(heart.angle))
    xi, eta = cosine * dx + sine * dy, cosine * dy - sine * dx  # in the frame of the heart
    theta = np.arctan2(eta / heart.squash, xi)
    outline = 1 + sum(a * np.cos(k * theta + phase) for k, (a, phase) in enumerate(heart.waves, start=2))
    rho = np.hypot(xi, eta / heart.squash) / outline
    inner, outer = heart.radius * _taper(t, LEFT_END), (heart.radius + heart.wall) * _taper(t)  # 0 where there is none

    tissue = np.zeros(rho.shape, np.uint8)
    _paint_surroundings(tissue, heart, x, y, t)
    reach = (heart.radius + heart.wall) * _taper(t, RIGHT_END)
    right = np.hypot(xi + heart.right_shift * reach, eta) - heart.right_radius * reach  # mm outside the right cavity
    right[np.broadcast_to(reach == 0, right.shape)] = np.inf
    tissue[((rho < outer + 5) & (outer > 0)) | (right < 6)] = HEART_FAT
    tissue[right < 2.5] = RIGHT_WALL
    tissue[right < 0] = RIGHT
    tissue[rho < outer] = MYOCARDIUM
    tissue[rho < inner] = LEFT
    for angle in heart.papillary:
        muscle = np.hypot(xi - 0.6 * float(np.cos(angle)) * inner, eta - 0.6 * float(np.sin(angle)) * inner)
        tissue[(muscle < 0.18 * inner) & (rho < inner)] = PAPILLARY
    if scars is not None:
        depth = (rho - inner) / np.maximum(outer - inner, 1e-6)  # of the wall: 0 at the cavity, 1 outside
        _paint_scars(tissue, scars, heart, theta, np.broadcast_to(t, rho.shape), depth)
    return tissue


def _taper(t: np.ndarray, end: float = 1.0) -> np.ndarray:
    """Radius along the long axis over that at the base: sqrt(1 - (t / end)^2.5) for 0 <= t <= end, otherwise 0."""
    return np.where((t >= 0) & (t <= end), np.sqrt(1 - np.clip(t / end, 0, 1) ** 2.5), 0)


def _paint_scars(tissue, rng: np.random.Generator, heart: Heart, theta, t, depth) -> None:
    """Paints 1 to 3 scars around random points of the myocardium at voxel centres (1::3), so that each covers a voxel.

    The arc length is log-uniform from 6 to 45 mm (at mid wall), the extent along z 8 to 40 mm, the depth 0.35 to 1 of the wall.
    """
    wall = tissue == MYOCARDIUM
    points = np.argwhere(wall[:, 1::3, 1::3]) * (1, 3, 3) + (0, 1, 1)
    for _ in range(rng.integers(1, 4)):
        point = tuple(rng.choice(points))
        half_angle = np.exp(rng.uniform(np.log(6), np.log(45))) / (2 * heart.radius + heart.wall)
        half_length = rng.uniform(8, 40) / (2 * heart.length)
        deepest = max(rng.uniform(0.35, 1), float(depth[point]) + 1e-6)
        away = np.abs((theta - theta[point] + np.pi) % (2 * np.pi) - np.pi) / half_angle
        along = np.abs(t - t[point]) / half_length
        tissue[wall & (away**2 + along**2 <= 1) & (depth <= deepest)] = SCAR


def _paint_surroundings(tissue: np.ndarray, heart: Heart, x: np.ndarray, y: np.ndarray, t: np.ndarray) -> None:
    """Body, lungs, liver, spleen and vessels. Towards the apex the lower organs grow and the lungs end."""
    low, lungs = np.clip(0.5 + 0.5 * t, 0.3, 1.2), t < 1.1
    for shift, centre, axes, code, where in (
        (0, (0, 0), (74, 62), FAT, True),
        (0, (0, 0), (69, 56), MUSCLE, True),
        (1, (-50, -8), (24, 40), LUNG, lungs),
        (2, (52, -10), (22, 38), LUNG, lungs),
        (3, (-34, 42), (34 * low, 20 * low), LIVER, True),
        (4, (36, 40), (16 * low, 12 * low), LIVER, True),  # the spleen
        (5, (8, 46), (7, 7), VESSEL, True),  # the aorta
        (6, (-30, 44), (6 * low, 5 * low), VESSEL, True),  # a vein in the liver
    ):
        dx, dy = heart.organs[shift]
        inside = ((x - centre[0] - dx) / axes[0]) ** 2 + ((y - centre[1] - dy) / axes[1]) ** 2 < 1
        tissue[np.broadcast_to(inside & where, tissue.shape)] = code
