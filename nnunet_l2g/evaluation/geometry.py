"""How a file lies in space, as nnU-Net's readers say, and what differs between two files."""

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
