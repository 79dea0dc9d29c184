"""What GRCSF sees and does in an image: reconstructions, residuals, compensation and importance."""

from __future__ import annotations

import torch

from nnunet_l2g.inspect.case import Case
from nnunet_l2g.inspect.compensation import in_rows, map_panels, named_maps
from nnunet_l2g.inspect.drawing import Panel, draw_panels, window_of
from nnunet_l2g.inspect.geometry import write_map
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.inspect.output import Output
from nnunet_l2g.inspect.residuals import draw_inside_and_around, inside_and_around
from nnunet_l2g.inspect.tiles import tile_maps, to_patch
from nnunet_l2g.inspect.view import View

LINES = {
    "reconstruction_50": "predicted while half of the tokens are masked, in the network's intensities",
    "reconstruction_75": "predicted while three quarters of the tokens are masked",
    "residual_50": "absolute residual in expected errors, 50 % masked, mean of channels, up to 4",
    "residual_75": "the same, 75 % masked",
    "compensation": "m = 1 - cosine of the finest Global Compensation Unit, 0 to 2",
    "importance": "w of the finest Region Compensation Unit, 0 to 1",
}


def inspect_grcsf(model: Model, case: Case, view: View, device: str, output: Output) -> dict:
    """compensation.png, a NIfTI file for each map, and with a reference the residuals inside and around its structures."""
    network = model.network.to(device)
    found: dict = {"residual": network.residual, "gcu": len(network.gcu) > 0}
    if network.residual is None and not found["gcu"]:
        return found | {"note": "this control has neither unit: nothing but the segmentation to show"}

    def look(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: to_patch(value, model.patch_size) for name, value in named_maps(network.explain(x), len(x[0])).items()}

    maps = tile_maps(case.data, model.patch_size, look, device, "residual and compensation maps")
    on_image = {name: [view.original(channel) for channel in values] for name, values in maps.items()}
    for name, channels in on_image.items():
        for number, values in enumerate(channels):
            suffix = f"_{number:04d}" if len(channels) > 1 else ""
            write_map(values, case.properties, output.add(f"{name}{suffix}.nii.gz", LINES[name]))
    _draw(case, view, on_image, network.residual, output)
    if case.labels is not None:
        residuals = {name: values[0] for name, values in maps.items() if name.startswith("residual")}
        if residuals:
            found["inside_around"] = inside_and_around(residuals, case.labels, model.labels, case.grid_spacing)
            draw_inside_and_around(found["inside_around"], output)
    return found | {"means": {name: float(values.mean()) for name, values in maps.items() if "reconstruction" not in name}}


def _draw(case: Case, view: View, maps: dict, residual: str | None, output: Output) -> None:
    image = view.image()
    panels = [Panel("image", image), *map_panels(maps, view.plane, window_of(case.data))]
    if case.reference is not None:
        panels.append(Panel("reference", image, view.labels(case.reference)))
    panels.append(Panel("prediction", image, view.labels(view.prediction)))
    what = {
        "autoencoder": "Reconstructions while masked and what they miss, in units of the error that was to be expected",
        "other": "This image's own residuals (the twin was shown those of another image in their place)",
        "dog": "Difference of Gaussians in the residuals' place (twin)",
        None: "No residual maps (twin)",
    }[residual]
    where = f", {view.slice_name(view.index)}" if view.slices > 1 else ""
    caption = f"Case {case.name}{where}. {what}; then what the units compensate (m) and weigh (w)."
    path = output.add("compensation.png", "reconstructions, residuals, compensation and importance in one slice")
    draw_panels(in_rows(panels), path, caption, {"labels": view.legend}, view.aspect)
