"""Figures that trainings and `inspect` draw: curves over epochs, and panels of images with labels or maps on them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The palette of Okabe and Ito. Its colours differ in lightness too, so the colour-blind can tell them apart.
VERMILION, YELLOW, SKY_BLUE, PURPLE, GREEN, ORANGE, BLUE = COLOURS = (
    "#D55E00", "#F0E442", "#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#0072B2",
)  # fmt: skip
GREY = "#7F7F7F"
FONT = 9  # points
# Inches of a panel of curves and of its margins. matplotlib's own layouts draw all text several times, in every epoch.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 4.5, 3.0, 0.65, 0.15, 0.35, 0.5
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


@contextmanager
def new_figure(path: str | Path, size: tuple[float, float], dpi: int, layout: str | None = None) -> Iterator:
    """Yields an empty figure of `size` inches, then writes it as PNG. Readers see the old file or the whole new one."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure  # not pyplot, whose global state nnU-Net uses

    path = Path(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    fonts = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize", "legend.title_fontsize"), FONT)
    with style.context("default"), rc_context(fonts):  # nnU-Net's progress.png sets huge fonts for the whole process
        figure = Figure(figsize=size, layout=layout)
        yield figure
        figure.savefig(partial, dpi=dpi, pil_kwargs={"compress_level": 1})
    os.replace(partial, path)


@contextmanager
def warn_if_not_written(log: Callable[[str], None]) -> Iterator[None]:
    """Logs OSError instead of raising it: a failed figure must not end a training."""
    try:
        yield
    except OSError as error:
        log(f"WARNING: a picture was not written: {error}. Training goes on.")


# ---- curves ----


def draw_diagnostics(logging: Mapping[str, Sequence[float]], keys: Sequence[str], filename: str) -> None:
    """Writes a PNG with the curve of each key over epochs. `train_x` and `validation_x` share the panel `x`."""
    panels: dict[str, list[str]] = {}
    for key in keys:
        panels.setdefault(key.removeprefix("train_").removeprefix("validation_"), []).append(key)
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    width, height = WIDTH * columns, HEIGHT * rows
    with new_figure(filename, (width, height), dpi=110) as figure:
        for index, (name, curves) in enumerate(panels.items()):
            row, column = divmod(index, columns)
            left, bottom = (column * WIDTH + LEFT) / width, ((rows - 1 - row) * HEIGHT + BOTTOM) / height
            axes = figure.add_axes((left, bottom, (WIDTH - LEFT - RIGHT) / width, (HEIGHT - BOTTOM - TOP) / height))
            values = [value for key in curves for value in logging[key]]
            for key, colour in zip(curves, (BLUE, VERMILION), strict=False):
                part = key.removesuffix(f"_{name}")
                axes.plot(range(len(logging[key])), logging[key], color=colour, marker="o", markersize=3, label=part)
            if len(curves) > 1 and index == 0:  # the legend is the same in all panels
                axes.legend()
            axes.set_title(TITLES.get(name, name), y=1)  # without y, matplotlib draws all ticks again to find room above
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if min(values, default=0) > 0 and max(values) > 10 * min(values):
                axes.set_yscale("log")
            elif min(values, default=0) >= 0:
                axes.set_ylim(bottom=0, top=1.1 * max(values, default=0) or 1)
            axes.grid(alpha=0.3)


# ---- images ----


@dataclass(frozen=True)
class Panel:
    """An image in grey or colours with labels or a map on it, or a map alone.

    image : (y, x) or (y, x, 3) in [0, 1], or None
    overlay : (y, x, 4) or None, see `coloured`
    values : (y, x) or None
        Drawn with a colour bar from `low` to `high`. On an image, low values let the image show through.
    """

    title: str
    image: np.ndarray | None = None
    overlay: np.ndarray | None = None
    values: np.ndarray | None = None
    cmap: str = "magma"
    low: float = 0.0
    high: float = 1.0
    unit: str = ""


def draw_panels(
    panels: Sequence[Panel | None], columns: int, path: str | Path, caption: str,
    legends: Mapping[str, Mapping[str, str]] | None = None, aspect: float = 1.0,
) -> None:  # fmt: skip
    """Writes one PNG with the panels in rows of `columns`, the legends above and the caption below.

    Parameters
    ----------
    panels : row after row; None leaves a place empty, the first one is not None
    legends : title to (name to colour)
        At most two: the first stands on the left, the second on the right.
    aspect : height of a pixel over its width, in mm
    """
    from matplotlib.patches import Patch

    legends = {title: entries for title, entries in (legends or {}).items() if entries}
    rows, columns = -(-len(panels) // columns), min(columns, len(panels))
    first = panels[0].values if panels[0].image is None else panels[0].image
    ratio = float(np.clip(first.shape[0] * aspect / first.shape[1], 0.35, 2.2))
    side = 2.6 if columns > 3 else 3.0  # inches
    colour_bar = 0.75 if any(panel and panel.values is not None for panel in panels) else 0.0
    width = max((side + colour_bar) * columns + 0.2, 6.0)
    in_a_line = max(2, int(width / 1.4 / max(1, len(legends))))
    legend_lines = max((1 + -(-len(entries) // in_a_line) for entries in legends.values()), default=0)
    text = textwrap.fill(caption, int(width * 13))
    height = (side * ratio + 0.35) * rows + 0.2 * legend_lines + 0.17 * (text.count("\n") + 1) + 0.15
    with new_figure(path, (width, height), dpi=120, layout="constrained") as figure:
        for number, panel in enumerate(panels, 1):
            if panel is not None:
                _draw_panel(figure, figure.add_subplot(rows, columns, number), panel, aspect)
        for place, (title, entries) in zip(("left", "right"), legends.items(), strict=False):
            handles = [Patch(facecolor=c, edgecolor="0.4", linewidth=0.5, label=name) for name, c in entries.items()]
            figure.legend(handles=handles, title=title, loc=f"outside upper {place}", ncols=min(in_a_line, len(handles)),
                          frameon=False, alignment="left", columnspacing=1.2, handlelength=1.4)  # fmt: skip
        figure.supxlabel(text, fontsize=FONT, x=0.02, ha="left")


def _draw_panel(figure, axes, panel: Panel, aspect: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes.set_title(panel.title)
    axes.set(xticks=[], yticks=[])
    shown = {"aspect": aspect, "interpolation": "nearest"}
    if panel.image is not None:
        axes.imshow(panel.image, cmap="gray", vmin=0, vmax=1, **shown)
    if panel.overlay is not None:
        axes.imshow(panel.overlay, **shown)
    if panel.values is not None:
        norm = Normalize(panel.low, panel.high)
        alpha = None if panel.image is None else np.clip(np.asarray(norm(panel.values)) * 1.5, 0, 0.65)
        axes.imshow(panel.values, alpha=alpha, cmap=panel.cmap, norm=norm, **shown)
        figure.colorbar(ScalarMappable(norm, panel.cmap), ax=axes, shrink=0.75, pad=0.02, label=panel.unit)


def label_colours(values: Sequence[int]) -> dict[int, str]:
    """The colour of each label value. Colours repeat after seven."""
    return {value: COLOURS[number % len(COLOURS)] for number, value in enumerate(values)}


def coloured(plane: np.ndarray, colours: Mapping[int, str], alpha: float = 0.65) -> np.ndarray:
    """(y, x) labels to (y, x, 4) translucent colours. Values without a colour are transparent."""
    from matplotlib.colors import to_rgba

    rgba = np.zeros((*plane.shape, 4))
    for value, colour in colours.items():
        rgba[plane == value] = to_rgba(colour, alpha)
    return rgba


def window_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The grey window of an image (C, *spatial): 1st and 99.5th percentile of each channel, (C, 1, 1) each."""
    flat = image.reshape(len(image), -1)
    return tuple(np.percentile(flat, q, axis=1)[:, None, None] for q in (1, 99.5))


def windowed(plane: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(C, y, x) to [0, 1]: (y, x) of the first channel, or (y, x, 3) if there are three."""
    low, high = window
    plane = np.clip((plane - low) / np.maximum(high - low, 1e-6), 0, 1)
    return plane.transpose(1, 2, 0) if len(plane) == 3 else plane[0]
