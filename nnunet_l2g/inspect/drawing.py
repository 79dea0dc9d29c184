"""What all figures share: palette, panels with images and overlays, legend above, one caption below."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Okabe and Ito's palette, apart also in greyscale and for the colour-blind
COLOURS = ("#D55E00", "#F0E442", "#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
OTHER = "#7F7F7F"  # what has no colour of its own
DPI = 120
FONT = 9  # points of titles, legend and caption


@dataclass(frozen=True)
class Panel:
    """One picture: the image in grey or colours, with labels or a map on it, or a map alone.

    image : (y, x) or (y, x, 3) in [0, 1], or None
    overlay : (y, x, 4) or None, see `coloured`
    values : (y, x) or None; drawn with `cmap` between `low` and `high` and a colour bar; on an image, low values let it through
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
    rows: Sequence[Sequence[Panel]], path: Path, caption: str, legends: Mapping[str, Mapping[str, str]] | None = None,
    aspect: float = 1.0,
) -> None:  # fmt: skip
    """Writes one PNG, in one step.

    Parameters
    ----------
    legends : title to (name to colour), above the panels, at most two: left and right
    aspect : height of a pixel over its width, in mm
    """

    def draw(figure):
        for number, row in enumerate(rows):
            for column, panel in enumerate(row):
                _draw_panel(figure, figure.add_subplot(len(rows), columns, number * columns + column + 1), panel, aspect)
        for place, (title, entries) in zip(("left", "right"), legends.items(), strict=False):
            _add_legend(figure, place, title, entries, per_line)

    legends = {title: entries for title, entries in (legends or {}).items() if entries}
    columns = max(map(len, rows))
    height, width = _size(rows[0][0])
    ratio = float(np.clip(height * aspect / width, 0.35, 2.2))
    side = 2.6 if columns > 3 else 3.0
    bars = 0.75 if any(panel.values is not None for row in rows for panel in row) else 0.0  # inches that a colour bar takes
    width = max((side + bars) * columns + 0.2, 6.0)
    per_line = max(2, int(width / 1.4 / max(1, len(legends))))
    lines = max((1 + -(-len(entries) // per_line) for entries in legends.values()), default=0)
    size = (width, (side * ratio + 0.35) * len(rows) + 0.2 * lines)
    save_figure(draw, size, path, caption)


def save_figure(draw: Callable, size: tuple[float, float], path: Path, caption: str) -> None:
    """draw(figure) on `size` inches, the caption below in as many lines as it takes; written in one step."""
    from matplotlib import rc_context, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = textwrap.fill(caption, max(40, int(size[0] * 13)))
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    # nnU-Net's progress.png sets huge fonts for the whole process
    with style.context("default"), rc_context({"font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT}):
        figure = Figure(figsize=(size[0], size[1] + 0.17 * (text.count("\n") + 1) + 0.15), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.supxlabel(text, fontsize=FONT, x=0.02, ha="left")
        figure.savefig(partial, dpi=DPI)
    os.replace(partial, path)


def _size(panel: Panel) -> tuple[int, int]:
    shown = panel.values if panel.image is None else panel.image
    return shown.shape[:2]


def _draw_panel(figure, axes, panel: Panel, aspect: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes.set_title(panel.title)
    axes.set(xticks=[], yticks=[])
    if panel.image is not None:
        axes.imshow(panel.image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    if panel.overlay is not None:
        axes.imshow(panel.overlay, aspect=aspect, interpolation="nearest")
    if panel.values is not None:
        norm = Normalize(panel.low, panel.high)
        alpha = None if panel.image is None else np.clip(np.asarray(norm(panel.values)) * 1.5, 0, 0.65)
        drawn = {"cmap": panel.cmap, "norm": norm, "aspect": aspect, "interpolation": "nearest"}
        axes.imshow(panel.values, alpha=alpha, **drawn)
        figure.colorbar(ScalarMappable(norm, panel.cmap), ax=axes, shrink=0.75, pad=0.02, label=panel.unit)


def _add_legend(figure, place: str, title: str, legend: Mapping[str, str], per_line: int) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="0.4", linewidth=0.5, label=name) for name, colour in legend.items()]
    columns = min(per_line, len(patches))
    figure.legend(
        handles=patches, title=title, loc=f"outside upper {place}", ncols=columns, frameon=False, fontsize=FONT,
        title_fontsize=FONT, alignment="left", columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def label_colours(names: Mapping[int, str]) -> dict[int, str]:
    """Label value to colour, in order; the palette repeats after seven."""
    return {value: COLOURS[number % len(COLOURS)] for number, value in enumerate(names)}


def coloured(plane: np.ndarray, colours: Mapping[int, str], alpha: float = 0.65) -> np.ndarray:
    """(y, x) labels to (y, x, 4) translucent colours; values without a colour stay clear."""
    from matplotlib.colors import to_rgba

    rgba = np.zeros((*plane.shape, 4))
    for value, colour in colours.items():
        rgba[plane == value] = to_rgba(colour, alpha)
    return rgba


def window_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1st and 99.5th percentile of each channel of (C, *spatial), (C, 1, 1) each."""
    flat = image.reshape(len(image), -1)
    return tuple(np.percentile(flat, q, axis=1)[:, None, None] for q in (1, 99.5))


def windowed(plane: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(C, y, x) -> (y, x) of the first channel, or (y, x, 3) of three, in [0, 1]."""
    low, high = window
    plane = np.clip((plane - low) / np.maximum(high - low, 1e-6), 0, 1)
    return plane.transpose(1, 2, 0) if len(plane) == 3 else plane[0]
