"""The report's figures: each a PNG with a title and a caption that can stand alone."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np

from nnunet_l2g.compare.comparison import Comparison
from nnunet_l2g.compare.tables import MEAN
from nnunet_l2g.compare.text import title
from nnunet_l2g.evaluation.shifts import STRENGTHS, TITLES

# Okabe and Ito's palette without its yellow, which vanishes on white; markers tell the methods apart without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
DPI = 150
DIFFERENCES = ("dice", "nsd", "hd95", "assd", "lesion_f1")


@dataclass(frozen=True)
class Picture:
    """name : of the file, without ending; png : its content; width : CSS pixels at which all pictures have one font size"""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def width(self) -> int:
        return round(int.from_bytes(self.png[16:20], "big") / DPI * 86)


def draw_all(comparison: Comparison) -> list[Picture]:
    """Every figure for which there is something to show."""
    from matplotlib import style

    pictures = []
    with style.context("default"):  # nnU-Net's import sets huge fonts
        for draw in (draw_differences, draw_scatter, draw_shift, draw_cost, draw_curves):
            if (picture := draw(comparison)) is not None:
                pictures.append(picture)
    return pictures


def colour_and_marker(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def draw_differences(comparison: Comparison) -> Picture:
    """Mean paired difference with its interval and a dot for each run, one panel a score, one line a structure."""
    baseline = comparison.methods[0]
    names = [name for name in DIFFERENCES if name in comparison.shown]
    columns = 2 if len(names) == 4 else min(3, len(names))
    lines = -(-len(names) // columns)
    rows, others = comparison.rows, comparison.methods[1:]
    height = lines * (1.0 + 0.3 * len(rows) * max(1, 0.75 * len(others))) + 0.35
    figure, axes = _figure(lines, columns, (3.6 * columns + 1.2, height), sharey=True)
    for panel, name in zip(axes.flat, names, strict=False):
        score = comparison.shown[name]
        table = comparison.paired[comparison.paired["score"] == name].set_index(["method", "structure"])
        runs = comparison.runs[comparison.runs["score"] == name].set_index(["method", "structure", "of"])["mean"]
        panel.axvline(0, color="0.4", linewidth=1)
        for index, method in enumerate(others):
            colour, marker = colour_and_marker(index + 1)
            shift = (index - (len(others) - 1) / 2) * 0.7 / max(len(others), 2)
            for line, structure in enumerate(rows):
                values = table.loc[(method, structure)]
                for side, look in (
                    (baseline, {"color": "0.4", "fillstyle": "none"}),
                    (method, {"color": colour, "alpha": 0.5}),
                ):
                    dots = runs.loc[[(method, structure, side)]] - values["baseline_mean"]
                    if len(dots) > 1 and (side == method or index == 0):
                        label = f"{baseline}, its runs" if side == baseline and line == 0 else None
                        above = line + shift - 0.22
                        panel.plot(dots, [above] * len(dots), ".", markersize=7, label=label, linestyle="none", **look)
                panel.plot(
                    [values["low"], values["high"]], [line + shift] * 2, color=colour, linewidth=2, solid_capstyle="butt"
                )
                label = method if line == 0 else None
                panel.plot(values["difference"], line + shift, marker, color=colour, markersize=6, label=label)
        panel.set_yticks(range(len(rows)), [title(structure) for structure in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        better = "right" if score.higher_is_better else "left"
        panel.set_xlabel(f"difference of {score.label}\n({better} is better)")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="x", alpha=0.3)
    for panel in axes.flat[len(names) :]:
        panel.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    _legend(figure, handles, labels)
    caption = f"Mean difference to {baseline} (marker); 0 is no difference."
    if comparison.paired["p"].notna().any():
        caption += " Bar: 95 % interval over runs and cases."
    if any(len(method.runs) > 1 for method in comparison.inputs.methods):
        caption += f" Dots: each run's mean less the mean of {baseline}; hollow dots are runs of {baseline} itself."
    return Picture("differences", "Differences by structure", caption, _png(figure))


def draw_scatter(comparison: Comparison) -> Picture:
    """Dice of each case and structure: the baseline's along x, the other's along y."""
    from matplotlib.lines import Line2D

    others = comparison.methods[1:]
    columns = min(3, len(others))
    lines = -(-len(others) // columns)
    figure, axes = _figure(lines, columns, (4.0 * columns + 0.4, 4.1 * lines + 0.5))
    wide = comparison.cases.pivot_table(index=["structure", "case"], columns="method", values="dice", dropna=False)
    lowest = np.nanmin(wide.to_numpy(float)) if wide.notna().to_numpy().any() else 0.0
    low = max(0.0, float(lowest) - 0.05) if np.isfinite(lowest) else 0.0
    span = max(1.0 - low, 0.05)
    structures = comparison.inputs.labels.names
    for panel, method in zip(axes.flat, others, strict=False):
        panel.plot([0, 1], [0, 1], color="0.4", linewidth=1)
        for index, structure in enumerate(structures):
            colour, marker = colour_and_marker(index)
            values = wide.loc[structure]
            panel.plot(
                values[comparison.methods[0]],
                values[method],
                marker,
                color=colour,
                markersize=5,
                alpha=0.7,
                markeredgewidth=0,
                linestyle="none",
                clip_on=False,
            )
        limits = (1 - span - 0.02 * span, 1 + 0.02 * span)
        panel.set(
            xlim=limits,
            ylim=limits,
            aspect="equal",
            xlabel=f"Dice of {_wrapped(comparison.methods[0])}",
            ylabel=f"Dice of {_wrapped(method)}",
        )
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(others) :]:
        panel.axis("off")
    looks = [colour_and_marker(index) for index in range(len(structures))]
    handles = [Line2D([], [], color=c, marker=m, linestyle="none") for c, m in looks]
    _legend(figure, handles, [title(structure) for structure in structures])
    caption = (
        "Dice of every case (mean of its runs), one point for each structure: above the diagonal the method is better, "
        "below it the baseline."
    )
    return Picture("scatter", "Case by case against the baseline", caption, _png(figure))


def draw_shift(comparison: Comparison) -> Picture | None:
    """Mean Dice over the strength of each perturbation, the unperturbed at the left end; None if there are none."""
    if comparison.shift is None:
        return None
    summary = comparison.summary[
        (comparison.summary["score"] == "dice") & (comparison.summary["structure"] == comparison.rows[-1])
    ]
    plain = summary.set_index("method")["mean"]
    figure, axes = _figure(1, len(STRENGTHS), (2.6 * len(STRENGTHS), 3.4), sharey=True)
    for panel, (kind, strengths) in zip(axes.flat, STRENGTHS.items(), strict=True):
        for index, method in enumerate(comparison.shift["method"].unique()):
            colour, marker = colour_and_marker(index)
            table = comparison.shift[(comparison.shift["kind"] == kind) & (comparison.shift["method"] == method)]
            dice = [plain[method], *table["dice"]]
            panel.plot(range(len(dice)), dice, color=colour, marker=marker, label=method)
        panel.set_xticks(range(len(strengths) + 1), ["none", *(f"{value:g}" for value in strengths)])
        panel.set_xlabel(TITLES[kind].replace(": ", "\n"))
        panel.grid(alpha=0.3)
    axes.flat[0].set_ylabel(
        "mean foreground Dice" if comparison.rows[-1] == MEAN else f"mean Dice of {title(comparison.rows[-1])}"
    )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    _legend(figure, handles, labels)
    caption = (
        "Dice on perturbed validation images: a flat line generalises to this change. The strengths are steps, not a scale; "
        "the Dice axis does not begin at 0."
    )
    return Picture("shift", "Perturbed images", caption, _png(figure))


def draw_curves(comparison: Comparison) -> Picture | None:
    """Losses and pseudo Dice over epochs, one thin line a fold and a thick one for their mean; None without logs."""
    methods = [m for m in comparison.inputs.methods if any(curve.epochs for run in m.runs for curve in run.curves.values())]
    if not methods:
        return None
    panels = {"train_loss": "training loss", "val_loss": "validation loss", "pseudo_dice": "pseudo Dice (patches)"}
    figure, axes = _figure(1, 3, (12.0, 3.6))
    for panel, (name, label) in zip(axes.flat, panels.items(), strict=True):
        for method in methods:
            colour, marker = colour_and_marker(comparison.methods.index(method.name))
            curves = [curve for run in method.runs for curve in run.curves.values()]
            folds = [np.array(values, float) for curve in curves if (values := getattr(curve, name))]
            if not folds:
                continue
            for values in folds if len(folds) > 1 else []:
                panel.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=0.7, alpha=0.4)
            length = min(len(values) for values in folds)
            mean = np.mean([values[:length] for values in folds], axis=0)
            panel.plot(
                np.arange(1, length + 1),
                mean,
                color=colour,
                linewidth=2,
                label=method.name,
                marker=marker,
                markevery=max(1, length // 8),
                markersize=5,
            )
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    _legend(figure, handles, labels)
    several = any(len(method.runs) > 1 or len(method.runs[0].curves) > 1 for method in methods)
    caption = (
        "nnU-Net's own curves. Pseudo Dice is computed on random patches while training and is no result; the loss holds "
        "segmentation terms and whatever a trainer adds to them."
        + (" Thin lines are single trainings (runs and folds), thick lines their mean." if several else "")
    )
    return Picture("curves", "Training curves", caption, _png(figure))


def draw_cost(comparison: Comparison) -> Picture | None:
    """Mean Dice over parameters and over seconds an epoch or a case, whatever is known; None if nothing is."""
    labels = {
        "parameters": "parameters [million]",
        "seconds_per_epoch": "seconds per epoch",
        "gflops": "GFLOPs per patch",
        "seconds_per_case": "inference seconds per case",
    }
    known = [name for name in labels if name in comparison.cost and comparison.cost[name].notna().all()]
    if not known:
        return None
    row = MEAN if MEAN in comparison.rows else comparison.rows[0]
    summary = comparison.summary
    quality = summary[(summary["score"] == "dice") & (summary["structure"] == row)].set_index("method")["mean"]
    cost = comparison.cost.set_index("method")
    runs = comparison.runs[(comparison.runs["score"] == "dice") & (comparison.runs["structure"] == row)]
    figure, axes = _figure(1, len(known), (3.6 * len(known) + 0.6, 3.6), sharey=True)
    for panel, name in zip(axes.flat, known, strict=True):
        for index, method in enumerate(cost.index):
            colour, marker = colour_and_marker(index)
            value = cost.loc[method, name] / (1e6 if name == "parameters" else 1)
            panel.plot(value, quality[method], marker, color=colour, markersize=9, linestyle="none", label=method)
            dots = runs[runs["of"] == method].drop_duplicates("run")["mean"]
            if len(dots) > 1:
                panel.plot([value] * len(dots), dots, ".", color="0.2", markersize=5)
        panel.set_xlabel(labels[name])
        panel.set_xlim(left=0)
        panel.margins(x=0.15, y=0.25)
        panel.set_xlim(0, panel.get_xlim()[1] * 1.1)
        panel.grid(alpha=0.3)
    axes.flat[0].set_ylabel("mean foreground Dice" if row == MEAN else f"mean Dice of {title(row)}")
    handles, texts = axes.flat[0].get_legend_handles_labels()
    _legend(figure, handles, texts)
    caption = "Quality over cost: up and left is better. The Dice axis does not begin at 0."
    if any(len(method.runs) > 1 for method in comparison.inputs.methods):
        caption += " Small dots are runs."
    return Picture("cost", "Cost against quality", caption, _png(figure))


def _figure(rows: int, columns: int, size: tuple[float, float], sharey: bool = False):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no global state

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _wrapped(name: str, width: int = 30) -> str:
    """A long trainer's name on several lines, broken behind underscores or spaces."""
    lines = [""]
    for piece in re.findall(r"[^_ ]+[_ ]?|[_ ]", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _legend(figure, handles: list, labels: list[str]) -> None:
    widest = max((len(label) for label in labels), default=1)
    room = figure.get_size_inches()[0] * 11  # characters that fit side by side
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), int(room // (widest + 6)))), frameon=False
    )


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
