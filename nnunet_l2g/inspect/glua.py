"""What GLUA made for an image: its translations, where the domains can be told apart, and how the gap closed in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator, local_feature_mask
from nnunet_l2g.architectures.glua.contrast_inversion import invert_contrast
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.inspect.case import Case
from nnunet_l2g.inspect.drawing import Panel, draw_panels, save_figure, window_of, windowed
from nnunet_l2g.inspect.geometry import write_map
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.inspect.output import Output
from nnunet_l2g.inspect.tiles import tile_maps, to_patch
from nnunet_l2g.inspect.view import View

EXTRA_KEY = "nnunet_l2g"  # of trainers/base.py, which stands above this layer
COLUMNS = 4
INVERTED = "list of inverted channels"
GAPS = {"gap_intensity": "intensities", "gap_features": "deep features"}


class Parts(NamedTuple):
    """What stands beside the network, in eval mode; None for what the twin does not have or another program took out."""

    translator: Translator | None
    discriminator: DomainDiscriminator | None
    inverted: np.ndarray | None  # (C,) bool, of a network that was trained on an inverted source
    missing: list[str]


def load_parts(model: Model) -> Parts:
    """From the trainer's own state in its checkpoint. UserError if a part does not fit the model."""
    extra, trainer = model.checkpoint.get(EXTRA_KEY, {}), model.trainer_class
    if not isinstance(extra, dict):
        raise UserError(f"{model.file}: its entry {EXTRA_KEY} is no state of a trainer of ours; copy the file again")
    translator = _load_translator(model, extra["translator"]) if "translator" in extra else None
    discriminator = _load_discriminator(model, extra["alignment"]) if "alignment" in extra else None
    inverted = _load_inverted(model, extra["inverted"]) if "inverted" in extra else None
    parts = {  # is there one in a whole checkpoint, and in this one?
        "translator": (trainer.translation, translator),
        "domain discriminator": (trainer.alignment, discriminator),
        INVERTED: (trainer.inversion_only, inverted),
    }
    missing = [name for name, (wanted, found) in parts.items() if wanted and found is None]
    return Parts(translator, discriminator, inverted, missing)


def as_trained(case: Case, parts: Parts, domain: str | None) -> Case:
    """An image of the source inverted, as nnUNetTrainerGLUAInversionOnly trains on it; others as they are.

    UserError if the checkpoint does not say which channels to invert.
    """
    if domain == "source" and INVERTED in parts.missing:
        raise UserError(
            "the checkpoint does not say which channels of the source are inverted: another program has stripped it, and an "
            "image of the source cannot be shown as the network was trained on it. Copy the training's own checkpoint again, "
            "or inspect an image of the target with --domain target"
        )
    if parts.inverted is None or domain != "source":
        return case
    return replace(case, data=invert_contrast(case.data, parts.inverted))


def inspect_glua(model: Model, case: Case, view: View, parts: Parts, domain: str, device: str, output: Output) -> dict:
    """Translations (of a source image), mask, gap; what the twin or a stripped checkpoint lacks is left out and noted."""
    found: dict = {"domain": domain, "notes": []}
    if parts.missing:
        lacks = " and no ".join(parts.missing)
        note = f"{model.file} has no {lacks}: another program has taken out what prediction does not need"
        found["notes"].append(note)
        print(f"NOTE: {note}", flush=True)
    translated = None
    if domain == "source" and parts.inverted is not None:
        found["inverted"] = parts.inverted.tolist()
    if domain == "source" and parts.translator is not None:
        translated, found["translation"] = _translate(parts.translator, case, view, device, output)
    elif domain == "target":
        found["notes"].append("an image of the target is not translated")
    if parts.discriminator is not None:
        found["mask"] = _inspect_mask(model, case, view, parts.discriminator, translated, device, output)
    logging = model.checkpoint.get("logging", {})
    gaps = {key: [_finite(value) for value in logging[key]] for key in logging if key.startswith("gap_") and logging[key]}
    if gaps:
        found["gap"] = {key: {"first": values[0], "last": values[-1], "epochs": values} for key, values in gaps.items()}
        _draw_gap(gaps, output)
    return found


def _finite(value) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


# ---- translation ----


def _translate(translator: Translator, case: Case, view: View, device: str, output: Output):
    """Style 1's translation (C, *grid), and what summary.json says: mean absolute change of each style."""
    translator = translator.to(device)
    window = window_of(case.data)
    panels = [Panel("source image", _plane(case, view, case.data, window))]
    first, styles = None, []
    for number, style in enumerate(tqdm(translator.target_styles, desc="translations", leave=False), 1):
        translation = translate_case(translator, case.data, style, device)  # (C, *grid)
        first = translation if first is None else first
        styles.append({"style": number, "mean_change": float(np.abs(translation - case.data).mean())})
        for channel, values in enumerate(translation):
            suffix = f"_{channel:04d}" if len(translation) > 1 else ""
            path = output.add(f"translation_{number}{suffix}.nii.gz", f"in the target's style {number}, normalised intensities")
            write_map(view.original(values), case.properties, path)
        panels.append(Panel(f"style {number}", _plane(case, view, translation, window_of(translation))))
    kind, labels = ("prediction", view.prediction) if case.reference is None else ("reference", case.reference)
    panels.append(Panel(f"{kind} on style 1", panels[1].image, view.labels(labels)))
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    where = f", {view.slice_name(view.index)}" if view.slices > 1 else ""
    caption = (
        f"Case {case.name}{where}, translated into each of the target's {len(styles)} styles, every picture in its own grey "
        "window: shapes should stay where they are, looks should be the target's."
    )
    path = output.add("translations.png", "the image in each of the target's styles")
    draw_panels(rows, path, caption, {"labels": view.legend}, view.aspect)
    return first, styles


def _load_translator(model: Model, state: dict) -> Translator:
    """The averaged weights and the styles: the rest is what its training needed."""
    settings = {"halvings": halvings_of(model.patch_size), **getattr(model.trainer_class, "translation_settings", {})}
    settings["segmentation"] = 0
    translator = Translator(model.channels, len(model.patch_size), **settings).eval()
    try:
        translator.load_state_dict({**translator.state_dict(), **state})
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()[:40]) or type(error).__name__  # torch's first line names no weight
        raise UserError(f"{model.file}: its translator does not fit {model.trainer} ({reason})") from error
    return translator


def _load_inverted(model: Model, inverted: object) -> np.ndarray:
    if not isinstance(inverted, torch.Tensor) or inverted.dtype != torch.bool or inverted.shape != (model.channels,):
        raise UserError(
            f"{model.file}: its inverted channels do not fit {model.trainer}, expected {model.channels} of True or False"
        )
    return inverted.numpy()


def translate_case(translator: Translator, data: np.ndarray, style: torch.Tensor, device: str) -> np.ndarray:
    """data (C, *grid), three axes, in one style: the same shape, float32."""
    x = torch.from_numpy(data).to(device)
    x = x.transpose(0, 1) if translator.dims == 2 else x[None]  # slices as a batch, or one volume
    y = translator.translate(x, style.expand(len(x), -1))
    return (y.transpose(0, 1) if translator.dims == 2 else y[0]).float().cpu().numpy()


def _plane(case: Case, view: View, values: np.ndarray, window) -> np.ndarray:
    """(C, *grid) -> the picture of the view's slice."""
    return windowed(np.stack([view.plane(view.original(channel)) for channel in values]), window)


# ---- mask ----


def _load_discriminator(model: Model, state: dict) -> DomainDiscriminator:
    discriminator = DomainDiscriminator(model.network.deep_channels, len(model.patch_size)).eval()
    try:
        discriminator.load_state_dict(state["discriminator"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()[:40]) or type(error).__name__  # torch's first line names no weight
        raise UserError(f"{model.file}: its domain discriminator does not fit {model.trainer} ({reason})") from error
    return discriminator


def _inspect_mask(model: Model, case: Case, view: View, discriminator, translated, device: str, output: Output) -> dict:
    """mask.png and NIfTI; means of D and m over the image and over each structure of the reference or prediction."""
    network, discriminator = model.network.to(device), discriminator.to(device)

    def look(x: torch.Tensor) -> dict[str, torch.Tensor]:
        score = discriminator(network.deep_features(x))  # (1, 1, *deep)
        maps = {"score": score, "mask": local_feature_mask(score)}
        return {name: to_patch(value, model.patch_size) for name, value in maps.items()}

    images = {"image": case.data} if translated is None else {"image": case.data, "translated": translated}
    labels = view.prediction if case.reference is None else case.reference
    found, rows = {"used_in_training": bool(model.trainer_class.mask)}, []
    for name, data in images.items():
        maps = tile_maps(data, model.patch_size, look, device, f"mask of the {name}")
        mask, score = (view.original(maps[key][0]) for key in ("mask", "score"))
        shown = _plane(case, view, data, window_of(data))
        where = "the image" if name == "image" else "its translation, style 1"
        file = "mask.nii.gz" if name == "image" else "mask_translated.nii.gz"
        write_map(mask, case.properties, output.add(file, f"local feature mask m of {where}, 0 to 1"))
        overlay = Panel(f"mask of {where}", shown, values=view.plane(mask), cmap="viridis", unit="m")
        rows.append([Panel(where.split(" ", 1)[1], shown), overlay])
        found[name] = {
            "mean_mask": float(maps["mask"].mean()),
            "mean_score": float(maps["score"].mean()),
            "structures": {
                name: {"mask": float(mask[labels == value].mean()), "score": float(score[labels == value].mean())}
                for value, name in view.names.items()
                if (labels == value).any()
            },
        }
    kind = "prediction" if case.reference is None else "reference"
    rows[0].append(Panel(kind, view.image(), view.labels(labels)))
    unused = "" if found["used_in_training"] else " This twin aligns every position alike: m is what the mask would be."
    caption = (
        "Local feature mask m = |2 D - 1| on deep features: 0 where the domain discriminator cannot tell the domains apart, "
        f"1 where it can; mean {found['image']['mean_mask']:.2f} over the image.{unused}"
    )
    path = output.add("mask.png", "where the discriminator still tells the domains apart")
    draw_panels(rows, path, caption, {"labels": view.legend}, view.aspect)
    return found


# ---- gap ----


def _draw_gap(gaps: dict[str, list], output: Output) -> None:
    """gap.png: sliced Wasserstein distances over the epochs of training."""

    def draw(figure):
        axes = figure.subplots(1, len(GAPS), squeeze=False)[0]
        for axis, (key, name) in zip(axes, GAPS.items(), strict=True):
            highest = 0.0
            lines = ((key, "source", "#D55E00", "o-"), (f"{key}_translated", "translated source", "#0072B2", "s--"))
            for line, label, colour, style in lines:
                if line in gaps:
                    values = [math.nan if value is None else value for value in gaps[line]]
                    highest = max([highest, *(value for value in gaps[line] if value is not None)])
                    axis.plot(range(1, len(values) + 1), values, style, color=colour, label=label, markersize=4)
            axis.set(title=f"{name}, distance to the target", xlabel="epoch")
            axis.set_ylim(0, 1.1 * highest or 1)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("sliced Wasserstein distance")
        axes[-1].legend(frameon=False)

    caption = (
        "The domain gap before (source) and after translation, as the training logged it on a few batches an epoch, features "
        "in units of the target's standard deviation. Finite samples of one domain are not at 0 either."
    )
    save_figure(draw, (8.0, 3.2), output.add("gap.png", "domain gap before and after translation, over training"), caption)
