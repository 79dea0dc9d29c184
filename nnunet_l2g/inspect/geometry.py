"""From the network's grid back to the image's own, and into a NIfTI file that lies on the image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def to_original(values: np.ndarray, properties: dict, transpose_backward: Sequence[int], outside: float = 0) -> np.ndarray:
    """A map on the preprocessed grid, on the grid of the image as read: resampled, put back where nnU-Net cropped, transposed.

    Parameters
    ----------
    values : (*preprocessed)
        Integers are taken from the nearest voxel, others linearly, with voxel centres where nnU-Net's resampling has them.
    properties : what nnU-Net's preprocessing noted
    transpose_backward : of the plans
    outside : value of what was cropped away

    Returns
    -------
    (*image), values' dtype
    """
    from skimage.transform import resize

    whole = np.issubdtype(values.dtype, np.integer)
    cropped = resize(
        values.astype(np.float64 if whole else np.float32),
        tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"]),
        order=0 if whole else 1,
        mode="edge",
        anti_aliasing=False,
        preserve_range=True,
    )
    full = np.full(tuple(properties["shape_before_cropping"]), outside, dtype=np.float32)
    full[tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])] = cropped
    return full.transpose(transpose_backward).astype(values.dtype)


def write_map(values: np.ndarray, properties: dict, path: Path) -> None:
    """Writes (z, y, x) as NIfTI with the geometry of the image that `properties` were read with, in one step.

    Images without geometry (PNG, TIFF) are written as they are: unit spacing for PNG, no direction; one slice in 2D.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    if "nibabel_stuff" in properties:
        _write_nibabel(values, properties["nibabel_stuff"], partial)
    else:
        _write_sitk(values, properties, partial)
    os.replace(partial, path)


def _write_nibabel(values: np.ndarray, geometry: dict, path: Path) -> None:
    import nibabel
    from nibabel.orientations import io_orientation, ornt_transform

    array = values.transpose(2, 1, 0)  # (x, y, z)
    affine = geometry.get("reoriented_affine", geometry["original_affine"])
    image = nibabel.Nifti1Image(array, affine)
    if "reoriented_affine" in geometry:
        image = image.as_reoriented(ornt_transform(io_orientation(affine), io_orientation(geometry["original_affine"])))
        image = nibabel.Nifti1Image(np.asanyarray(image.dataobj), geometry["original_affine"])
    nibabel.save(image, path)


def _write_sitk(values: np.ndarray, properties: dict, path: Path) -> None:
    import SimpleITK

    geometry = properties.get("sitk_stuff")
    spacing = tuple(float(s) for s in reversed(properties["spacing"])) if geometry is None else geometry["spacing"]
    if geometry is None and values.shape[0] == 1:
        spacing = spacing[:2]  # a natural image; nnU-Net's reader gives it a slice distance of 999
    image = SimpleITK.GetImageFromArray(values[0] if len(spacing) == 2 else values)
    image.SetSpacing(spacing)
    if geometry is not None:
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        if "original_orientation" in geometry:  # a reader that reorients
            image = SimpleITK.DICOMOrient(image, geometry["original_orientation"])
    SimpleITK.WriteImage(image, str(path), True)
