"""Draws logged diagnostics over epochs, one panel each, next to nnU-Net's progress.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

# Inches, of a panel and its margins: matplotlib's own layouts draw all text several times, every epoch.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 4.5, 3.0, 0.65, 0.15, 0.35, 0.5
COLOURS = ("#0072B2", "#D55E00")
TITLES = {
    "perplexity": "codes: perplexity",
    "codes_used": "codes in use",
    "alpha": "alpha: weight of the read-out",
    "changed_voxels": "share of voxels that the read-out changes",
    "references_used": "references in use",
    "reference_drift": "references: 1 - cosine to their start",
    "moved_by_image": "references: distance moved by the image",
    "mask_mean": "local feature mask, mean (0: aligned)",
    "domain_accuracy": "domain discriminator: accuracy",
    "alignment_weight": "weight of the alignment",
    "gap_intensity": "gap of intensities, source to target",
    "gap_intensity_translated": "gap of intensities, translated to target",
    "gap_features": "gap of deep features, source to target",
    "gap_features_translated": "gap of deep features, translated to target",
    "confident_share": "teacher: share of confident voxels",
}


def draw_diagnostics(logging: Mapping[str, Sequence[float]], keys: Sequence[str], filename: str) -> None:
    """Writes a PNG with a panel for each of ``keys`` over epochs, `train_x` and `validation_x` in one. Replaces the file in one
    step."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no global state beside nnU-Net's

    panels = _panels(keys)
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    partial = filename + ".partial.png"
    with style.context("default"):  # nnU-Net's progress.png sets huge fonts for the whole process
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows))
        FigureCanvasAgg(figure)
        for index, (name, curves) in enumerate(panels.items()):
            row, column = divmod(index, columns)
            left, bottom = (column * WIDTH + LEFT) / (WIDTH * columns), ((rows - 1 - row) * HEIGHT + BOTTOM) / (HEIGHT * rows)
            size = (WIDTH - LEFT - RIGHT) / (WIDTH * columns), (HEIGHT - BOTTOM - TOP) / (HEIGHT * rows)
            axes = figure.add_axes((left, bottom, *size))
            values = [value for key in curves for value in logging[key]]
            for key, colour in zip(curves, COLOURS, strict=False):
                part = key.removesuffix(f"_{name}")
                axes.plot(range(len(logging[key])), logging[key], color=colour, marker="o", markersize=3, label=part)
            if len(curves) > 1 and index == 0:  # the same in all
                axes.legend()
            axes.set_title(TITLES.get(name, name), y=1)  # else it looks for room above it, which draws all ticks once more
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if min(values, default=0) > 0 and max(values) > 10 * min(values):
                axes.set_yscale("log")
            elif min(values, default=0) >= 0:
                axes.set_ylim(bottom=0, top=1.1 * max(values, default=0) or 1)
            axes.grid(alpha=0.3)
        figure.savefig(partial, dpi=110, pil_kwargs={"compress_level": 1})
    os.replace(partial, filename)


def _panels(keys: Sequence[str]) -> dict[str, list[str]]:
    """Panels by name, each with its keys."""
    panels: dict[str, list[str]] = {}
    for key in keys:
        panels.setdefault(key.removeprefix("train_").removeprefix("validation_"), []).append(key)
    return panels
