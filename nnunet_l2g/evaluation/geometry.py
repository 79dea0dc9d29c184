"""Reads segmentations with nnU-Net's readers, tells whether two files lie on one grid, and writes maps onto an image's grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.images import check_whole, unreadable
from nnunet_l2g.lookup import quiet

TOLERANCE = 1e-3  # mm and direction cosines; programs round what they write
ALL = ("spacing", "origin", "direction")
VOXEL_BY_VOXEL = (
    "They were compared voxel by voxel, as nnU-Net does; the scores are wrong if the arrays do not show the same place. "
    "Look at one case in a viewer. If only the header is wrong, give the label its image's header "
    "(SimpleITK: label.CopyInformation(image)) and write it again."
)  # for files whose origin or direction differ


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
    """Reads a reference and its prediction.

    Another origin or direction is reported and not refused, because nnU-Net trains on such labels and evaluates them so.

    Raises
    ------
    UserError : a file cannot be read, holds values that dataset.json does not declare, or the two differ in shape or spacing
    """
    (first, properties), (second, others) = (read_segmentation(path, labels) for path in (reference, prediction))
    if not has_spacing(reference, labels.reader):
        properties = properties | {"spacing": others["spacing"]}
    elif not has_spacing(prediction, labels.reader):
        others = others | {"spacing": properties["spacing"]}
    if first.shape != second.shape or geometry_difference(others, properties, ["spacing"]):
        one, other = (f"shape {a.shape}, spacing {shown(p['spacing'])}" for a, p in ((first, properties), (second, others)))
        raise UserError(f"{reference} has {one}, its prediction {prediction} {other}; expected one grid (z, y, x)")
    ignore = [] if labels.ignore is None else [labels.ignore]
    for path, array, known in ((reference, first, [*labels.known, *ignore]), (prediction, second, labels.known)):
        unknown = sorted({float(value) for value in unique_values(array)} - set(known))
        if unknown:
            raise UserError(f"{path}: holds the values {unknown[:5]}; dataset.json declares {sorted(known)}")
    difference = None
    if geometry_difference(others, properties):
        difference = f"{reference} has {header(properties)}; {prediction} has {header(others)}"
    spacing = tuple(float(value) for value in properties["spacing"])
    if first.shape[0] == 1:
        return ReadPair(first[0], second[0], spacing[1:], difference)
    return ReadPair(first, second, spacing, difference)


def read_segmentation(path: Path, labels: Labels) -> tuple[np.ndarray, dict]:
    """The array (z, y, x) and the properties that nnU-Net's reader gives. UserError if the file cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with quiet():  # the TIFF reader prints about a missing spacing, of which `with_unit` warns once
            array, properties = labels.reader().read_seg(str(path))
    except Exception as error:  # each library has its own
        raise unreadable(path, labels.reader.__name__, error) from error
    check_whole(path)
    if array.shape[0] != 1:
        raise UserError(f"{path}: {array.shape[0]} channels; expected a segmentation of one")
    return array[0], properties


def unique_values(array: np.ndarray) -> np.ndarray:
    """The different values of an array, in any order, without sorting it."""
    return pd.unique(array.ravel())


def named_geometry(properties: dict) -> dict[str, np.ndarray]:
    """Spacing, origin and direction from the properties of nnU-Net's readers; some readers know the spacing alone."""
    if "sitk_stuff" in properties:
        return {name: np.array(properties["sitk_stuff"][name], float) for name in ALL}
    spacing = np.array(properties["spacing"], float)
    if "nibabel_stuff" in properties:
        affine = np.array(properties["nibabel_stuff"]["original_affine"], float)
        return {"spacing": spacing, "origin": affine[:3, 3], "direction": affine[:3, :3]}
    return {"spacing": spacing}


def geometry_difference(mine: dict, theirs: dict, names: Sequence[str] = ALL) -> str | None:
    """`origin (0, 0, 5), expected (0, 0, 0)` for the first of `names` in which two readers' properties differ, else None."""
    mine, theirs = named_geometry(mine), named_geometry(theirs)
    for name in names:
        one, other = mine.get(name), theirs.get(name)
        if other is not None and not _same(one, other):
            return f"{name} {'none' if one is None else shown(one)}, expected {shown(other)}"
    return None


def header(properties: dict) -> str:
    """`origin (0, 0, 5), direction (1, 0, ...)`: what a header says beside shape and spacing; "" if the format has neither."""
    return ", ".join(f"{name} {shown(values)}" for name, values in named_geometry(properties).items() if name != "spacing")


def spacing_file(path: Path) -> Path:
    """Where nnU-Net's TIFF reader looks for the spacing of a segmentation."""
    return path.with_suffix(".json")


def has_spacing(path: Path, reader: type) -> bool:
    """Whether the file has a spacing: a PNG never has one, a TIFF only with a CASE.json beside it."""
    name = reader.__name__
    return name != "NaturalImage2DIO" and (name != "Tiff3DIO" or spacing_file(path).is_file())


def shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in np.ravel(values)) + ")"


def _same(one: np.ndarray | None, other: np.ndarray) -> bool:
    return one is not None and one.shape == other.shape and np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def write_nifti(values: np.ndarray, properties: dict, path: Path) -> None:
    """Writes (z, y, x) as NIfTI with the geometry of the image that nnU-Net read with these `properties`.

    PNG and TIFF images have no geometry beside a spacing, which is 1 for PNG; a 2D image gives a 2D file.
    """
    if "nibabel_stuff" in properties:
        _write_nibabel(values, properties["nibabel_stuff"], path)
        return
    import SimpleITK

    geometry = properties.get("sitk_stuff")
    spacing = tuple(float(s) for s in reversed(properties["spacing"])) if geometry is None else geometry["spacing"]
    if geometry is None and len(values) == 1:
        spacing = spacing[:2]  # nnU-Net's reader gives a 2D image a third spacing of 999
    image = SimpleITK.GetImageFromArray(values[0] if len(spacing) == 2 else values)
    image.SetSpacing(spacing)
    if geometry is not None:
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        if "original_orientation" in geometry:  # the reader turned the image
            image = SimpleITK.DICOMOrient(image, geometry["original_orientation"])
    SimpleITK.WriteImage(image, str(path), True)


def _write_nibabel(values: np.ndarray, geometry: dict, path: Path) -> None:
    import nibabel
    from nibabel.orientations import io_orientation, ornt_transform

    original = geometry["original_affine"]
    affine = geometry.get("reoriented_affine", original)
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)  # (x, y, z)
    if affine is not original:
        image = image.as_reoriented(ornt_transform(io_orientation(affine), io_orientation(original)))
        image = nibabel.Nifti1Image(np.asanyarray(image.dataobj), original)
    nibabel.save(image, path)
