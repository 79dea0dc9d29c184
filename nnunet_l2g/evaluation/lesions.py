"""Lesion by lesion: which connected components were found, and which were invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nnunet_l2g.evaluation.overlap import check_masks
from nnunet_l2g.evaluation.surfaces import bounding_box


@dataclass(frozen=True)
class LesionMatch:
    """Counts of one structure in one case.

    sizes : voxels of each reference lesion
    detected : whether it was found, same order
    predicted : components predicted, without those that lie on a reference lesion too small to count
    correct : of these, how many overlap a reference lesion
    """

    sizes: tuple[int, ...]
    detected: tuple[bool, ...]
    predicted: int
    correct: int

    def scores(self) -> dict[str, float]:
        """precision = correct / predicted, recall = detected / lesions, F1 their harmonic mean.

        No lesion in either: all NaN, left out of means. Only one without lesions: all 0.
        """
        if not self.sizes and not self.predicted:
            return dict.fromkeys(("lesion_precision", "lesion_recall", "lesion_f1"), float("nan"))
        precision = self.correct / self.predicted if self.predicted else 0.0
        recall = sum(self.detected) / len(self.sizes) if self.sizes else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return {"lesion_precision": precision, "lesion_recall": recall, "lesion_f1": f1}


def match_lesions(
    reference: np.ndarray,
    prediction: np.ndarray,
    valid: np.ndarray | None = None,
    *,
    overlap: float = 0.0,
    min_size: int = 1,
    connectivity: int | None = None,
) -> LesionMatch:
    """Matches connected components of two masks by their overlap.

    A reference lesion r is detected if some predicted component p has |p ∩ r| / |r| >= overlap, and at least one voxel in
    common. A predicted component is correct if it has at least one voxel in common with a reference lesion. So one
    component over two lesions detects both and is one correct component; two components on one lesion detect it once and
    are two correct ones. No lesion is matched one to one, as in the MS lesion challenges [1] and in ISLES [2].

    Components below `min_size` are left out on both sides; a predicted component that touches only left-out reference
    lesions is neither correct nor wrong, and left out too. Ignored voxels are taken out of both masks first.

    Parameters
    ----------
    reference, prediction : bool, (*spatial), 2D or 3D
    valid : bool, (*spatial); False where the reference says "ignore"
    overlap : fraction of the lesion in [0, 1]; 0 asks for one voxel
    min_size : voxels
    connectivity : 4 or 8 in 2D, 6, 18 or 26 in 3D; None takes 8 or 26 (corners connect)

    Raises
    ------
    ValueError : shapes differ, not 2D or 3D, or a parameter out of its range

    References
    ----------
    [1] Commowick et al., Objective evaluation of multiple sclerosis lesion segmentation, Scientific Reports 2018.
    [2] Hernandez Petzsche et al., ISLES 2022, Scientific Data 2022.
    """
    check_masks(reference, prediction, valid)
    connectivity = _check_parameters(reference.ndim, overlap, min_size, connectivity)
    if valid is not None:
        reference, prediction = reference & valid, prediction & valid
    if (either := reference | prediction).any():
        box = bounding_box(either)
        reference, prediction = reference[box], prediction[box]
    lesions, sizes = _components(reference, connectivity)
    components, component_sizes = _components(prediction, connectivity)
    counted = sizes >= min_size  # (lesions,)
    kept = component_sizes >= min_size  # (components,)
    common = np.zeros((len(sizes), len(component_sizes)), np.int64)  # voxels shared by each pair
    shared = reference & prediction
    np.add.at(common, (lesions[shared] - 1, components[shared] - 1), 1)
    largest = common[:, kept].max(axis=1, initial=0)  # (lesions,)
    detected = (largest > 0) & (largest >= overlap * sizes)
    correct = (common[counted] > 0).any(axis=0) & kept  # (components,)
    excused = (common[~counted] > 0).any(axis=0) & ~correct
    return LesionMatch(
        tuple(int(size) for size in sizes[counted]),
        tuple(bool(found) for found in detected[counted]),
        int(np.count_nonzero(kept & ~excused)),
        int(np.count_nonzero(correct)),
    )


def recall_by_size(sizes: Sequence[float], detected: Sequence[bool], edges: Sequence[float]) -> list[tuple[int, float]]:
    """For each bin [edges[i], edges[i + 1]): how many reference lesions it holds and the fraction found (NaN if none).

    Raises
    ------
    ValueError : lengths differ, or edges are not increasing
    """
    sizes, detected = np.asarray(sizes, float), np.asarray(detected, bool)
    if sizes.shape != detected.shape:
        raise ValueError(f"{sizes.size} sizes and {detected.size} detections: expected as many")
    if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"edges {list(edges)}: expected at least two increasing numbers")
    bins = []
    for low, high in pairwise(edges):
        inside = detected[(sizes >= low) & (sizes < high)]
        bins.append((int(inside.size), float(inside.mean()) if inside.size else float("nan")))
    return bins


def _components(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1, 2, ... (*spatial) and the voxels of each component."""
    import cc3d

    if not mask.any():  # cc3d cannot take an empty axis
        return np.zeros(mask.shape, np.uint32), np.zeros(0, np.int64)
    labels = cc3d.connected_components(np.asfortranarray(mask.astype(np.uint8)), connectivity=connectivity)
    return labels, np.bincount(labels.ravel())[1:]


def _check_parameters(ndim: int, overlap: float, min_size: int, connectivity: int | None) -> int:
    allowed = {2: (8, 4), 3: (26, 18, 6)}
    if ndim not in allowed:
        raise ValueError(f"masks of {ndim} dimensions: expected 2 or 3")
    connectivity = allowed[ndim][0] if connectivity is None else connectivity
    if connectivity not in allowed[ndim]:
        raise ValueError(f"connectivity {connectivity}: expected one of {sorted(allowed[ndim])} in {ndim}D")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap {overlap}: expected a fraction between 0 and 1")
    if min_size < 1:
        raise ValueError(f"min_size {min_size}: expected 1 voxel or more")
    return connectivity
