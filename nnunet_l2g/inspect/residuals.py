"""Do residual maps stand out in the reference's lesions? Mean inside against mean in a shell around, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt

from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.inspect.drawing import save_figure
from nnunet_l2g.inspect.output import Output

SHELL = 10  # of the finest spacing: how far the shell reaches


def inside_and_around(
    maps: Mapping[str, np.ndarray], reference: np.ndarray, labels: Labels, spacing: Sequence[float]
) -> dict[str, dict]:
    """For each structure: voxels, and for each map (*grid) its mean inside, its mean around, and their ratio.

    Around are unlabelled voxels at most 10 times the finest spacing from the structure, by Euclidean distance. None where the
    structure is absent, or has no such voxel.
    """
    found = {}
    for name, values in labels.structures:
        inside = labels.mask(reference, values)
        found[name] = {"voxels": int(inside.sum())}
        around = np.zeros_like(inside)
        if inside.any():
            around = (distance_transform_edt(~inside, sampling=spacing) <= SHELL * min(spacing)) & (reference == 0)
        for key, residual in maps.items():
            found[name][key] = _compare(residual, inside, around)
    return found


def _compare(residual: np.ndarray, inside: np.ndarray, around: np.ndarray) -> dict[str, float | None]:
    means = [round(float(residual[where].mean()), 6) if where.any() else None for where in (inside, around)]
    ratio = round(means[0] / max(means[1], 1e-8), 4) if None not in means else None
    return dict(zip(("inside", "around", "ratio"), (*means, ratio), strict=True))


def draw_inside_and_around(found: Mapping[str, dict], output: Output) -> None:
    """residual_inside_around.png: two bars for each map and structure, side by side."""
    bars = [
        (name.replace("_", " "), key, values)
        for name, maps in found.items()
        for key, values in maps.items()
        if key != "voxels" and values["ratio"] is not None
    ]
    if not bars:
        return

    def draw(figure):
        axes = figure.add_subplot()
        for offset, key, colour in ((-0.2, "inside", "#D55E00"), (0.2, "around", "#0072B2")):
            heights = [values[key] for _, _, values in bars]
            axes.bar(np.arange(len(bars)) + offset, heights, 0.38, color=colour, edgecolor="0.3", linewidth=0.5, label=key)
        for place, (_, _, values) in enumerate(bars):
            high = max(values["inside"], values["around"])
            axes.annotate(f"ratio {values['ratio']:.2f}", (place, high), (0, 3), textcoords="offset points", ha="center")
        names = [f"{name}\n{key.removeprefix('residual_')} % masked" for name, key, _ in bars]
        axes.set_xticks(range(len(bars)), names)
        axes.set(ylabel="mean absolute residual\n[expected errors]", xlim=(-0.6, len(bars) - 0.4))
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    caption = (
        "Mean absolute residual inside each structure of the reference and in a shell of unlabelled voxels around it "
        f"({SHELL} times the finest voxel spacing); above ratio 1 the structure stands out."
    )
    path = output.add("residual_inside_around.png", "mean residual inside each reference structure and around it")
    save_figure(draw, (max(5.0, 1.6 + 1.15 * len(bars)), 3.0), path, caption)
