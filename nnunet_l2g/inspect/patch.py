"""One patch of a preprocessed case that shows something: the same one at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd


class Patch(NamedTuple):
    """image (C, *patch) float32, reference (*patch) int16 labels, name of the case."""

    image: np.ndarray
    reference: np.ndarray
    case: str


def has_foreground(properties: dict) -> bool:
    """Whether nnU-Net's preprocessing found a labelled voxel; of an ignored one it keeps no location of its own."""
    return any(len(where) for where in _foreground(properties).values())


def labelled_patch(dataset, patch_size: Sequence[int]) -> Patch:
    """A patch around a labelled voxel of the first case that has one; of the first case's centre if none has.

    Parameters
    ----------
    dataset : nnU-Net's dataset of preprocessed cases
    patch_size : (2,) or (3,) voxels
        With two numbers, a slice of the case's first axis.
    """
    chosen, location = dataset.identifiers[0], None
    for case in dataset.identifiers:
        where = [rows for rows in _foreground(dataset.load_case(case)[3]).values() if len(rows)]
        if where:
            chosen, rows = case, min(where, key=len)  # the rarest class: the one to look at
            location = np.asarray(rows[len(rows) // 2])[1:]  # without the channel
            break
    image, reference, _, _ = dataset.load_case(chosen)
    if location is None:
        location = np.array(image.shape[1:]) // 2
    image, reference = image[:], reference[:]  # (C, *spatial), (1, *spatial)
    if len(patch_size) == 2:
        image, reference, location = image[:, location[0]], reference[:, location[0]], location[1:]
    start = [_start(*values) for values in zip(location, patch_size, image.shape[1:], strict=True)]
    box = [[a, a + size] for a, size in zip(start, patch_size, strict=True)]
    reference = crop_and_pad_nd(reference, box, 0)[0]  # (*patch)
    return Patch(crop_and_pad_nd(image, box, 0).astype(np.float32), np.maximum(reference, 0).astype(np.int16), chosen)


def _start(location: int, size: int, length: int) -> int:
    """Inside the image as far as the patch fits; centred where it does not."""
    if size >= length:
        return (length - size) // 2
    return int(np.clip(location - size // 2, 0, length - size))


def _foreground(properties: dict) -> dict:
    """class_locations without background and without the entry that nnU-Net makes of all annotated voxels."""
    locations = properties["class_locations"]
    return {k: v for k, v in locations.items() if k != 0 and not (isinstance(k, tuple) and min(k) < 1)}
