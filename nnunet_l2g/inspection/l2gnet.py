"""What L2GNet does with an image: codes and transport, block by block."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_l2g.inspection.case import Case
from nnunet_l2g.inspection.codes import inspect_codes
from nnunet_l2g.inspection.drawing import Panel, draw_panels
from nnunet_l2g.inspection.geometry import write_map
from nnunet_l2g.inspection.model import Model
from nnunet_l2g.inspection.output import Output
from nnunet_l2g.inspection.patch import cut, patch_box
from nnunet_l2g.inspection.tiles import tile_maps, to_patch
from nnunet_l2g.inspection.transport import Plan, collected_shares, draw_classes, draw_plan, measure_plan
from nnunet_l2g.inspection.view import View

TOP = 6  # references in pictures and NIfTI


def inspect_l2gnet(model: Model, case: Case, view: View, on_grid: np.ndarray, device: str, output: Output) -> dict:
    """For each block: codes over the whole image; of one patch, the plan and what references collect.

    on_grid : (*grid) the prediction, which guides the patch where there is no reference
    """
    guide, of = (on_grid, "prediction") if case.labels is None else (case.labels, "reference")
    index, box = patch_box(np.where(np.isin(guide, list(view.names)), guide, 0), model.patch_size)
    patch = torch.from_numpy(cut(case.data, index, box))[None].to(device)  # (1, C, *patch)
    guide = cut(guide[None], index, box)[0]  # (*patch)
    network = model.network.to(device)
    explained = network.explain(patch)
    plans = {level: _plan(block, explained[level]) for level, block in zip(network.places, network.l2g, strict=True)}

    def look(x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = {}
        for level, values in network.explain(x).items():
            grid = values["grid"].tolist()
            if "codes" in values:
                codes = values["codes"].short().unflatten(1, (1, *grid))  # (1, 1, *grid); short: memory of large volumes
                maps[f"codes{level}"] = to_patch(codes, model.patch_size)
            if plans[level] is not None:  # A n: 1 is an even share of the patch
                columns = values["columns"][..., plans[level].top[:TOP]].transpose(1, 2) * values["columns"].shape[1]
                maps[f"columns{level}"] = to_patch(columns.unflatten(2, grid), model.patch_size)
        return maps

    maps = tile_maps(case.data, model.patch_size, look, device, "codes and references")
    found = {"patch": {"slice": index, "box": box, "labels": of}, "levels": {}}
    for level, block in zip(network.places, network.l2g, strict=True):
        prefix = "" if len(network.places) == 1 else f"{level}_" if isinstance(level, str) else f"level{level}_"
        here = found["levels"][str(level)] = {}
        if block.quantizer is not None:
            codes = maps[f"codes{level}"][0]
            here["codebook"] = inspect_codes(case, view, codes, len(block.quantizer.codebook), prefix, output)
        if plans[level] is not None:
            tokens = _token_labels(guide, [0, *view.names], explained[level]["grid"].tolist())
            here |= _inspect_transport(plans[level], maps[f"columns{level}"], tokens, of, case, view, prefix, output)
    return found


def _plan(block, explained: dict) -> Plan | None:
    if block.alignment is None:
        return None
    values = {key: explained[key][0].double().cpu().numpy() for key in ("scores", "columns", "tokens", "output")}
    received = explained["received"][0].double().cpu().numpy()
    layer = block.alignment
    return Plan(**values, eps=layer.eps, iterations=layer.iterations, received=received, relaxed=layer.relaxation is not None)


def _token_labels(guide: np.ndarray, values: list[int], grid: list[int]) -> np.ndarray:
    """(*patch) labels -> (n, values): of the voxels a token covers, the share with each value; others count as background."""
    masks = torch.from_numpy(np.stack([guide == value for value in values])).double()[None]  # (1, values, *patch)
    pool = torch.nn.functional.adaptive_avg_pool2d if guide.ndim == 2 else torch.nn.functional.adaptive_avg_pool3d
    shares = pool(masks, grid)[0].flatten(1).T.numpy()  # (n, values)
    shares[:, 0] = 1 - shares[:, 1:].sum(1)
    return shares


def _inspect_transport(
    plan: Plan, maps: np.ndarray, tokens: np.ndarray, of: str, case: Case, view: View, prefix: str, output: Output
) -> dict:
    """maps (TOP, *grid) of the top references; tokens (n, classes) share of each class in each token."""
    found = {"plan": measure_plan(plan)}
    draw_plan(plan, found["plan"], prefix, output)
    shares = collected_shares(plan, tokens, view.names)
    order = np.argsort(plan.effective_tokens, kind="stable")
    draw_classes(shares, tokens.mean(0), order, of, prefix, output)
    found["references"] = [
        {
            "reference": int(number),
            "effective_tokens": round(float(plan.effective_tokens[number]), 4),
            "shares": {name: round(float(values[number]), 6) for name, values in shares.items()},
        }
        for number in order
    ]
    panels = []
    n = len(plan.columns)
    for number, values in zip(plan.top[:TOP], maps, strict=True):
        on_image = view.original(values)
        name = f"{prefix}reference_{number}.nii.gz"
        write_map(on_image, case.properties, output.add(name, "what this reference collects; 1: an even share of the patch"))
        index = view.fullest(on_image)
        where = f", {view.slice_name(index)}" if view.slices > 1 else ""
        title = f"reference {number}{where}\n{plan.effective_tokens[number]:.1f} of {n} tokens"
        high = max(1.0, float(on_image.max()))
        values = view.plane(on_image, index)
        panels.append(Panel(title, view.image(index), values=values, cmap="viridis", high=high, unit="times an even share"))
    caption = (
        f"What single references collect in case {case.name}: the {len(panels)} most concentrated ones of a patch, each in the "
        "slice where it collects most; 1 is an even share of a patch's tokens."
    )
    path = output.add(f"{prefix}references.png", "what the most concentrated references collect")
    draw_panels([panels[:3], panels[3:]] if len(panels) > 3 else [panels], path, caption, aspect=view.aspect)
    return found
