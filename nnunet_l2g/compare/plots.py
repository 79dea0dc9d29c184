"""The report's figures: differences with a dot for each run, and training curves."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from nnunet_l2g.compare.tables import Comparison
from nnunet_l2g.compare.text import structure_title

# Okabe and Ito's palette without its yellow, which is not seen on white; markers tell the methods apart without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
DPI = 150
DIFFERENCES = ("dice", "nsd", "hd95", "assd", "lesion_f1")
CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "pseudo_dice": "pseudo Dice (patches)"}


@dataclass(frozen=True)
class Picture:
    """name : of the file, without ending; png : its content"""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def width(self) -> int:
        """In CSS pixels; all pictures have one font size then."""
        return round(int.from_bytes(self.png[16:20], "big") / DPI * 86)


def draw_all(comparison: Comparison) -> list[Picture]:
    from matplotlib import style

    with style.context("default"):  # nnU-Net's import sets huge fonts
        pictures = [draw_differences(comparison)]
        if any(run.curves for run in comparison.inputs.runs):
            pictures.append(draw_curves(comparison))
    return pictures


def colour_and_marker(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def draw_differences(comparison: Comparison) -> Picture:
    """Mean paired difference with its interval and a dot for each run; one panel a score, one line a structure."""
    baseline, *others = comparison.methods
    names, rows = [name for name in DIFFERENCES if name in comparison.shown], comparison.rows
    lines = -(-len(names) // 2)
    height = lines * (1.0 + 0.3 * len(rows) * max(1, 0.75 * len(others))) + 0.35
    figure, axes = _figure(lines, 2, (8.4, height), sharey=True)
    for panel, name in zip(axes.flat, names, strict=False):
        score = comparison.shown[name]
        table = comparison.paired[comparison.paired["score"] == name].set_index(["method", "structure"])
        runs = comparison.runs[comparison.runs["score"] == name].set_index(["method", "structure", "of"])["mean"]
        panel.axvline(0, color="0.4", linewidth=1)
        for index, method in enumerate(others):
            colour, marker = colour_and_marker(index + 1)
            offset = (index - (len(others) - 1) / 2) * 0.7 / max(len(others), 2)
            for line, structure in enumerate(rows):
                values, y = table.loc[(method, structure)], line + offset
                mine, theirs = (runs.loc[[(method, structure, of)]] - values["baseline_mean"] for of in (method, baseline))
                if len(theirs) > 1 and index == 0:
                    label = f"{baseline}, its runs" if line == 0 else None
                    panel.plot(theirs, [y - 0.22] * len(theirs), ".", color="0.4", fillstyle="none", markersize=7, label=label)
                if len(mine) > 1:
                    panel.plot(mine, [y - 0.22] * len(mine), ".", color=colour, alpha=0.5, markersize=7)
                panel.plot([values["low"], values["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
                label = method if line == 0 else None
                panel.plot(values["difference"], y, marker, color=colour, markersize=6, label=label)
        panel.set_yticks(range(len(rows)), [structure_title(structure) for structure in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        better = "right" if score.higher_is_better else "left"
        panel.set_xlabel(f"difference of {score.label}\n({better} is better)")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="x", alpha=0.3)
    for panel in axes.flat[len(names) :]:
        panel.axis("off")
    caption = f"Mean difference to {baseline} (marker); 0 is no difference."
    if comparison.paired["p"].notna().any():
        caption += " Bar: 95 % interval over runs and cases."
    if comparison.several_runs:
        caption += f" Dots: each run's mean minus the mean of {baseline}; hollow dots are runs of {baseline} itself."
    return Picture("differences", "Differences by structure", caption, _png(figure, axes))


def draw_curves(comparison: Comparison) -> Picture:
    """Losses and pseudo Dice over epochs: a thin line for each run and fold, a thick line for their mean."""
    figure, axes = _figure(1, 3, (12.0, 3.6))
    for panel, (name, label) in zip(axes.flat, CURVES.items(), strict=True):
        for index, method in enumerate(comparison.inputs.methods):
            colour, marker = colour_and_marker(index)
            curves = [np.array(getattr(curve, name)) for run in method.runs for curve in run.curves.values() if curve.epochs]
            if not curves:
                continue
            for values in curves if len(curves) > 1 else []:
                panel.plot(np.arange(len(values)) + 1, values, color=colour, linewidth=0.7, alpha=0.4)
            length = min(map(len, curves))
            epochs, mean = np.arange(length) + 1, np.mean([values[:length] for values in curves], axis=0)
            every = max(1, length // 8)
            panel.plot(epochs, mean, marker, color=colour, linestyle="-", linewidth=2, markevery=every, label=method.name)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    caption = (
        "nnU-Net's own curves. Pseudo Dice is computed on random patches during training and is no result; the loss holds "
        "segmentation terms and whatever a trainer adds to them. Thin lines are single runs and folds, thick lines their mean."
    )
    return Picture("curves", "Training curves", caption, _png(figure, axes))


def _figure(rows: int, columns: int, size: tuple[float, float], sharey: bool = False):
    from matplotlib.figure import Figure  # no pyplot: no global state

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _png(figure, axes) -> bytes:
    """The figure with the first panel's legend below it, in as many columns as fit."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fit = int(figure.get_size_inches()[0] * 11 // (max(map(len, labels)) + 6))  # about 11 characters in an inch
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), fit)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
