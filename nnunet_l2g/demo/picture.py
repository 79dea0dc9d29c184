"""The picture: each held-out case in a column; image, reference and prediction in rows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError

# Okabe and Ito's palette: these three differ in lightness too, so they stay apart in greyscale and for the colour-blind
COLOURS = {"left_ventricle": "#D55E00", "myocardium": "#F0E442", "right_ventricle": "#0072B2", "scar": "#CC79A7"}


def draw_picture(
    raw: Path, predictions: Path, scores: dict[str, dict[str, float | None]], mean: float | None, trainer: str, target: Path
) -> None:
    """Draws the middle slice of the heart of every test case into a PNG, written whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    from nnunet_l2g.phantom import LABELS

    labels = LABELS["anatomy"]
    cases = list(next(iter(scores.values())))
    columns = max(len(cases), 3)  # room for the caption
    figure, axes = plt.subplots(3, len(cases), figsize=(2.3 * columns + 0.5, 8.0), squeeze=False)
    images = [_read(raw / "imagesTs" / f"{case}_0000.nii.gz") for case in cases]
    extent = max(max(image.shape[1:]) for image in images)  # one field of view for all, so that rows line up
    for column, case, image in zip(axes.T, cases, images, strict=True):
        reference, prediction = (_read(path / f"{case}.nii.gz") for path in (raw / "labelsTs", predictions))
        index = middle_slice(reference, len(labels))
        window = {"cmap": "gray", "vmin": np.percentile(image, 1), "vmax": np.percentile(image, 99.5)}
        for axis, overlay in zip(column, (None, reference, prediction), strict=True):
            axis.imshow(image[index], **window)
            if overlay is not None:
                axis.imshow(_coloured(overlay[index], labels), interpolation="nearest")
            height, width = image.shape[1:]
            axis.set(xticks=[], yticks=[], facecolor="black")
            axis.set_xlim((width - extent) / 2 - 0.5, (width + extent) / 2 - 0.5)
            axis.set_ylim((height + extent) / 2 - 0.5, (height - extent) / 2 - 0.5)
        column[0].set_title(f"{case}, slice {index + 1} of {len(image)}", fontsize=9)
        values = [scores[name][case] for name in labels]
        column[2].set_xlabel("Dice " + "  ".join("-" if v is None else f"{v:.2f}" for v in values), fontsize=9)
    for axis, name in zip(axes[:, 0], ("image", "reference", "prediction"), strict=True):
        axis.set_ylabel(name, fontsize=11)
    patches = [Patch(color=COLOURS[name], label=name.replace("_", " ")) for name in labels]
    figure.legend(handles=patches, loc="lower center", ncol=len(patches), frameon=False, bbox_to_anchor=(0.5, 0.05))
    score = "" if mean is None else f"; mean foreground Dice {mean:.2f}"
    figure.text(
        0.5,
        0.025,
        f"Held-out phantom cases, middle slice of the heart, segmented by\n{trainer}{score}. Below each "
        "case: Dice of the three structures, in the legend's order.",
        ha="center",
        va="center",
        fontsize=9,
    )
    figure.subplots_adjust(left=0.05, right=0.99, top=0.96, bottom=0.13, wspace=0.04, hspace=0.04)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    os.replace(temporary, target)


def middle_slice(reference: np.ndarray, structures: int) -> int:
    """Index of the middle one of the slices that show the most structures. reference (z, y, x), labels 1, 2, ..."""
    shown = [sum(bool(np.any(plane == value)) for value in range(1, structures + 1)) for plane in reference]
    best = np.flatnonzero(np.array(shown) == max(shown))
    return int(best[len(best) // 2])


def _coloured(plane: np.ndarray, labels: dict[str, int]) -> np.ndarray:
    """(y, x) labels to (y, x, 4) translucent colours."""
    from matplotlib.colors import to_rgba

    rgba = np.zeros((*plane.shape, 4))
    for name, value in labels.items():
        rgba[plane == value] = to_rgba(COLOURS[name], 0.65)
    return rgba


def _read(path: Path) -> np.ndarray:
    import SimpleITK

    try:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"{path} cannot be read ({cause}); start the demo afresh with --overwrite") from error
