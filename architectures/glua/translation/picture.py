"""The picture of the translation: are shapes where they were, and does it look like the target?"""

from __future__ import annotations

import os

import numpy as np
import torch

from nnunet_l2g.architectures.glua.translation.translator import Translator

ROWS, STYLES = 2, 3  # images of each domain, styles each is shown in


@torch.no_grad()
def draw_translation(translator: Translator, source: torch.Tensor, target: torch.Tensor, caption: str, filename: str) -> None:
    """Writes one PNG, in one step: source images in target styles and back again, and target images likewise.

    Parameters
    ----------
    source, target : (N, C, H, W)
        Slices; of each domain those with the most contrast are shown. Three channels are shown as colours.
    caption : str
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    source, target = _choose(source), _choose(target)
    windows = {"source": _window(source), "target": _window(target)}
    source_styles = translator.encode_style(_patches(translator, source), "source")
    blocks = [
        _panels(translator, source, translator.target_styles, source_styles, ("source", "target")),
        _panels(translator, target, source_styles, translator.encode_style(_patches(translator, target), "target"),
                ("target", "source")),
    ]  # fmt: skip
    columns = max(len(row) for block in blocks for row in block)
    rows = sum(len(block) for block in blocks)
    height, width = source.shape[-2:]
    partial = f"{filename}.partial.png"
    with style.context("default"):  # nnU-Net's progress.png sets huge fonts for the whole process
        figure = Figure(figsize=(2.6 * columns, (2.6 * height / width + 0.35) * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"Translation, {caption}", fontsize=11)
        for number, row in enumerate(row for block in blocks for row in block):
            for column, (title, image, domain) in enumerate(row):
                axes = figure.add_subplot(rows, columns, number * columns + column + 1)
                axes.imshow(_shown(image, windows[domain]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(title, fontsize=9)
                axes.set(xticks=[], yticks=[])
        figure.savefig(partial, dpi=90)
    os.replace(partial, filename)


def _panels(translator: Translator, images: torch.Tensor, styles: torch.Tensor, own: torch.Tensor, domains) -> list[list]:
    """Rows of (title, (C, H, W), domain whose window it is shown in): the image, its translations, and the first one back."""
    here, there = domains
    patches = _patches(translator, images)
    shown = styles[torch.arange(STYLES) % len(styles)]
    there_of, here_of = translator.translate, translator.translate_back
    if here == "target":
        there_of, here_of = here_of, there_of
    translated = [there_of(patches, one.expand(len(patches), -1)) for one in shown]
    back = here_of(translated[0], own)
    rows = []
    for index in range(len(images)):
        row = [(f"{here} image", images[index], here)]
        row += [(f"as {there}, style {n}", _plane(t[index]), there) for n, t in enumerate(translated, 1)]
        rows.append([*row, (f"style 1 back to {here}", _plane(back[index]), here)])
    return rows


def _patches(translator: Translator, slices: torch.Tensor) -> torch.Tensor:
    return slices if translator.dims == 2 else slices[:, :, None]


def _plane(image: torch.Tensor) -> torch.Tensor:
    """(C, [1,] H, W) -> (C, H, W)."""
    return image if image.dim() == 3 else image[:, 0]


def _choose(slices: torch.Tensor) -> torch.Tensor:
    """Evenly from the half with the most contrast: the first and last slices of a patch are often empty."""
    order = slices.flatten(1).std(1).argsort(descending=True)[: max(ROWS, len(slices) // 2)]
    places = torch.linspace(0, len(order) - 1, min(ROWS, len(order))).round().long()
    return slices[order.sort().values[places.to(order.device)]]


def _window(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """1st and 99.5th percentile of each channel of real images, (C, 1, 1) each: translations are shown in the same."""
    flat = images.transpose(0, 1).flatten(1).float().cpu().numpy()
    return tuple(np.percentile(flat, q, axis=1)[:, None, None] for q in (1, 99.5))


def _shown(image: torch.Tensor, window) -> np.ndarray:
    low, high = window
    plane = np.clip((image.float().cpu().numpy() - low) / np.maximum(high - low, 1e-6), 0, 1)  # (C, H, W)
    return plane.transpose(1, 2, 0) if len(plane) == 3 else plane[0]
