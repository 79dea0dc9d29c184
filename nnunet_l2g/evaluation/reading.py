"""Reads a prediction with its reference, and refuses pairs that do not lie on one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.untrusted.images import check_whole

TOLERANCE = 1e-3  # mm and direction cosines; writers round


def read_pair(reference: Path, prediction: Path, labels: Labels) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Both segmentations, (z, y, x) or, for a single slice, (y, x), with the spacing along these axes.

    Raises
    ------
    UserError : a file cannot be read, holds values that dataset.json does not declare, or differs from the other in
        shape, spacing, origin or direction; names the file
    """
    (first, properties), (second, others) = (_read(path, labels) for path in (reference, prediction))
    if first.shape != second.shape:
        raise UserError(
            f"{prediction}: shape {second.shape}, but its reference {reference} has {first.shape} (z, y, x); "
            "expected a prediction on the reference's grid"
        )
    for name, values in _geometry(properties).items():
        mine = _geometry(others).get(name)
        if mine is None or mine.shape != values.shape or not np.allclose(mine, values, rtol=TOLERANCE, atol=TOLERANCE):
            shown = "none" if mine is None else _shown(mine)
            raise UserError(
                f"{prediction}: {name} {shown}, but its reference {reference} has {_shown(values)}; "
                "expected a prediction on the reference's grid"
            )
    allowed = set(labels.known)
    for path, array, extra in ((reference, first, {labels.ignore}), (prediction, second, set())):
        unknown = {float(value) for value in unique_values(array)} - allowed - extra
        if unknown:
            raise UserError(
                f"{path}: holds the values {sorted(unknown)[:5]}; dataset.json declares {sorted(allowed)}"
                f"{'' if labels.ignore is None or not extra else f' and ignore {labels.ignore}'}"
            )
    spacing = tuple(float(value) for value in properties["spacing"])
    if first.shape[0] == 1:
        return first[0], second[0], spacing[1:]
    return first, second, spacing


def unique_values(array: np.ndarray) -> np.ndarray:
    """As np.unique, without sorting a hundred million voxels where all are small whole numbers, as labels are."""
    if array.min() >= 0 and array.max() < 1 << 16 and np.isfinite(array).all():
        whole = array.astype(np.uint16)
        if np.array_equal(whole, array):
            return np.flatnonzero(np.bincount(whole.ravel()))
    return np.unique(array)


def _read(path: Path, labels: Labels) -> tuple[np.ndarray, dict]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        array, properties = labels.reader().read_seg(str(path))
    except Exception as error:  # each library has its own
        raise UserError(
            f"{path}: {labels.reader.__name__} cannot read it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}); "
            "write the file again"
        ) from error
    check_whole(path)
    if array.shape[0] != 1:
        raise UserError(f"{path}: {array.shape[0]} channels; expected a segmentation of one")
    return array[0], properties


def _geometry(properties: dict) -> dict[str, np.ndarray]:
    """Named geometry of nnU-Net's readers: SimpleITK's, nibabel's, or the bare spacing."""
    if "sitk_stuff" in properties:
        return {name: np.array(properties["sitk_stuff"][name], float) for name in ("spacing", "origin", "direction")}
    if "nibabel_stuff" in properties:
        affine = np.array(properties["nibabel_stuff"]["original_affine"], float)
        return {"spacing": np.array(properties["spacing"], float), "origin": affine[:3, 3], "direction": affine[:3, :3]}
    return {"spacing": np.array(properties["spacing"], float)}


def _shown(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values.ravel()) + ")"
