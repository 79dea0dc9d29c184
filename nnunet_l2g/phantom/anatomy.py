"""Which tissue is where: a heart with random pose and shape between look-alike organs, as inequalities.

In-plane lengths are millimetres on a 120 mm field of view and are scaled to the actual one, so that every grid shows
the whole heart; t runs along the long axis, 0 at the base and 1 at the apex.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

(AIR, FAT, MUSCLE, LUNG, LIVER, VESSEL, HEART_FAT, RIGHT_WALL, RIGHT_VENTRICLE, MYOCARDIUM, LEFT_VENTRICLE, PAPILLARY, SCAR) = (
    range(13)
)
REFERENCE_FOV = 120.0  # mm
BLOOD_APEX, RIGHT_APEX = 0.88, 0.84  # t where the cavities end; the myocardium closes the left one below


@dataclass
class Lesion:
    """One scar: a patch of the wall. theta is the angle around the left ventricle, depth 0 at the cavity, 1 outside."""

    theta: float
    t: float
    half_angle: float  # rad
    half_length: float  # in t
    transmurality: float  # depth up to which the wall is scarred


@dataclass
class Heart:
    """One subject: pose, size and shape of the heart and the places of the organs around it."""

    centre: np.ndarray  # (2,) mm
    drift: np.ndarray  # (2,) mm, how far the long axis moves in-plane from base to apex
    angle: float  # rad
    radius: float  # mm, of the left cavity at the base
    wall: float  # mm
    squash: float  # ratio of the in-plane axes
    waves: np.ndarray  # (3, 2): amplitude and phase of the outline's harmonics 2 to 4
    right_shift: float  # right ventricle's centre and radius, in left ventricular outer radii
    right_radius: float
    base: float  # mm along z, then the length from base to apex
    length: float
    papillary: np.ndarray  # (2,) rad
    organs: np.ndarray  # (7, 2) mm, shifts of the organs
    lesions: list[Lesion] = field(default_factory=list)


def draw_heart(rng: np.random.Generator, depth: float) -> Heart:
    """Draws a subject. depth (mm) is the grid's extent along z; the heart covers 70 to 90 % of it."""
    length = depth * rng.uniform(0.7, 0.9)
    return Heart(
        centre=np.array([10.0, 0.0]) + rng.uniform(-8, 8, 2),
        drift=rng.uniform(-7, 7, 2),
        angle=rng.uniform(-0.8, 0.8),
        radius=rng.uniform(12, 17),
        wall=rng.uniform(6, 9.5),
        squash=rng.uniform(0.9, 1.1),
        waves=np.stack([rng.uniform(0, 0.03, 3), rng.uniform(0, 2 * np.pi, 3)], axis=1),
        right_shift=rng.uniform(0.8, 1.0),
        right_radius=rng.uniform(0.85, 1.0),
        base=-length / 2 + rng.uniform(-0.5, 0.5) * (depth - length) * 0.8,
        length=length,
        papillary=rng.uniform(-0.4, 0.4, 2) + np.array([1.2, -1.4]),
        organs=rng.uniform(-5, 5, (7, 2)),
    )


def taper(t: np.ndarray, end: float = 1.0) -> np.ndarray:
    """Radius along the long axis relative to the base: sqrt(1 - (t / end)^2.5) for 0 <= t <= end, otherwise 0."""
    inside = (t >= 0) & (t <= end)
    return np.where(inside, np.sqrt(1 - np.clip(t / end, 0, 1) ** 2.5), 0.0)


def wall_coordinates(heart: Heart, x: np.ndarray, y: np.ndarray, z: np.ndarray):
    """Coordinates in the heart's own frame, all broadcast to one shape.

    Returns (xi, eta, rho, theta, t, inner, outer): the rotated in-plane position (mm), its polar form with the
    outline's harmonics divided out, the long-axis coordinate, and the radii of cavity and epicardium there (0: none).
    inner = radius taper(t, 0.88) and outer = (radius + wall) taper(t), so outer > inner wherever outer > 0.
    """
    t = (z - heart.base) / heart.length
    dx = x - heart.centre[0] - heart.drift[0] * t
    dy = y - heart.centre[1] - heart.drift[1] * t
    cosine, sine = np.cos(heart.angle), np.sin(heart.angle)
    xi, eta = cosine * dx + sine * dy, -sine * dx + cosine * dy
    theta = np.arctan2(eta / heart.squash, xi)
    outline = 1 + sum(a * np.cos(k * theta + phase) for k, (a, phase) in enumerate(heart.waves, start=2))
    rho = np.hypot(xi, eta / heart.squash) / outline
    return xi, eta, rho, theta, t, heart.radius * taper(t, BLOOD_APEX), (heart.radius + heart.wall) * taper(t)


def tissue_map(heart: Heart, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Tissue code (uint8) at each point, painted from back to front: body, organs, fat, right heart, left heart, scar.

    x (1, 1, W), y (1, H, 1) in mm on the 120 mm field of view, z (D, 1, 1) in mm; returns (D, H, W).
    """
    xi, eta, rho, theta, t, inner, outer = wall_coordinates(heart, x, y, z)
    tissue = np.zeros(rho.shape, np.uint8)
    _paint_surroundings(tissue, heart, x, y, t)

    reach = (heart.radius + heart.wall) * taper(t, RIGHT_APEX)
    right = np.hypot(xi + heart.right_shift * reach, eta)
    exists = reach > 0
    tissue[((rho < outer + 5) & (outer > 0)) | ((right < heart.right_radius * reach + 6) & exists)] = HEART_FAT
    tissue[(right < heart.right_radius * reach + 2.5) & exists] = RIGHT_WALL
    tissue[(right < heart.right_radius * reach) & exists] = RIGHT_VENTRICLE
    tissue[rho < outer] = MYOCARDIUM
    tissue[rho < inner] = LEFT_VENTRICLE
    for angle in heart.papillary:
        muscle = np.hypot(xi - 0.6 * inner * np.cos(angle), eta - 0.6 * inner * np.sin(angle))
        tissue[(muscle < 0.18 * inner) & (rho < inner)] = PAPILLARY
    wall = tissue == MYOCARDIUM
    for lesion in heart.lesions:
        tissue[wall & _in_lesion(lesion, rho, theta, t, inner, outer)] = SCAR
    return tissue


def draw_lesions(rng: np.random.Generator, heart: Heart, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[Lesion]:
    """Draws 1 to 3 scars around random myocardium points of the given grid, so that each covers at least one.

    Arc length is log-uniform from 6 to 45 mm (at mid wall), extent along z 8 to 40 mm, transmurality 0.35 to 1.
    """
    _, _, rho, theta, t, inner, outer = wall_coordinates(heart, x, y, z)
    wall = tissue_map(heart, x, y, z) == MYOCARDIUM
    t = np.broadcast_to(t, rho.shape)
    points = np.flatnonzero(wall)
    depth = np.broadcast_to(_depth(rho, inner, outer), rho.shape)
    lesions = []
    for _ in range(rng.integers(1, 4)):
        point = np.unravel_index(rng.choice(points), rho.shape)
        arc, extent = np.exp(rng.uniform(np.log(6), np.log(45))), rng.uniform(8, 40)
        lesions.append(
            Lesion(
                theta=float(theta[point]),
                t=float(t[point]),
                half_angle=float(arc / (2 * heart.radius + heart.wall)),
                half_length=float(extent / (2 * heart.length)),
                transmurality=max(float(rng.uniform(0.35, 1)), float(depth[point]) + 1e-6),
            )
        )
    return lesions


def _depth(rho, inner, outer):
    return (rho - inner) / np.maximum(outer - inner, 1e-6)


def _in_lesion(lesion: Lesion, rho, theta, t, inner, outer) -> np.ndarray:
    away = np.abs((theta - lesion.theta + np.pi) % (2 * np.pi) - np.pi) / lesion.half_angle
    along = np.abs(t - lesion.t) / lesion.half_length
    return (away**2 + along**2 <= 1) & (_depth(rho, inner, outer) <= lesion.transmurality)


def _paint_surroundings(tissue: np.ndarray, heart: Heart, x: np.ndarray, y: np.ndarray, t: np.ndarray) -> None:
    """Body outline, lungs, liver, spleen, aorta and stomach; lower organs grow and lungs shrink towards the apex."""
    low = np.clip(0.5 + 0.5 * t, 0.3, 1.2)

    def ellipse(organ: int, centre, axes):
        shift = heart.organs[organ]
        return ((x - centre[0] - shift[0]) / axes[0]) ** 2 + ((y - centre[1] - shift[1]) / axes[1]) ** 2 < 1

    tissue[ellipse(0, (0, 0), (74, 62)) & (t == t)] = FAT
    tissue[ellipse(0, (0, 0), (69, 56)) & (t == t)] = MUSCLE
    tissue[ellipse(1, (-50, -8), (24, 40)) & (t < 1.1)] = LUNG
    tissue[ellipse(2, (52, -10), (22, 38)) & (t < 1.1)] = LUNG
    tissue[ellipse(3, (-34, 42), (34 * low, 20 * low))] = LIVER
    tissue[ellipse(4, (36, 40), (16 * low, 12 * low))] = LIVER  # spleen
    tissue[ellipse(5, (8, 46), (7, 7)) & (t == t)] = VESSEL  # aorta
    tissue[ellipse(6, (-30, 44), (6 * low, 5 * low))] = VESSEL  # vein in the liver
