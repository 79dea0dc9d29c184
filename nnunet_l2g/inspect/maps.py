"""Maps of a whole image: from the patches of the network, back onto the grid of the image, into files of the output folder."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from tqdm import tqdm

from nnunet_l2g.evaluation.geometry import write_nifti
from nnunet_l2g.files import is_plain_name, marker_of, open_folder, read_json, write_text
from nnunet_l2g.inspect.case import Case

STEP = 0.5  # of the patch, as in nnU-Net's prediction


@torch.no_grad()
def map_image(
    data: np.ndarray, patch_size: Sequence[int], maps_of: Callable[[torch.Tensor], dict[str, torch.Tensor]], device: str,
    title: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Runs `maps_of` on the patches of nnU-Net's sliding window and puts its maps together.

    Parameters
    ----------
    data : (C, *grid), three axes
        The preprocessed image. A patch of two axes is taken from each slice of the first axis.
    maps_of : (1, C, *patch) -> name to (1, M, *patch), or coarser
        Where patches overlap, floating-point maps are averaged with nnU-Net's Gaussian weights, which are high in the middle
        of a patch. Integers are labels: a voxel takes the one of the patch where its weight is highest.
    title : of the progress bar

    Returns
    -------
    name to (M, *grid), float32 or int64
    """
    patch_size = tuple(patch_size)
    patch = (1,) * (3 - len(patch_size)) + patch_size
    padded, inside = pad_nd_image(torch.from_numpy(data), patch, "constant", {"value": 0}, True, None)
    size = tuple(padded.shape[1:])
    starts = compute_steps_for_sliding_window(size[3 - len(patch_size) :], patch_size, STEP)
    if len(patch_size) == 2:
        starts = [range(size[0]), *starts]
    weight = compute_gaussian(patch_size, dtype=torch.float32, device=torch.device("cpu")).view(patch)
    total, highest = torch.zeros(size), torch.zeros(size)  # of the weights, at each voxel
    found: dict[str, torch.Tensor] = {}
    for start in tqdm(list(itertools.product(*starts)), desc=title, leave=False):
        tile = tuple(slice(first, first + length) for first, length in zip(start, patch, strict=True))
        x = padded[(slice(None), *tile)].reshape(1, -1, *patch_size)  # (1, C, *patch)
        for name, values in maps_of(x.to(device)).items():
            dtype = torch.float32 if values.is_floating_point() else torch.int64
            fine = F.interpolate(values.double(), patch_size, mode="nearest")  # exact for integers
            values = fine.to(dtype).cpu().reshape(-1, *patch)  # (M, *patch)
            if name not in found:
                found[name] = values.new_zeros((len(values), *size))
            here = found[name][(slice(None), *tile)]
            if values.is_floating_point():
                here += values * weight
            else:
                here.copy_(torch.where(weight > highest[tile], values, here))
        total[tile] += weight
        highest[tile] = torch.maximum(highest[tile], weight)
    cut = (slice(None), *inside[1:])
    return {name: (values / total if values.is_floating_point() else values)[cut].numpy() for name, values in found.items()}


def to_image(values: np.ndarray, case: Case, outside: float = 0) -> np.ndarray:
    """A map (*grid) of the preprocessed image on the grid of the image as it was read (*shape), in the dtype of `values`.

    The preprocessing backwards: resampled (integers from the nearest voxel, others linearly), put back into the place that
    nnU-Net cropped, axes transposed. Voxels that were cropped away get `outside`.
    """
    from skimage.transform import resize

    whole, noted = np.issubdtype(values.dtype, np.integer), case.properties
    cropped = resize(
        values.astype(np.float64 if whole else np.float32),
        tuple(int(n) for n in noted["shape_after_cropping_and_before_resampling"]),
        order=0 if whole else 1,
        mode="edge",
        anti_aliasing=False,
        preserve_range=True,
    )
    full = np.full(tuple(noted["shape_before_cropping"]), outside, dtype=np.float32)
    full[tuple(slice(low, high) for low, high in noted["bbox_used_for_cropping"])] = cropped
    return full.transpose(case.transpose_backward).astype(values.dtype)


class Output:
    """The output folder: new, empty, or of an earlier inspection, whose own files are removed and no others.

    files : name to one line about it, in the order of writing
    """

    def __init__(self, path: Path):
        self.folder, self.files = open_folder(path, "inspect"), {}
        self._marker = marker_of(self.folder, "inspect")  # holds the names of the files
        with contextlib.suppress(OSError, ValueError, TypeError):  # no marker, or a damaged one
            for name in read_json(self._marker):
                if is_plain_name(name) and (self.folder / name).is_file():  # a name with slashes leads to other folders
                    (self.folder / name).unlink()
        self._mark()

    def add(self, name: str, line: str) -> Path:
        """Where to write a file of this name."""
        self.files[name] = line
        self._mark()
        return self.folder / name

    def add_maps(self, name: str, line: str, channels: Sequence[np.ndarray], case: Case) -> None:
        """Writes `name`.nii.gz, with several channels `name`_0000.nii.gz and so on; each channel is (*shape)."""
        for number, values in enumerate(channels):
            suffix = f"_{number:04d}" if len(channels) > 1 else ""
            write_nifti(values, case.properties, self.add(f"{name}{suffix}.nii.gz", line))

    def _mark(self) -> None:
        write_text(self._marker, json.dumps(list(self.files)) + "\n")
