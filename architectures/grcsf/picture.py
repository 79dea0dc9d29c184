"""What GRCSF does in an image as panels, and the trainer's picture of one validation patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from nnunet_l2g.training.figure import Panel, coloured, draw_panels, label_colours, window_of, windowed

COLUMNS = 3
RATIOS = (50, 75)  # percent of the tokens that are masked
STYLES = {  # of each map: title, colour map, highest value, unit
    "residual_50": ("residual, 50 % masked", "magma", 4.0, "expected errors"),
    "residual_75": ("residual, 75 % masked", "magma", 4.0, "expected errors"),
    "compensation": ("compensation m (GCU)", "viridis", 2.0, "1 - cosine"),
    "importance": ("importance w (RCU)", "cividis", 1.0, ""),
}


def named_maps(explained: Mapping, channels: int) -> dict:
    """The maps to show, by name, of what GRCSF.explain returned (arrays or tensors). Maps that the network lacks are left out.

    Returns
    -------
    reconstruction_50, reconstruction_75 : (B, C, *spatial), predicted while 50 % or 75 % of the tokens are masked
    residual_50, residual_75 : (B, 1, *spatial), mean over channels of the absolute residual
    compensation : (B, 1, *spatial), m of the Global Compensation Unit at full resolution
    importance : (B, 1, *token grid), w of the Region Compensation Unit at the finest level that has one
    """
    maps = {f"reconstruction_{ratio}": explained[f"mean_{ratio}"] for ratio in RATIOS if f"mean_{ratio}" in explained}
    for ratio in RATIOS:
        if f"map_{ratio}" in explained:  # the image's channels come first in it
            maps[f"residual_{ratio}"] = explained[f"map_{ratio}"][:, channels : channels + 1]
    if "compensation" in explained:
        maps["compensation"] = explained["compensation"]
    if stages := [key for key in explained if key.startswith("importance_")]:
        maps["importance"] = explained[max(stages, key=lambda key: int(key.rpartition("_")[2]))]
    return maps


def map_panels(maps: Mapping[str, np.ndarray], plane: Callable[[np.ndarray], np.ndarray], window) -> list[Panel]:
    """One panel for each map (?, *spatial).

    plane : cuts (*spatial) to the slice (y, x) that is shown
    window : of the preprocessed image, for the reconstructions
    """
    panels = []
    for ratio in RATIOS:
        if f"reconstruction_{ratio}" in maps:
            planes = np.stack([plane(channel) for channel in maps[f"reconstruction_{ratio}"]])
            panels.append(Panel(f"reconstruction, {ratio} % masked", windowed(planes, window)))
    for name, (title, cmap, high, unit) in STYLES.items():
        if name in maps:
            panels.append(Panel(title, values=plane(maps[name][0]), cmap=cmap, high=high, unit=unit))
    return panels


# ---- one validation patch, for the trainer ----


class Patch(NamedTuple):
    """image (C, *patch) float32, reference (*patch) int16 labels, name of the case."""

    image: np.ndarray
    reference: np.ndarray
    case: str


def has_foreground(properties: dict) -> bool:
    """Whether nnU-Net's preprocessing found a labelled voxel that is not to be ignored."""
    return any(len(where) for where in _foreground(properties))


def labelled_patch(dataset, patch_size: Sequence[int]) -> Patch:
    """A patch around a labelled voxel of the first case that has one, else around the centre of the first case.

    The same patch at every call, so that pictures of different epochs can be compared.

    Parameters
    ----------
    dataset : nnU-Net's dataset of preprocessed cases
    patch_size : (2,) or (3,) voxels
        With two numbers the patch lies in one slice of the case's first axis.
    """
    chosen, location = dataset.identifiers[0], None
    for case in dataset.identifiers:
        found = [where for where in _foreground(dataset.load_case(case)[3]) if len(where)]
        if found:
            chosen, where = case, min(found, key=len)  # the rarest class
            location = np.asarray(where[len(where) // 2])[1:]  # without the channel
            break
    image, reference, _, _ = dataset.load_case(chosen)
    image, reference = image[:], reference[:]  # (C, *spatial), (1, *spatial)
    if location is None:
        location = np.array(image.shape[1:]) // 2
    if len(patch_size) == 2:
        image, reference, location = image[:, location[0]], reference[:, location[0]], location[1:]
    box = []
    for place, size, length in zip(location, patch_size, image.shape[1:], strict=True):
        # inside the image, or centred on it where the patch is larger
        start = (length - size) // 2 if size >= length else int(np.clip(place - size // 2, 0, length - size))
        box.append([start, start + size])
    reference = np.maximum(crop_and_pad_nd(reference, box, 0)[0], 0).astype(np.int16)  # (*patch)
    return Patch(crop_and_pad_nd(image, box, 0).astype(np.float32), reference, chosen)


def _foreground(properties: dict) -> list:
    """The voxels of each class, without background and without nnU-Net's entry of all annotated voxels."""
    locations = properties["class_locations"]
    return [where for key, where in locations.items() if key != 0 and not (isinstance(key, tuple) and min(key) < 1)]


def draw_compensation(
    image: np.ndarray, reference: np.ndarray, prediction: np.ndarray, explained: Mapping[str, np.ndarray],
    labels: Mapping[int, str], caption: str, filename: str,
) -> None:  # fmt: skip
    """Writes one PNG of a patch.

    Parameters
    ----------
    image : (C, *patch)
        In 3D the slice of the first axis with the most labelled voxels is shown.
    reference, prediction : (*patch) labels
    explained : name to (?, *spatial)
        What GRCSF.explain returns, for one image.
    labels : label value to name
    caption : which case, which epoch
    """
    areas = (reference > 0).sum((-2, -1))  # of each slice, in 3D
    index = None if reference.ndim == 2 else int(areas.argmax()) if areas.any() else len(areas) // 2

    def plane(values: np.ndarray) -> np.ndarray:
        for axis, size in enumerate(reference.shape):  # values of a coarser grid are repeated
            values = np.repeat(values, size // values.shape[axis], axis)
        return values if index is None else values[index]

    window, colours = window_of(image), label_colours(labels)
    shown = windowed(np.stack([plane(channel) for channel in image]), window)
    maps = named_maps({key: value[None] for key, value in explained.items()}, len(image))
    panels = [Panel("image", shown), *map_panels({key: value[0] for key, value in maps.items()}, plane, window)]
    for title, values in (("reference", reference), ("prediction", prediction)):
        panels.append(Panel(title, shown, coloured(plane(values), colours)))
    draw_panels(panels, COLUMNS, filename, caption, {"labels": {name: colours[value] for value, name in labels.items()}})
