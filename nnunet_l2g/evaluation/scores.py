"""How well a predicted mask agrees with its reference mask: overlap in voxels, distances between surfaces, lesions found.

All functions take boolean masks of one structure in one case, (*spatial). Voxels with the ignore label are left out by `valid`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

PERCENTILE = 95.0


@dataclass(frozen=True)
class Score:
    """How a score is shown.

    title : in tables and plots
    unit : "mm", "px", or "" for a fraction
    higher_is_better : the direction of improvement
    digits : after the decimal point
    """

    title: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 3

    @property
    def label(self) -> str:
        """Title with unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title


OVERLAP = {"dice": Score("Dice"), "iou": Score("IoU"), "precision": Score("precision"), "recall": Score("recall")}
SURFACE = {
    "hd95": Score("HD95", "mm", higher_is_better=False, digits=2),
    "assd": Score("ASSD", "mm", higher_is_better=False, digits=2),
    "nsd": Score("NSD"),
}
LESION = {
    "lesion_precision": Score("lesion precision"),
    "lesion_recall": Score("lesion recall"),
    "lesion_f1": Score("lesion F1"),
}
SCORES = OVERLAP | SURFACE | LESION


def shown_scores(lesions: bool, pixels: bool) -> dict[str, Score]:
    """The scores of a comparison by name; `pixels` says that distances are in pixels, because the files have no spacing."""
    scores = SCORES if lesions else OVERLAP | SURFACE
    if not pixels:
        return scores
    return {name: replace(score, unit="px") if score.unit else score for name, score in scores.items()}


def count_voxels(reference: np.ndarray, prediction: np.ndarray, valid: np.ndarray | None = None) -> tuple[int, int, int]:
    """TP = |R ∩ P ∩ V|, FP = |(P \\ R) ∩ V|, FN = |(R \\ P) ∩ V|.

    Parameters
    ----------
    reference, prediction : bool, (*spatial)
    valid : bool, (*spatial); False where the reference says "ignore". None: all voxels count

    Raises
    ------
    ValueError : shapes differ, or a mask is not boolean
    """
    check_masks(reference, prediction, valid)
    if valid is not None:
        reference, prediction = reference & valid, prediction & valid
    tp = int(np.count_nonzero(reference & prediction))
    return tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp


def overlap_scores(tp: int, fp: int, fn: int) -> dict[str, float]:
    """Dice = 2TP / (2TP + FP + FN), IoU = TP / (TP + FP + FN), precision = TP / (TP + FP), recall = TP / (TP + FN).

    If reference and prediction are both empty, all four are NaN and are left out of means, as in nnU-Net's summary [1]. If only
    one of them is empty, all four are 0. Precision (nothing predicted) and recall (nothing to find) are then 0/0; 0 keeps the
    four scores defined on the same cases, and a method does not gain by predicting nothing [2].

    Returns
    -------
    dict with keys dice, iou, precision, recall; values in [0, 1] or NaN

    References
    ----------
    [1] Isensee et al., nnU-Net, Nature Methods 2021; nnunetv2.evaluation.evaluate_predictions.
    [2] Maier-Hein, Reinke et al., Metrics Reloaded, Nature Methods 2024: state how empty structures are handled.
    """
    if tp + fp + fn == 0:
        return dict.fromkeys(OVERLAP, float("nan"))
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
    }


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

    A surface voxel belongs to the mask and has a face neighbour that does not belong to it. Outside the image nothing belongs
    to the mask. A face towards an ignored voxel is no surface, because what lies there is unknown. P95 interpolates linearly.
    Every surface voxel counts the same; implementations that weight by surface area differ a little on anisotropic grids.

    If both surfaces are empty, all scores are NaN. If only one is empty, HD95 and ASSD are the image's diagonal, the largest
    distance possible in it, and NSD is 0: a missed structure is then neither free nor infinitely bad [1].

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
    if len(spacing) != reference.ndim or not all(np.isfinite(value) and value > 0 for value in spacing):
        raise ValueError(f"spacing {spacing}: expected {reference.ndim} positive numbers, one for each axis")
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance}: expected 0 or more")
    box = _box(reference | prediction)
    known = None if valid is None else valid[box]
    surfaces = [np.argwhere(surface_voxels(mask[box], known)) * spacing for mask in (reference, prediction)]  # mm
    sizes = [len(points) for points in surfaces]
    if sizes == [0, 0]:
        return dict.fromkeys(SURFACE, float("nan"))
    if 0 in sizes:
        diagonal = float(np.linalg.norm(np.array(reference.shape) * spacing))
        return {"hd95": diagonal, "assd": diagonal, "nsd": 0.0}
    to_prediction, to_reference = _distances(*surfaces), _distances(*reversed(surfaces))  # (|S_R|,), (|S_P|,)
    both = np.concatenate([to_prediction, to_reference])
    return {
        "hd95": float(max(np.percentile(to_prediction, PERCENTILE), np.percentile(to_reference, PERCENTILE))),
        "assd": float(both.mean()),
        # a distance of exactly tau must not be lost by rounding
        "nsd": float(np.mean(both <= tolerance + 1e-4 * min(spacing))),
    }


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each point (n, D) to the nearest of the others (m, D); (n,).

    A tree takes a quarter of the time of a distance map where the surfaces are close, and up to three times as long if not.
    """
    return KDTree(others, leafsize=32, balanced_tree=False).query(points)[0]


def surface_voxels(mask: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Voxels of `mask` with a face neighbour that is known and not in `mask`, or with a face at the image's border; bool."""
    if valid is None:
        return mask & ~binary_erosion(mask)
    return mask & valid & ~binary_erosion(mask | ~valid)


@dataclass(frozen=True)
class LesionMatch:
    """Lesions of one structure in one case.

    sizes : voxels of each reference lesion
    detected : whether each reference lesion was found
    predicted : number of predicted components, without those that lie only on reference lesions too small to count
    correct : how many of these overlap a reference lesion
    """

    sizes: tuple[int, ...]
    detected: tuple[bool, ...]
    predicted: int
    correct: int

    def scores(self) -> dict[str, float]:
        """precision = correct / predicted, recall = detected / lesions, F1 their harmonic mean.

        All are NaN if there is no lesion in either, and 0 if only one of the two has lesions.
        """
        if not self.sizes and not self.predicted:
            return dict.fromkeys(LESION, float("nan"))
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
) -> LesionMatch:
    """Matches connected components of two masks by their overlap. Voxels that touch by a corner are connected.

    A reference lesion r is detected if some predicted component p has |p ∩ r| / |r| >= overlap, and at least one voxel in
    common. A predicted component is correct if it has at least one voxel in common with a reference lesion. So one
    component over two lesions detects both and is one correct component; two components on one lesion detect it once and
    are two correct ones. No lesion is matched one to one, as in the MS lesion challenges [1] and in ISLES [2].

    Components below `min_size` are left out on both sides. A predicted component that touches only left-out reference
    lesions is neither correct nor wrong, and is left out too. Ignored voxels are taken out of both masks first.

    Parameters
    ----------
    reference, prediction : bool, (*spatial), 2D or 3D
    valid : bool, (*spatial); False where the reference says "ignore"
    overlap : fraction of the lesion in [0, 1]; 0 asks for one voxel
    min_size : voxels

    Raises
    ------
    ValueError : shapes differ, not 2D or 3D, or a parameter out of its range

    References
    ----------
    [1] Commowick et al., Objective evaluation of multiple sclerosis lesion segmentation, Scientific Reports 2018.
    [2] Hernandez Petzsche et al., ISLES 2022, Scientific Data 2022.
    """
    check_masks(reference, prediction, valid)
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap {overlap}: expected a fraction between 0 and 1")
    if min_size < 1:
        raise ValueError(f"min_size {min_size}: expected 1 voxel or more")
    if valid is not None:
        reference, prediction = reference & valid, prediction & valid
    box = _box(reference | prediction)
    reference, prediction = reference[box], prediction[box]
    lesions, sizes = _components(reference)
    components, component_sizes = _components(prediction)
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


def check_masks(reference: np.ndarray, prediction: np.ndarray, valid: np.ndarray | None = None) -> None:
    """ValueError unless all masks are boolean, of one shape, and 2D or 3D."""
    if reference.ndim not in (2, 3):
        raise ValueError(f"masks of shape {reference.shape}: expected 2 or 3 dimensions")
    for name, mask in (("reference", reference), ("prediction", prediction), ("valid", valid)):
        if mask is None:
            continue
        if mask.dtype != bool:
            raise ValueError(f"{name}: expected a boolean array, got {mask.dtype}; compare labels first (labels == 1)")
        if mask.shape != reference.shape:
            raise ValueError(f"{name} has shape {mask.shape}, reference {reference.shape}: expected the same")


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask and one voxel more, where the image has one; the whole image for an empty mask.

    The voxel more tells an ignored neighbour from the end of the image.
    """
    found = find_objects(mask.astype(np.uint8))
    return tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in found[0]) if found else (slice(None),) * mask.ndim


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1, 2, ... (*spatial) and the voxels of each component."""
    import cc3d

    labels = cc3d.connected_components(np.asfortranarray(mask.astype(np.uint8)), connectivity={2: 8, 3: 26}[mask.ndim])
    return labels, np.bincount(labels.ravel())[1:]
