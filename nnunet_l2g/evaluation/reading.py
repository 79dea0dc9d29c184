"""Reads a prediction with its reference, and refuses pairs that do not lie on one grid."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import geometry_difference, has_spacing, header, shown
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.images import check_whole, unreadable
from nnunet_l2g.lookup import quiet


class UnequalGrids(UserError):
    """Reference and prediction differ in shape or spacing."""


class ReadPair(NamedTuple):
    """reference, prediction : (z, y, x) or, for a single slice, (y, x)
    spacing : along these axes; of the file that has one, 1 if none has
    header_difference : both headers in words, if origin or direction differ
    """

    reference: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, ...]
    header_difference: str | None = None


def read_pair(reference: Path, prediction: Path, labels: Labels) -> ReadPair:
    """Both segmentations, voxel by voxel.

    Another origin or direction is noted and not refused: nnU-Net trains on such labels, and evaluates them so.

    Raises
    ------
    UnequalGrids : the two differ in shape or spacing
    UserError : a file cannot be read, or holds values that dataset.json does not declare; names the file
    """
    (first, properties), (second, others) = (read_segmentation(path, labels) for path in (reference, prediction))
    if not has_spacing(reference, labels.reader):
        properties = properties | {"spacing": others["spacing"]}
    elif not has_spacing(prediction, labels.reader):
        others = others | {"spacing": properties["spacing"]}
    if first.shape != second.shape or geometry_difference(others, properties, ["spacing"]):
        raise UnequalGrids(
            f"{prediction} has {_grid(second, others)}, its reference {reference} {_grid(first, properties)}; "
            "expected one grid (z, y, x)"
        )
    allowed = set(labels.known)
    for path, array, extra in ((reference, first, {labels.ignore}), (prediction, second, set())):
        unknown = {float(value) for value in unique_values(array)} - allowed - extra
        if unknown:
            raise UserError(
                f"{path}: holds the values {sorted(unknown)[:5]}; dataset.json declares {sorted(allowed)}"
                f"{'' if labels.ignore is None or not extra else f' and ignore {labels.ignore}'}"
            )
    difference = None
    if geometry_difference(others, properties):
        difference = f"{reference} has {header(properties)}; {prediction} has {header(others)}"
    spacing = tuple(float(value) for value in properties["spacing"])
    if first.shape[0] == 1:
        return ReadPair(first[0], second[0], spacing[1:], difference)
    return ReadPair(first, second, spacing, difference)


def odd_files(paths: list[Path], labels: Labels) -> str:
    """Which of a case's files lie on another grid than most of them, in words; "" if no grid has the majority."""
    read = {path: read_segmentation(path, labels) for path in paths}
    known = [properties for path, (_, properties) in read.items() if has_spacing(path, labels.reader)]
    grids: dict[str, list[Path]] = {}
    for path, (array, properties) in read.items():
        has_none = known and not has_spacing(path, labels.reader)
        grids.setdefault(_grid(array, known[0] if has_none else properties), []).append(path)
    usual = max(grids, key=lambda grid: len(grids[grid]))
    odd = [f"{path} ({grid})" for grid, files in grids.items() if grid != usual for path in files]
    if not odd or 2 * len(grids[usual]) <= len(paths):
        return ""
    return (
        f"{' and '.join(odd)}: the other {len(grids[usual])} files of this case have {usual}; expected one grid (z, y, x). "
        "Make this file again on the grid of the case's image"
    )


def unique_values(array: np.ndarray) -> np.ndarray:
    """As np.unique, without sorting a hundred million voxels where all are small whole numbers, as labels are."""
    if array.min() >= 0 and array.max() < 1 << 16 and np.isfinite(array).all():
        whole = array.astype(np.uint16)
        if np.array_equal(whole, array):
            return np.flatnonzero(np.bincount(whole.ravel()))
    return np.unique(array)


def read_segmentation(path: Path, labels: Labels) -> tuple[np.ndarray, dict]:
    """(z, y, x), with what nnU-Net's reader says of the grid. UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with quiet():  # the TIFF reader prints what `with_unit` says once
            array, properties = labels.reader().read_seg(str(path))
    except Exception as error:  # each library has its own
        raise unreadable(path, labels.reader.__name__, error) from error
    check_whole(path)
    if array.shape[0] != 1:
        raise UserError(f"{path}: {array.shape[0]} channels; expected a segmentation of one")
    return array[0], properties


def _grid(array: np.ndarray, properties: dict) -> str:
    return f"shape {shown(np.array(array.shape))}, spacing {shown(np.array(properties['spacing'], float))}"
