"""Checks that an image file was not cut off. SimpleITK fills what is missing of a NIfTI file with zeros, without a word."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

from nnunet_l2g.errors import UserError

BLOCK = 1 << 22  # bytes
HEADER = 540  # bytes of NIfTI-2's header; NIfTI-1's is shorter
WITHOUT_SHEAR = "i = nibabel.load(FILE); i.set_qform(i.affine, 1); i.set_sform(i.get_qform(), 1); nibabel.save(i, NEW_FILE)"


def check_whole(path: Path) -> None:
    """UserError if a NIfTI file holds fewer bytes than its header claims. Call it for a file that the reader has accepted.

    Whether it is compressed is decided by the file's first bytes, as ITK does, not by its name. Bytes after the last voxel do
    not matter, and neither does a checksum after them that is wrong or cut off.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        head = _read(stream, HEADER)
        size, needed = len(head), _claimed_size(head)
        while size < needed and (block := _read(stream, min(BLOCK, needed - size))):
            size += len(block)
    if size < needed:
        raise UserError(f"{path}: holds {size} bytes, its header claims {needed}: it was cut off; copy the file again")


def unreadable(path: Path | str, reader: str, error: Exception) -> UserError:
    """The error for a file that nnU-Net's reader cannot open, whatever its library has raised."""
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {' '.join(lines[-1].split())[:200] if lines else 'no message'}"
    remedy = "replace the file, or write the file again with a program that opens it"
    if "orthonormal" in str(error):
        remedy = (
            "the image's axes are not at right angles (sheared). If only by rounding, write it without the shear "
            f"(Python: {WITHOUT_SHEAR}); if the scanner was tilted, resample it onto a straight grid"
        )
    return UserError(f"{path}: {reader} cannot read it ({cause}); {remedy}")


def _read(stream, size: int) -> bytes:
    """Up to `size` bytes, fewer at the end or where compressed data are damaged."""
    content = b""
    try:
        while len(content) < size and (piece := stream.read1(size - len(content))):
            content += piece
    except (EOFError, gzip.BadGzipFile, zlib.error):
        pass
    return content


def _claimed_size(head: bytes) -> int:
    """Bytes of header and voxels together; 0 if nibabel knows no such header, which only the reader of another format takes."""
    from nibabel import Nifti1Header, Nifti2Header

    for kind in (Nifti1Header, Nifti2Header):
        if kind.may_contain_header(head):
            header = kind(head[: kind.sizeof_hdr], check=False)  # nibabel's check also refuses what is only rounded
            voxels = math.prod(map(int, header.get_data_shape()))
            return int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
    return 0
