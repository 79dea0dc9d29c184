"""L2GNet: which part of its structure each reference stands for in an image."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_l2g.inspect.case import Case, Slices, evenly
from nnunet_l2g.inspect.maps import Output, map_image, to_image
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.training.figure import Panel, coloured, draw_panels, label_colours

STRUCTURES = 5  # in the picture, the largest ones
SLICES = 3


def inspect_l2gnet(model: Model, case: Case, slices: Slices, device: str, output: Output) -> dict:
    """Writes references.nii.gz (one for each region, if there are regions) and references.png.

    Returns
    -------
    level, per_class, alpha : of the decoder, where the references stand; M; weight of the read-out
    structures : the share of a structure's voxels that are nearest to each of its references
    note : if the network has no references
    """
    network = model.network.to(device)
    found: dict = {"level": network.level}
    if network.alpha is not None:
        found["alpha"] = float(network.alpha.detach())
    if not hasattr(network.l2g, "references"):
        return found | {"note": "this ablation has a head in the place of references: nothing but the segmentation to show"}
    sets, _, per_class, _ = network.l2g.references.shape

    def maps_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
        cosines = network.explain(x)["cosines"].unflatten(1, (sets, -1))  # (1, S, G M, *spatial of the level)
        return {"nearest": cosines.argmax(2) + 1}  # 0 will be what was cropped away

    maps = map_image(case.data, model.configuration.patch_size, maps_of, device, "references")
    nearest = [to_image(values.astype(np.int16), case) for values in maps["nearest"]]  # of each region, or of all classes
    output.add_maps("references", f"nearest reference: class x {per_class} + number in the class", nearest, case)

    parts = []  # voxels and name of a structure; (*shape): the nearest own reference, 0 for a foreign one, -1 outside
    found |= {"per_class": per_class, "structures": {}}
    for number, (name, values) in enumerate(model.labels.structures):
        inside = model.labels.mask(slices.labels, values)
        if not inside.any():
            continue
        which, before = (number, per_class) if network.regions else (0, values[0] * per_class)  # references before its own
        numbers = nearest[which] - before
        numbers[(numbers < 0) | (numbers > per_class)] = 0
        counts = np.bincount(numbers[inside], minlength=per_class + 1)
        found["structures"][name] = [round(count / int(counts.sum()), 4) for count in counts[1:].tolist()]
        parts.append((counts.sum(), name, np.where(inside, numbers, -1)))
        parts = sorted(parts, key=lambda part: -part[0])[:STRUCTURES]
    if parts:
        _draw(case, slices, parts, per_class, output)
    return found


def _draw(case: Case, slices: Slices, parts: list, per_class: int, output: Output) -> None:
    """One row for each structure: slices through it, each voxel in the colour of the nearest reference of the structure."""
    colours, panels = label_colours(range(1, per_class + 1)), []
    for _, name, part in parts:
        where = np.flatnonzero((part >= 0).any(tuple(axis for axis in range(3) if axis != case.slice_axis)))
        chosen = sorted({int(index) for index in evenly(where, SLICES)})
        for index in chosen:
            overlay = coloured(slices.plane(part, index), colours)
            panels.append(Panel(slices.title(name.replace("_", " "), index), slices.image(index), overlay))
        if slices.number > 1:
            panels += [None] * (SLICES - len(chosen))
    caption = (
        f"The voxels of each structure (by the {slices.kind}) of case {case.name}, in the colour of the reference of the "
        "structure that is nearest. Voxels without colour are nearest to a reference of another class. The numbers of the "
        "references have no order."
    )
    path = output.add("references.png", "which reference of its structure each voxel is nearest to")
    legend = {"reference": {str(number): colour for number, colour in colours.items()}}
    draw_panels(panels, SLICES, path, caption, legend, case.aspect)
