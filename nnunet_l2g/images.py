"""Is an image file all there? SimpleITK fills what is missing of a NIfTI file with zeros, and says nothing."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nnunet_l2g.errors import UserError

BLOCK = 1 << 22
HEADER = 540  # bytes of the longer one of NIfTI's two headers
MENDED = (
    "i = nibabel.load(FILE); i.set_qform(i.affine, 1); i.set_sform(i.get_qform(), 1); nibabel.save(i, NEW_FILE)"  # no shear
)


def check_whole(path: Path) -> None:
    """UserError if a NIfTI file holds fewer bytes than its header claims; call it for a file that the reader has taken.

    Compressed or not is told by the file's first bytes, as ITK does, not by its name. Bytes behind the last voxel do not
    count, nor does a checksum behind them that is cut off or wrong.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        blocks = _unpacked(file) if packed else iter(lambda: file.read(BLOCK), b"")
        head = b""
        for block in blocks:
            head += block
            if len(head) >= HEADER:
                break
        size, needed = len(head), _claimed_size(head[:HEADER], path)
        while size < needed and (block := next(blocks, b"")):
            size += len(block)
    if size < needed:
        raise UserError(f"{path}: holds {size} bytes, its header claims {needed}: it was cut off; copy the file again")


def unreadable(path: Path | str, reader: str, error: Exception) -> UserError:
    """The one error for a file that nnU-Net's reader does not take: each library raises its own."""
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {' '.join(lines[-1].split())[:200] if lines else 'no message'}"
    remedy = "replace the file, or write the file again with a program that opens it"
    if "orthonormal" in str(error):
        remedy = (
            "the image's axes are not at right angles (sheared). If only by rounding, write it without the shear "
            f"(Python: {MENDED}); if the scanner was tilted, resample it onto a straight grid"
        )
    return UserError(f"{path}: {reader} cannot read it ({cause}); {remedy}")


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    """What a gzip file holds, up to where it ends or is damaged."""
    with gzip.GzipFile(fileobj=file) as stream:
        try:
            while block := stream.read1(BLOCK):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return


def _claimed_size(head: bytes, path: Path) -> int:
    """Bytes of header and voxels; 0 if it is no NIfTI header, and the reader knew the format by something else."""
    from nibabel import Nifti1Header, Nifti2Header

    kind = next((kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(head)), None)
    if kind is None:
        return 0
    try:
        header = kind(head[: kind.sizeof_hdr], check=False)  # what nibabel checks beside sizes may be only rounded
        return int(header.get_data_offset()) + math.prod(map(int, header.get_data_shape())) * header.get_data_dtype().itemsize
    except Exception as error:  # nibabel's own, and those of numbers that make no sense
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(
            f"{path}: its NIfTI header does not say how many bytes it needs ({cause}); write the file again "
            "(SimpleITK.WriteImage(SimpleITK.ReadImage(FILE), NEW_FILE))"
        ) from error
