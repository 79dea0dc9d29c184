"""Draws logged diagnostics over epochs, one panel each, next to nnU-Net's progress.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

TITLES = {
    "perplexity": "codes: perplexity",
    "codes_used": "codes in use",
    "kept_variance": "plan: Var(o) / Var(q), 0 is flat",
    "tokens_per_reference": "plan: effective tokens per reference",
    "marginal_error": "plan: largest relative marginal error",
    "duplicate_references": "duplicate references (cosine > 0.95)",
    "reference_drift": "references: 1 - cosine to their start",
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
    """Writes a PNG with one panel for each of ``keys`` over epochs. Replaces the file in one step."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no global state beside nnU-Net's

    columns, rows = min(3, len(keys)), -(-len(keys) // 3)
    partial = filename + ".partial.png"
    with style.context("default"):  # nnU-Net's progress.png sets huge fonts for the whole process
        figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for index, key in enumerate(keys):
            axes = figure.add_subplot(rows, columns, index + 1)
            values = list(logging[key])
            axes.plot(range(len(values)), values, color="#0072B2", marker="o", markersize=3)
            axes.set(title=_title(key), xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if min(values, default=0) > 0 and max(values) > 10 * min(values):
                axes.set_yscale("log")
            elif min(values, default=0) >= 0:
                axes.set_ylim(bottom=0, top=1.1 * max(values, default=0) or 1)
            axes.grid(alpha=0.3)
        figure.savefig(partial, dpi=110)
    os.replace(partial, filename)


def _title(key: str) -> str:
    """`level-2_kept_variance` reads as its panel's title and the level."""
    level, _, name = key.partition("_") if key.startswith("level") else ("", "", key)
    return f"{TITLES.get(name, name)} {level}".strip()
