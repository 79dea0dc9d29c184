"""GLUA: an image of the source in the styles of the target, and where the domains can still be told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator, local_feature_mask
from nnunet_l2g.architectures.glua.contrast_inversion import invert_contrast
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.inspect.case import Case, Slices
from nnunet_l2g.inspect.maps import Output, map_image, to_image
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.trainers.base import EXTRA_KEY
from nnunet_l2g.training.figure import Panel, draw_panels, window_of, windowed

COLUMNS = 4


class TrainerState(NamedTuple):
    """What the trainer keeps beside the network, in eval mode; None for what the checkpoint does not hold.

    inverted : (C,) bool, the channels of the source whose contrast is inverted before the network sees them
    """

    translator: Translator | None
    discriminator: DomainDiscriminator | None
    inverted: np.ndarray | None


def load_trainer_state(model: Model) -> TrainerState:
    """From the state of the trainer in the checkpoint. UserError if a part does not fit the model."""
    translator = discriminator = inverted = None
    patch_size = model.configuration.patch_size
    try:
        state = dict(model.checkpoint.get(EXTRA_KEY, {}))
        if "translator" in state:
            settings = {"halvings": halvings_of(patch_size), **getattr(model.trainer, "translation_settings", {})}
            translator = Translator(model.channels, len(patch_size), **{**settings, "segmentation": 0}).eval()
            unused = translator.state_dict()  # the checkpoint holds only the weights that translate
            translator.load_state_dict({**unused, **state["translator"]})
        if "alignment" in state:
            discriminator = DomainDiscriminator(model.network.deep_channels, len(patch_size)).eval()
            discriminator.load_state_dict(state["alignment"]["discriminator"])
        if "inverted" in state:
            channels = state["inverted"]
            if channels.dtype != torch.bool or channels.shape != (model.channels,):
                raise ValueError(f"inverted: expected {model.channels} of True or False")
            inverted = channels.numpy()
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        cause = " ".join(str(error).split()[:40])
        raise UserError(
            f"{model.file}: what its trainer kept beside the network does not fit {model.trainer.__name__} "
            f"({type(error).__name__}: {cause}); copy the training's own checkpoint again"
        ) from error
    return TrainerState(translator, discriminator, inverted)


def as_trained_on(model: Model, kept: TrainerState, case: Case) -> Case:
    """An image of the source with its contrast inverted, if the network was trained on such images; others as they are.

    UserError if the checkpoint does not say which channels.
    """
    if model.domain == "source" and kept.inverted is None and getattr(model.trainer, "inversion_only", False):
        raise UserError(
            f"{model.file}: another program has removed which channels of the source were inverted. Copy the training's own "
            "checkpoint again, or inspect an image of the target with --domain target"
        )
    if model.domain != "source" or kept.inverted is None:
        return case
    return replace(case, data=invert_contrast(case.data, kept.inverted))


def inspect_glua(model: Model, kept: TrainerState, case: Case, slices: Slices, device: str, output: Output) -> dict:
    """Writes the translations of an image of the source, and the local feature mask of any image.

    Returns
    -------
    inverted : whether the contrast of each channel was inverted, for an image of the source
    mean_mask : of the local feature mask over the image
    note : if the checkpoint holds nothing to show
    """
    found: dict = {}
    if all(part is None for part in kept):
        found["note"] = f"{model.file} has no translator and no domain discriminator: nothing but the segmentation to show"
    if kept.inverted is not None and model.domain == "source":
        found["inverted"] = kept.inverted.tolist()
    if kept.translator is not None and model.domain == "source":
        _inspect_translations(kept.translator, case, slices, device, output)
    if kept.discriminator is not None:
        found["mean_mask"] = _inspect_mask(model, kept.discriminator, case, slices, device, output)
    return found


def translate_case(translator: Translator, data: np.ndarray, style: torch.Tensor, device: str) -> np.ndarray:
    """data (C, *grid), three axes, in one style: the same shape, float32."""
    x = torch.from_numpy(data).to(device)
    x = x.transpose(0, 1) if translator.dims == 2 else x[None]  # slices as a batch, or one volume
    y = translator.translate(x, style.expand(len(x), -1))
    return (y.transpose(0, 1) if translator.dims == 2 else y[0]).float().cpu().numpy()


def _inspect_translations(translator: Translator, case: Case, slices: Slices, device: str, output: Output) -> None:
    """Writes translation_<style>.nii.gz and translations.png."""
    panels = [Panel("source image", _picture(slices, [to_image(channel, case) for channel in case.data]))]
    for number, style in enumerate(tqdm(translator.target_styles, desc="translations", leave=False), 1):
        translation = [to_image(channel, case) for channel in translate_case(translator.to(device), case.data, style, device)]
        line = f"the image in the target's style {number}, normalised intensities"
        output.add_maps(f"translation_{number}", line, translation, case)
        panels.append(Panel(f"style {number}", _picture(slices, translation)))
    panels.append(Panel(f"{slices.kind} on style 1", panels[1].image, slices.overlay(slices.labels)))
    caption = (
        f"{slices.title(f'Case {case.name}')}, translated into each of the target's styles, every picture in its own grey "
        "window. Shapes should stay where they are, intensities should look like the target's."
    )
    path = output.add("translations.png", "the image in each of the target's styles")
    draw_panels(panels, COLUMNS, path, caption, {"labels": slices.legend}, case.aspect)


def _picture(slices: Slices, channels: list[np.ndarray]) -> np.ndarray:
    """Channels (*shape) as the slice that pictures show, in a grey window of their own."""
    return windowed(np.stack([slices.plane(channel) for channel in channels]), window_of(np.stack(channels)))


def _inspect_mask(model: Model, discriminator, case: Case, slices: Slices, device: str, output: Output) -> float:
    """Writes mask.nii.gz and mask.png; returns the mean of the mask."""
    network, discriminator = model.network.to(device), discriminator.to(device)

    def maps_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mask": local_feature_mask(discriminator(network.deep_features(x)))}  # (1, 1, *deep)

    found = map_image(case.data, model.configuration.patch_size, maps_of, device, "local feature mask")["mask"]
    mask, mean = to_image(found[0], case), float(found.mean())
    output.add_maps("mask", "local feature mask m, 0 to 1", [mask], case)
    image = slices.image()
    panels = [
        Panel("image", image),
        Panel("mask on the image", image, values=slices.plane(mask), cmap="viridis", unit="m"),
        Panel(slices.kind, image, slices.overlay(slices.labels)),
    ]
    caption = (
        f"{slices.title(f'Case {case.name}')}. Local feature mask m = |2 D - 1| on deep features: 0 where the domain "
        f"discriminator cannot tell the domains apart, 1 where it can; mean {mean:.2f} over the image."
    )
    path = output.add("mask.png", "where the discriminator can still tell the domains apart")
    draw_panels(panels, COLUMNS, path, caption, {"labels": slices.legend}, case.aspect)
    return mean
