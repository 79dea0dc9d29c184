"""Maps of the network's patches, put together to maps of the whole image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from tqdm import tqdm

Look = Callable[[torch.Tensor], dict[str, torch.Tensor]]
STEP = 0.5  # of the patch, as in nnU-Net's prediction


@torch.no_grad()
def tile_maps(data: np.ndarray, patch_size: Sequence[int], look: Look, device: str, title: str) -> dict[str, np.ndarray]:
    """Runs `look` on nnU-Net's sliding window.

    Parameters
    ----------
    data : (C, *grid)
        Preprocessed, three axes. With a patch of two numbers, the slices of the first axis are taken one by one.
    look : (1, C, *patch) -> name to (1, M, *patch)
        Floating-point maps are averaged with nnU-Net's Gaussian weights, high in a patch's middle; integers cannot be
        averaged and are taken from the patch in whose middle a voxel lies most.
    title : of the progress bar

    Returns
    -------
    name to (M, *grid), float32 or int64
    """
    volume = torch.from_numpy(data)
    slices = [volume[:, index] for index in range(volume.shape[1])] if len(patch_size) == 2 else [volume]
    found: list[dict] = []
    with tqdm(total=sum(len(_starts(one, patch_size)) for one in slices), desc=title, leave=False) as bar:
        for one in slices:
            found.append(_tile(one, patch_size, look, device, bar))
    if len(patch_size) == 3:
        return {name: value.numpy() for name, value in found[0].items()}
    return {name: torch.stack([one[name] for one in found], 1).numpy() for name in found[0]}


def _starts(image: torch.Tensor, patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    size = tuple(max(n, p) for n, p in zip(image.shape[1:], patch_size, strict=True))
    return list(itertools.product(*compute_steps_for_sliding_window(size, tuple(patch_size), STEP)))


def _tile(image: torch.Tensor, patch_size: Sequence[int], look: Look, device: str, bar) -> dict[str, torch.Tensor]:
    starts = _starts(image, patch_size)
    padded, inside = pad_nd_image(image, patch_size, "constant", {"value": 0}, True, None)  # as in nnU-Net's prediction
    weight = compute_gaussian(tuple(patch_size), dtype=torch.float32, device=torch.device("cpu"))  # (*patch)
    total = torch.zeros(padded.shape[1:])
    highest = torch.zeros(padded.shape[1:])
    found: dict[str, torch.Tensor] = {}
    for start in starts:
        tile = tuple(slice(a, a + n) for a, n in zip(start, patch_size, strict=True))
        closer = weight > highest[tile]  # (*patch)
        for name, value in look(padded[(slice(None), *tile)][None].to(device)).items():
            value = value[0].cpu()  # (M, *patch)
            value = value.float() if value.is_floating_point() else value
            if name not in found:
                found[name] = value.new_zeros((len(value), *padded.shape[1:]))
            here = found[name][(slice(None), *tile)]
            if value.is_floating_point():
                here += value * weight
            else:
                here.copy_(torch.where(closer, value, here))
        total[tile] += weight
        highest[tile] = torch.maximum(highest[tile], weight)
        bar.update()
    crop = (slice(None), *inside[1:])
    return {name: (value / total if value.is_floating_point() else value)[crop] for name, value in found.items()}


def to_patch(values: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """(B, M, *coarse) repeated up to (B, M, *patch), each voxel from the coarse one it lies in."""
    if tuple(values.shape[2:]) == tuple(patch_size):
        return values
    dtype = values.dtype
    return torch.nn.functional.interpolate(values.double(), tuple(patch_size), mode="nearest").to(dtype)
