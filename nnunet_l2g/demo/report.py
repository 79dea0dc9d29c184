"""The demo's report: Dice of the held-out cases as a table and as JSON, and a picture of each case."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import write_json
from nnunet_l2g.phantom import LABELS

# Three colours of Okabe and Ito's palette. They differ in lightness too, for greyscale and for colour-blind readers.
COLOURS = {"left_ventricle": "#D55E00", "myocardium": "#F0E442", "right_ventricle": "#0072B2"}


def write_report(raw: Path, predictions: Path, trainer: str, picture: Path, summary: Path) -> None:
    """Compares the predictions with `raw`/labelsTs: prints the table, and writes the picture and the summary."""
    labels = LABELS["anatomy"]
    cases, scores = {}, pd.DataFrame(index=list(labels))
    for file in sorted((raw / "labelsTs").glob("*.nii.gz")):
        case = file.name.removesuffix(".nii.gz")
        image, reference = read_voxels(raw / "imagesTs" / f"{case}_0000.nii.gz"), read_voxels(file)
        prediction = read_voxels(predictions / file.name)
        cases[case] = (image, reference, prediction)
        scores[case] = [dice(reference == value, prediction == value) for value in labels.values()]
    means = scores.mean(axis=1)  # over the cases that have the structure, as nnU-Net does it
    mean = float(means.mean())
    print(scores.assign(mean=means).to_string(float_format="%.3f", na_rep="-"), f"mean foreground Dice {mean:.3f}", sep="\n")
    draw_picture(cases, scores, f"{trainer}; mean foreground Dice {mean:.2f}", picture)
    values = scores.astype(object).where(scores.notna(), None).to_dict("index")  # JSON has no NaN
    write_json(summary, {"trainer": trainer, "mean_foreground_dice": mean, "dice": values})


def read_voxels(path: Path) -> np.ndarray:
    """(z, y, x)"""
    try:
        return np.asarray(nibabel.load(path).dataobj).T
    except Exception as error:  # nibabel raises many kinds for a file that was not written to its end
        raise UserError(f"{path} cannot be read ({error}); start the demo again with --overwrite") from error


def dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    """2 |R & P| / (|R| + |P|) of two masks. NaN if both are empty."""
    size = reference.sum() + prediction.sum()
    return 2 * (reference & prediction).sum() / size if size else float("nan")


def draw_picture(cases: dict[str, tuple], scores: pd.DataFrame, caption: str, target: Path) -> None:
    """A column for each case: image, reference and prediction of one slice, and the Dice of each structure below.

    cases : name -> image, reference, prediction; (z, y, x) each
    scores : Dice, structures x cases
    """
    labels, colours = LABELS["anatomy"], ListedColormap(list(COLOURS.values()))
    width = max(len(cases), 3)  # the caption needs three columns
    figure, axes = plt.subplots(3, len(cases), figsize=(2.3 * width + 0.5, 8.0), squeeze=False)
    extent = max(max(image.shape[1:]) for image, _, _ in cases.values())  # one field of view for all
    for column, (case, (image, reference, prediction)) in zip(axes.T, cases.items(), strict=True):
        index = middle_slice(reference, len(labels))
        window = {"cmap": "gray", "vmin": np.percentile(image, 1), "vmax": np.percentile(image, 99.5)}
        for axis, overlay in zip(column, (None, reference, prediction), strict=True):
            axis.imshow(image[index], **window)
            if overlay is not None:
                shown = np.ma.masked_equal(overlay[index], 0)
                axis.imshow(shown, cmap=colours, vmin=1, vmax=len(labels), alpha=0.65, interpolation="nearest")
            top, left = ((size - extent) / 2 - 0.5 for size in image.shape[1:])
            axis.set(xticks=[], yticks=[], facecolor="black", xlim=(left, left + extent), ylim=(top + extent, top))
        column[0].set_title(f"{case}, slice {index + 1} of {len(image)}", fontsize=9)
        column[2].set_xlabel("Dice " + "  ".join("-" if np.isnan(v) else f"{v:.2f}" for v in scores[case]), fontsize=9)
    for axis, name in zip(axes[:, 0], ("image", "reference", "prediction"), strict=True):
        axis.set_ylabel(name, fontsize=11)
    patches = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="lower center", ncol=len(patches), frameon=False, bbox_to_anchor=(0.5, 0.05))
    text = f"Held-out phantom cases, middle slice of the heart; {caption}.\nBelow each case: Dice in the legend's order."
    figure.text(0.5, 0.025, text, ha="center", va="center", fontsize=9)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.96, bottom=0.13, wspace=0.04, hspace=0.04)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def middle_slice(reference: np.ndarray, structures: int) -> int:
    """Index of the middle one of the slices that show most structures. reference (z, y, x), labels 1 to `structures`."""
    shown = np.array([len(np.intersect1d(plane, range(1, structures + 1))) for plane in reference])
    best = np.flatnonzero(shown == shown.max())
    return int(best[len(best) // 2])
