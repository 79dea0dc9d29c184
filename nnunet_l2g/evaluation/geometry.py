"""How a file lies in space, as nnU-Net's readers say, what differs between two files, and how a map gets onto an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

TOLERANCE = 1e-3  # mm and direction cosines; writers round
ALL = ("spacing", "origin", "direction")
VOXEL_BY_VOXEL = (
    "They were compared voxel by voxel, as nnU-Net does; the scores are wrong if the arrays do not show the same place. "
    "Look at one case in a viewer. If only the header is wrong, give the label its image's header "
    "(SimpleITK: label.CopyInformation(image)) and write it again."
)  # of files whose origin or direction differ


def named_geometry(properties: dict) -> dict[str, np.ndarray]:
    """Spacing, origin and direction of nnU-Net's readers: SimpleITK's, nibabel's, or the bare spacing."""
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
    """`origin (0, 0, 5), direction (1, 0, ...)`, what a header says beside shape and spacing; "" if the format says nothing."""
    return ", ".join(f"{name} {shown(values)}" for name, values in named_geometry(properties).items() if name != "spacing")


def spacing_file(path: Path) -> Path:
    """Where nnU-Net's TIFF reader looks for the spacing of a segmentation."""
    return path.with_suffix(".json")


def has_spacing(path: Path, reader: type) -> bool:
    """Whether the file says how far its voxels lie apart: PNG never does, a TIFF only with a CASE.json beside it."""
    name = reader.__name__
    return name != "NaturalImage2DIO" and (name != "Tiff3DIO" or spacing_file(path).is_file())


def shown(values: np.ndarray) -> str:
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
