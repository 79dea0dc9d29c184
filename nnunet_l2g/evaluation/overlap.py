"""Voxel-wise overlap of two masks."""

from __future__ import annotations

import numpy as np


def count_voxels(reference: np.ndarray, prediction: np.ndarray, valid: np.ndarray | None = None) -> tuple[int, int, int]:
    """TP = |R ∩ P ∩ V|, FP = |(P \\ R) ∩ V|, FN = |(R \\ P) ∩ V|.

    Parameters
    ----------
    reference, prediction : bool, (*spatial)
    valid : bool, (*spatial)
        False where the reference says "ignore"; such voxels are left out. None: all count.

    Raises
    ------
    ValueError : shapes differ
    """
    check_masks(reference, prediction, valid)
    if valid is not None:
        reference, prediction = reference & valid, prediction & valid
    true_positive = int(np.count_nonzero(reference & prediction))
    return (
        true_positive,
        int(np.count_nonzero(prediction)) - true_positive,
        int(np.count_nonzero(reference)) - true_positive,
    )


def overlap_scores(tp: int, fp: int, fn: int) -> dict[str, float]:
    """Dice = 2TP / (2TP + FP + FN), IoU = TP / (TP + FP + FN), precision = TP / (TP + FP), recall = TP / (TP + FN).

    Reference and prediction both empty: all NaN, left out of means, as in nnU-Net's summary [1]. Only one of them empty:
    all 0. For precision (nothing predicted) and recall (nothing to find) the formula is 0/0; 0 keeps all four defined on
    the same cases, and an empty prediction is not rewarded by dropping out of a mean [2].

    Returns
    -------
    dict with keys dice, iou, precision, recall; values in [0, 1] or NaN

    References
    ----------
    [1] Isensee et al., nnU-Net, Nature Methods 2021; nnunetv2.evaluation.evaluate_predictions.
    [2] Maier-Hein, Reinke et al., Metrics Reloaded, Nature Methods 2024: state how empty structures are handled.
    """
    if tp + fp + fn == 0:
        return dict.fromkeys(("dice", "iou", "precision", "recall"), float("nan"))
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
    }


def check_masks(reference: np.ndarray, prediction: np.ndarray, valid: np.ndarray | None = None) -> None:
    """ValueError unless all masks are boolean and of one shape."""
    for name, mask in (("reference", reference), ("prediction", prediction), ("valid", valid)):
        if mask is None:
            continue
        if mask.dtype != bool:
            raise ValueError(f"{name}: expected a boolean array, got {mask.dtype}; compare labels first (labels == 1)")
        if mask.shape != reference.shape:
            raise ValueError(f"{name} has shape {mask.shape}, reference {reference.shape}: expected the same")
