"""The picture of GRCSF: what the autoencoder could not reconstruct, what was compensated, and what came out."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

# Okabe and Ito's palette, apart also in greyscale and for the colour-blind
COLOURS = ("#D55E00", "#F0E442", "#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#0072B2")


def draw_compensation(
    image: np.ndarray, reference: np.ndarray, prediction: np.ndarray, explained: Mapping[str, np.ndarray],
    labels: Mapping[int, str], caption: str, filename: str,
) -> None:  # fmt: skip
    """Writes one PNG, in one step; panels whose part the network does not have are left out.

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
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    index = _slice_to_show(reference) if reference.ndim == 3 else None
    window = _window(image)
    panels = [("image", _image(image, index, window), {"cmap": "gray", "vmin": 0, "vmax": 1})]
    for ratio in (50, 75):
        if f"mean_{ratio}" in explained:
            shown = _image(explained[f"mean_{ratio}"], index, window)
            panels.append((f"reconstruction, {ratio} % masked", shown, {"cmap": "gray", "vmin": 0, "vmax": 1}))
    for ratio in (50, 75):
        if f"map_{ratio}" in explained:
            shown = _plane(explained[f"map_{ratio}"], len(image), index)
            panels.append((f"residual, {ratio} %, in expected errors", shown, {"cmap": "magma", "vmin": 0, "vmax": 4}))
    if "compensation" in explained:
        shown = _plane(explained["compensation"], 0, index)
        panels.append(("compensation m (GCU)", shown, {"cmap": "viridis", "vmin": 0, "vmax": 2}))
    for key in sorted(key for key in explained if key.startswith("importance_"))[-1:]:
        shown = _plane(explained[key], 0, index, reference.shape)
        panels.append(("importance w (RCU, full resolution)", shown, {"cmap": "cividis", "vmin": 0, "vmax": 1}))
    panels += [("reference", reference, None), ("prediction", prediction, None)]

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height, width = reference.shape[-2:]
    partial = f"{filename}.partial.png"
    with style.context("default"):  # nnU-Net's progress.png sets huge fonts for the whole process
        figure = Figure(figsize=(4 * columns, (4 * height / width + 0.4) * rows + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        for number, (title, values, colours) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, number)
            if colours is None:
                axes.imshow(panels[0][1], cmap="gray", vmin=0, vmax=1)
                axes.imshow(_coloured(values if index is None else values[index], labels), interpolation="nearest")
            else:
                drawn = axes.imshow(values, **colours)
                if colours["cmap"] != "gray":
                    figure.colorbar(drawn, ax=axes, shrink=0.8)
            axes.set_title(title, fontsize=10)
            axes.set(xticks=[], yticks=[])
        patches = [Patch(color=_colour(number), label=name) for number, name in enumerate(labels.values())]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False, title=caption)
        figure.savefig(partial, dpi=90)
    os.replace(partial, filename)


def _slice_to_show(reference: np.ndarray) -> int:
    return int((reference > 0).sum((1, 2)).argmax()) if (reference > 0).any() else len(reference) // 2


def _window(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1st and 99.5th percentile of each channel, (C, 1, 1) each."""
    flat = image.reshape(len(image), -1)
    return tuple(np.percentile(flat, q, axis=1)[:, None, None] for q in (1, 99.5))


def _image(image: np.ndarray, index: int | None, window) -> np.ndarray:
    """(C, *spatial) -> (y, x) of the first channel, or (y, x, 3) of three."""
    plane = image if index is None else image[:, index]  # (C, y, x)
    low, high = window
    plane = np.clip((plane - low) / np.maximum(high - low, 1e-6), 0, 1)
    return plane.transpose(1, 2, 0) if len(plane) == 3 else plane[0]


def _plane(values: np.ndarray, channel: int, index: int | None, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(?, *spatial) -> (y, x) of one channel; a coarser grid is repeated up to `shape` first."""
    plane = values[channel]
    for axis, size in enumerate(shape or ()):
        plane = np.repeat(plane, size // plane.shape[axis], axis)
    return plane if index is None else plane[index]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _coloured(plane: np.ndarray, labels: Mapping[int, str]) -> np.ndarray:
    """(y, x) labels to (y, x, 4) translucent colours."""
    from matplotlib.colors import to_rgba

    rgba = np.zeros((*plane.shape, 4))
    for number, value in enumerate(labels):
        rgba[plane == value] = to_rgba(_colour(number), 0.65)
    return rgba
