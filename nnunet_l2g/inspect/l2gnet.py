"""What L2GNet's references stand for in an image: parts of each structure, and where each reference is most at home."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_l2g.inspect.case import Case
from nnunet_l2g.inspect.drawing import COLOURS, Panel, coloured, draw_panels
from nnunet_l2g.inspect.geometry import write_map
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.inspect.output import Output
from nnunet_l2g.inspect.tiles import tile_maps, to_patch
from nnunet_l2g.inspect.view import View

STRUCTURES = 5  # in pictures, the largest ones
SLICES = 3


def inspect_l2gnet(model: Model, case: Case, view: View, device: str, output: Output) -> dict:
    """references.png, reference_patches.png, references.nii.gz (for each region, where there are regions), and numbers.

    Returns
    -------
    alpha, level, per_class, changed_voxels (share of the image's voxels whose label the read-out changes), and by structure:
    own (share of its voxels whose nearest reference is of the structure) and shares (of its voxels, by nearest reference)
    """
    network = model.network.to(device)
    found: dict = {"level": network.level}
    if network.alpha is not None:
        found["alpha"] = float(network.alpha.detach())
    if not hasattr(network.l2g, "references"):
        return found | {"note": "this ablation has a head in the place of references: nothing but the segmentation to show"}
    sets, classes, per_class, _ = network.l2g.references.shape

    def look(x: torch.Tensor) -> dict[str, torch.Tensor]:
        explained = network.explain(x)
        cosine, nearest = explained["cosines"].unflatten(1, (sets, -1)).max(2)  # (1, S, *spatial_level)
        changed = explained["without"].argmax(1) != explained["logits"].argmax(1)
        if network.regions:
            changed = ((explained["without"] > 0) != (explained["logits"] > 0)).any(1)
        return {
            "nearest": to_patch(nearest.short(), model.patch_size),
            "cosine": to_patch(cosine.float(), model.patch_size),
            "changed": changed[:, None].float(),
        }

    maps = tile_maps(case.data, model.patch_size, look, device, "references")
    found |= {"per_class": per_class, "structures": {}}
    if network.alpha is not None:
        found["changed_voxels"] = float(maps["changed"].mean())
    shown, of = (view.prediction, "prediction") if case.reference is None else (case.reference, "reference")
    nearest = [view.original(values.astype(np.int16) + np.int16(1)) - 1 for values in maps["nearest"]]  # -1: cropped away
    cosine = [view.original(values) for values in maps["cosine"]]
    for number, values in enumerate(nearest):
        name = f"references_{number}.nii.gz" if sets > 1 else "references.nii.gz"
        write_map(
            values + np.int16(1), case.properties, output.add(name, f"nearest reference: class x {per_class} + number + 1")
        )
    structures = []  # name, its voxels, number of its references from 0 on (-1 elsewhere), cosines
    for number, (value, name) in enumerate(view.names.items()):
        inside = shown == value
        which, first = (number, per_class) if network.regions else (0, value * per_class)
        if first >= classes * per_class or not inside.any():
            continue
        part = np.where((nearest[which] >= first) & (nearest[which] < first + per_class), nearest[which] - first, -1)
        counts = np.bincount(part[inside] + 1, minlength=per_class + 1) / inside.sum()
        found["structures"][name] = {
            "own": round(float(1 - counts[0]), 4),
            "shares": [round(float(share), 4) for share in counts[1:]],
        }
        structures.append((name, inside, part, cosine[which]))
    structures = sorted(structures, key=lambda structure: -structure[1].sum())[:STRUCTURES]
    if structures:
        _draw_parts(case, view, structures, per_class, of, output)
        _draw_patches(case, view, structures, per_class, output)
    return found


def _draw_parts(case: Case, view: View, structures: list, per_class: int, of: str, output: Output) -> None:
    """One row for each structure: three slices through it, its voxels in the colour of their nearest reference."""
    colours = {m: COLOURS[m % len(COLOURS)] for m in range(per_class)}
    rows = []
    for name, inside, part, _ in structures:
        where = np.flatnonzero(inside.any(tuple(axis for axis in range(3) if axis != case.slice_axis)))
        slices = sorted({int(index) for index in where[np.linspace(0, len(where) - 1, SLICES + 2).round().astype(int)[1:-1]]})
        rows.append([
            Panel(f"{name}, {view.slice_name(index)}" if view.slices > 1 else name, view.image(index),
                  coloured(view.plane(np.where(inside, part, -1), index), colours))
            for index in slices
        ])  # fmt: skip
    caption = (
        f"Each structure's voxels (by the {of}) of case {case.name} in the colour of the reference of that structure that is "
        "nearest. Voxels without colour are nearest to a reference of another class. Numbers name references and have no order."
    )
    path = output.add("references.png", "which reference of its structure each voxel is nearest to")
    draw_panels(rows, path, caption, {"reference": {str(m + 1): colour for m, colour in colours.items()}}, view.aspect)


def _draw_patches(case: Case, view: View, structures: list, per_class: int, output: Output) -> None:
    """One row for each structure, one column for each of its references: the image around its most typical voxel."""
    from matplotlib.colors import to_rgba

    rows = []
    for name, _, part, cosine in structures:
        rows.append([])
        for m in range(per_class):
            values = np.where(part == m, cosine, -1)
            index = int(np.unravel_index(values.argmax(), values.shape)[case.slice_axis])
            image = view.image(index)
            if values.max() <= -1:
                rows[-1].append(Panel(f"{name} {m + 1}: none", np.zeros(image.shape)))
                continue
            y, x = np.unravel_index(view.plane(values, index).argmax(), image.shape[:2])
            mark = np.zeros((*image.shape[:2], 4))
            mark[y, x] = to_rgba(COLOURS[m % len(COLOURS)])
            title = f"{name} {m + 1}: {values.max():.2f}"
            rows[-1].append(Panel(title, _around(image, y, x), _around(mark, y, x)))
    caption = (
        f"The most typical place of each reference in case {case.name}: the coloured voxel is the nearest to it, of those that "
        "have no nearer one; the number is the cosine."
    )
    path = output.add("reference_patches.png", "the most typical place of each reference")
    draw_panels(rows, path, caption, aspect=view.aspect)


def _around(image: np.ndarray, y: int, x: int) -> np.ndarray:
    """A square of an image (y, x) or (y, x, 3) around a pixel, a third of its longer side wide; black beyond it."""
    half = max(image.shape[0], image.shape[1]) // 6
    padding = ((half, half), (half, half), (0, 0))[: image.ndim]
    return np.pad(image, padding)[y : y + 2 * half + 1, x : x + 2 * half + 1]
