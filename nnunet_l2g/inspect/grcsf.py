"""GRCSF: what its autoencoder cannot reconstruct in an image, and what its units compensate and weigh."""

from __future__ import annotations

import torch

from nnunet_l2g.architectures.grcsf.picture import COLUMNS, STYLES, map_panels, named_maps
from nnunet_l2g.inspect.case import Case, Slices
from nnunet_l2g.inspect.maps import Output, map_image, to_image
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.training.figure import Panel, draw_panels, window_of


def inspect_grcsf(model: Model, case: Case, slices: Slices, device: str, output: Output) -> dict:
    """Writes compensation.png and a NIfTI file for each map.

    Returns
    -------
    residual : what the units take as residual maps: autoencoder, other, dog or None
    gcu : whether there are Global Compensation Units
    note : if there is nothing to show
    """
    network = model.network.to(device)
    found = {"residual": network.residual, "gcu": len(network.gcu) > 0}
    if network.residual is None and not found["gcu"]:
        return found | {"note": "this control has neither unit: nothing but the segmentation to show"}

    def maps_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return named_maps(network.explain(x), model.channels)

    maps = map_image(case.data, model.configuration.patch_size, maps_of, device, "residual and compensation maps")
    maps = {name: [to_image(channel, case) for channel in channels] for name, channels in maps.items()}
    for name, channels in maps.items():
        title = STYLES[name][0] if name in STYLES else name.replace("_", ", ") + " % masked"
        output.add_maps(name, title, channels, case)
    image = slices.image()
    panels = [Panel("image", image), *map_panels(maps, slices.plane, window_of(case.data))]
    if case.reference is not None:
        panels.append(Panel("reference", image, slices.overlay(case.reference)))
    panels.append(Panel("prediction", image, slices.overlay(slices.prediction)))
    caption = (
        f"{slices.title(f'Case {case.name}')}. Reconstructions while tokens are masked, their residuals in units of the "
        "expected error, and what the units compensate (m) and weigh (w)."
    )
    path = output.add("compensation.png", "reconstructions, residuals, compensation and importance in one slice")
    draw_panels(panels, COLUMNS, path, caption, {"labels": slices.legend}, case.aspect)
    return found
