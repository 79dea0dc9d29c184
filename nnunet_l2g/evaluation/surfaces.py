"""Distances between the surfaces of two masks, in physical units, by Euclidean distance maps."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.evaluation.overlap import check_masks

PERCENTILE = 95.0


def surface_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    valid: np.ndarray | None = None,
) -> dict[str, float]:
    """HD95, ASSD and NSD. With surface voxels S_R, S_P and d(s, S) the distance from s to the nearest point of S:

    HD95 = max(P95 {d(s, S_P) : s in S_R}, P95 {d(s, S_R) : s in S_P})
    ASSD = (sum_{s in S_R} d(s, S_P) + sum_{s in S_P} d(s, S_R)) / (|S_R| + |S_P|)
    NSD = (|{s in S_R : d(s, S_P) <= tau}| + |{s in S_P : d(s, S_R) <= tau}|) / (|S_R| + |S_P|)

    A surface voxel belongs to the mask and has a face neighbour that does not; outside the image nothing belongs to it.
    A face towards an ignored voxel is no surface: what lies there is unknown. P95 interpolates linearly. Every surface
    voxel counts the same; implementations that weight by surface area differ a little on anisotropic grids.

    Both empty: all NaN. Only one empty: HD95 and ASSD are the image's diagonal, the largest distance possible in it, and
    NSD is 0; a missed structure is then neither free nor infinite [1].

    Parameters
    ----------
    reference, prediction : bool, (*spatial), 2D or 3D
    spacing : distance between voxels along each array axis, mm
    tolerance : tau, mm
    valid : bool, (*spatial); False where the reference says "ignore"

    Returns
    -------
    dict with keys hd95, assd (mm), nsd ([0, 1])

    Raises
    ------
    ValueError : shapes differ, not 2D or 3D, spacing not positive or of another length, tolerance negative

    References
    ----------
    [1] Maier-Hein, Reinke et al., Metrics Reloaded, Nature Methods 2024.
    [2] Nikolov et al., Clinically applicable segmentation of head and neck anatomy, JMIR 2021 (NSD).
    """
    check_masks(reference, prediction, valid)
    _check_grid(reference, spacing, tolerance)
    diagonal = float(np.linalg.norm(np.array(reference.shape) * spacing))
    undefined = {"hd95": float("nan"), "assd": float("nan"), "nsd": float("nan")}
    either = reference | prediction
    if not either.any():
        return undefined
    box = bounding_box(either, margin=1)  # the margin tells an end of the box from the end of the image
    ours, theirs = (surface_voxels(mask[box], None if valid is None else valid[box]) for mask in (reference, prediction))
    if not ours.any() and not theirs.any():
        return undefined
    if not ours.any() or not theirs.any():
        return {"hd95": diagonal, "assd": diagonal, "nsd": 0.0}
    to_prediction = _distance_to(theirs, spacing)[ours]  # (|S_R|,)
    to_reference = _distance_to(ours, spacing)[theirs]  # (|S_P|,)
    both = np.concatenate([to_prediction, to_reference])
    return {
        "hd95": float(max(np.percentile(to_prediction, PERCENTILE), np.percentile(to_reference, PERCENTILE))),
        "assd": float(both.mean()),
        # the map is float32: a distance of exactly tau must not fall out by rounding
        "nsd": float(np.mean(both <= tolerance + 1e-4 * min(spacing))),
    }


def surface_voxels(mask: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Voxels of `mask` with a face neighbour that is known and not in `mask`; bool, (*spatial)."""
    outside = ~mask if valid is None else ~mask & valid
    inside = mask if valid is None else mask & valid
    border = np.zeros_like(mask)
    for axis in range(mask.ndim):
        lower, upper = _along(axis, mask.ndim, slice(None, -1)), _along(axis, mask.ndim, slice(1, None))
        border[lower] |= outside[upper]
        border[upper] |= outside[lower]
        border[_along(axis, mask.ndim, slice(0, 1))] = True  # the image ends here, and the mask with it
        border[_along(axis, mask.ndim, slice(-1, None))] = True
    return border & inside


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """The smallest box that holds every True of a mask that has at least one, and `margin` voxels around where there are."""
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(hits[0]) - margin, 0), int(hits[-1]) + 1 + margin))
    return tuple(box)


def _along(axis: int, ndim: int, part: slice) -> tuple[slice, ...]:
    return tuple(part if index == axis else slice(None) for index in range(ndim))


def _distance_to(surface: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every voxel to the nearest surface voxel, (*spatial), mm; the surface is at most one voxel thick."""
    import SimpleITK

    # an array axis of length 1 is fine for the filter, an image without any background is not: pad it
    padded = SimpleITK.GetImageFromArray(np.pad(surface, 1).astype(np.uint8))
    padded.SetSpacing([float(value) for value in reversed(spacing)])  # SimpleITK counts axes from the other end
    filter_ = SimpleITK.SignedMaurerDistanceMapImageFilter()
    filter_.SetNumberOfThreads(1)  # cases run in parallel already
    filter_.SquaredDistanceOff()
    filter_.UseImageSpacingOn()
    distance = np.abs(SimpleITK.GetArrayFromImage(filter_.Execute(padded)))
    distance = distance[(slice(1, -1),) * surface.ndim].astype(np.float64)
    distance[surface] = 0.0  # float32 leaves up to 1e-4 there
    return distance


def _check_grid(mask: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> None:
    if mask.ndim not in (2, 3):
        raise ValueError(f"masks of shape {mask.shape}: expected 2 or 3 dimensions")
    if len(spacing) != mask.ndim or not all(np.isfinite(value) and value > 0 for value in spacing):
        raise ValueError(f"spacing {spacing}: expected {mask.ndim} positive numbers, one for each axis of {mask.shape}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance}: expected 0 or more")
