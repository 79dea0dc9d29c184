"""The panels of GRCSF: what the autoencoder could not reconstruct, what was compensated, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nnunet_l2g.inspect.drawing import Panel, coloured, draw_panels, label_colours, window_of, windowed

RATIOS = (50, 75)  # percent of tokens masked
# name of a map: title, colour map, highest value
STYLES = {
    "residual_50": ("residual, 50 % masked", "magma", 4.0, "expected errors"),
    "residual_75": ("residual, 75 % masked", "magma", 4.0, "expected errors"),
    "compensation": ("compensation m (GCU)", "viridis", 2.0, "1 - cosine"),
    "importance": ("importance w (RCU)", "cividis", 1.0, ""),
}
COLUMNS = 3


def named_maps(explained: Mapping, channels: int) -> dict:
    """What GRCSF.explain returned, array or tensor (B, ?, *spatial), as maps with names; only those that the network has.

    reconstruction_50, _75 (B, C, *spatial); residual_50, _75 (B, 1, *spatial), the mean of the absolute residual over channels;
    compensation (B, 1, *spatial); importance (B, 1, *token grid), of the unit at full resolution.
    """
    maps = {f"reconstruction_{ratio}": explained[f"mean_{ratio}"] for ratio in RATIOS if f"mean_{ratio}" in explained}
    for ratio in RATIOS:
        if f"map_{ratio}" in explained:  # the channel behind the image's
            maps[f"residual_{ratio}"] = explained[f"map_{ratio}"][:, channels : channels + 1]
    if "compensation" in explained:
        maps["compensation"] = explained["compensation"]
    if stages := [key for key in explained if key.startswith("importance_")]:
        maps["importance"] = explained[max(stages, key=lambda key: int(key.rpartition("_")[2]))]
    return maps


def map_panels(maps: Mapping[str, np.ndarray], cut: Callable[[np.ndarray], np.ndarray], window) -> list[Panel]:
    """One panel for each map (?, *spatial); `cut` takes (*spatial) to (y, x), `window` is the preprocessed image's."""
    panels = []
    for ratio in RATIOS:
        if f"reconstruction_{ratio}" in maps:
            planes = np.stack([cut(channel) for channel in maps[f"reconstruction_{ratio}"]])
            panels.append(Panel(f"reconstruction, {ratio} % masked", windowed(planes, window)))
    for name, (title, cmap, high, unit) in STYLES.items():
        if name in maps:
            panels.append(Panel(title, values=cut(maps[name][0]), cmap=cmap, high=high, unit=unit))
    return panels


def in_rows(panels: list[Panel]) -> list[list[Panel]]:
    return [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]


def draw_compensation(
    image: np.ndarray, reference: np.ndarray, prediction: np.ndarray, explained: Mapping[str, np.ndarray],
    labels: Mapping[int, str], caption: str, filename: str,
) -> None:  # fmt: skip
    """Writes one PNG of a patch, in one step; panels whose part the network does not have are left out.

    Parameters
    ----------
    image : (C, *patch)
        In 3D the slice of the first axis with the most labelled voxels is shown. Three channels are shown as colours.
    reference, prediction : (*patch) labels
    explained : mapping of str to (?, *spatial)
        What GRCSF.explain returns, for one image.
    labels : mapping of label to name
    caption : str
        Below the panels: which case, which epoch.
    """
    index = _slice_to_show(reference) if reference.ndim == 3 else None

    def cut(values: np.ndarray) -> np.ndarray:
        for axis, size in enumerate(reference.shape):  # a coarser grid is repeated
            values = np.repeat(values, size // values.shape[axis], axis)
        return values if index is None else values[index]

    window, colours = window_of(image), label_colours(labels)
    shown = windowed(np.stack([cut(channel) for channel in image]), window)
    maps = named_maps({key: value[None] for key, value in explained.items()}, len(image))
    panels = [Panel("image", shown), *map_panels({key: value[0] for key, value in maps.items()}, cut, window)]
    for title, values in (("reference", reference), ("prediction", prediction)):
        panels.append(Panel(title, shown, coloured(cut(values), colours)))
    legend = {name: colours[value] for value, name in labels.items()}
    draw_panels(in_rows(panels), Path(filename), caption, {"labels": legend})


def _slice_to_show(reference: np.ndarray) -> int:
    return int((reference > 0).sum((1, 2)).argmax()) if (reference > 0).any() else len(reference) // 2
