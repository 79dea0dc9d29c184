"""Is an image file all there? SimpleITK fills what is missing of a NIfTI file with zeros, and says nothing."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

from nnunet_l2g.errors import UserError

BLOCK = 1 << 22


def check_whole(path: Path) -> None:
    """UserError if a .gz file ends too early, or a NIfTI file holds fewer bytes than its header claims voxels."""
    if path.name.endswith(".gz"):
        size = _unpacked_size(path)
    else:
        size = path.stat().st_size
    if path.name.lower().endswith((".nii", ".nii.gz")):
        needed = _claimed_size(path)
        if size < needed:
            raise UserError(f"{path}: holds {size} bytes, its header claims {needed}: it was cut off; copy the file again")


def _unpacked_size(path: Path) -> int:
    size = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(BLOCK):
                size += len(block)
    except Exception as error:  # zlib's, gzip's and the system's own
        raise UserError(f"{path}: cannot be unpacked ({type(error).__name__}: {error}); copy the file again") from error
    return size


def _claimed_size(path: Path) -> int:
    """Header and voxels, bytes."""
    import nibabel

    try:
        voxels = nibabel.load(path).dataobj
        return int(voxels.offset) + math.prod(int(n) for n in voxels.shape) * voxels.dtype.itemsize
    except Exception as error:  # nibabel's own, and those of numbers that make no sense
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{path}: cannot be read as NIfTI ({cause}); copy the file again") from error
