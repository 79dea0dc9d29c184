"""What every model has: its segmentation, and where it is wrong."""

from __future__ import annotations

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_l2g.inspect.case import Case, Slices
from nnunet_l2g.inspect.maps import Output
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.lookup import quiet
from nnunet_l2g.training.figure import BLUE, GREY, PURPLE, VERMILION, YELLOW, Panel, coloured, draw_panels

ERRORS = {  # value in the error map: name, colour
    1: ("right", BLUE),
    2: ("false positive", YELLOW),
    3: ("false negative", VERMILION),
    4: ("wrong class", PURPLE),
    5: ("ignored", GREY),
}


def predict(model: Model, case: Case, device: str) -> np.ndarray:
    """nnU-Net's prediction with its sliding window and mirroring: labels (*shape) on the grid of the image."""
    with quiet():  # on a CPU it prints that nothing is performed on the device
        predictor = nnUNetPredictor(perform_everything_on_device=device == "cuda", device=torch.device(device))
    mirrored = model.checkpoint.get("inference_allowed_mirroring_axes")
    trainer = model.trainer.__name__
    predictor.manual_initialization(model.network, model.plans, model.configuration, None, model.dataset, trainer, mirrored)
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(case.data)).cpu()  # (heads, *grid)
    prediction = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, model.plans, model.configuration, model.manager, case.properties, num_threads_torch=torch.get_num_threads()
    )
    return np.asarray(prediction).astype(np.int32)


def error_map(reference: np.ndarray, prediction: np.ndarray, ignore: int | None) -> np.ndarray:
    """uint8: 0 where both are background, else a key of ERRORS."""
    errors = np.zeros(reference.shape, np.uint8)
    errors[(reference > 0) & (reference == prediction)] = 1
    errors[(reference == 0) & (prediction > 0)] = 2
    errors[(reference > 0) & (prediction == 0)] = 3
    errors[(reference > 0) & (prediction > 0) & (reference != prediction)] = 4
    if ignore is not None:
        errors[reference == ignore] = 5
    return errors


def scores(model: Model, reference: np.ndarray, prediction: np.ndarray) -> dict[str, dict]:
    r"""For each structure of dataset.json the voxels of each kind and Dice.

    .. math:: Dice = 2 TP / (2 TP + FP + FN), \quad None if neither has the structure
    """
    labels, found = model.labels, {}
    ignored = None if labels.ignore is None else reference == labels.ignore
    for name, values in labels.structures:
        counts = compute_tp_fp_fn_tn(labels.mask(reference, values), labels.mask(prediction, values), ignored)
        tp, fp, fn = map(int, counts[:3])
        dice = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
        found[name] = {"dice": dice, "true_positive": tp, "false_positive": fp, "false_negative": fn}
    return found


def inspect_segmentation(model: Model, case: Case, slices: Slices, output: Output) -> dict:
    """Writes prediction.nii.gz, errors.nii.gz and segmentation.png; returns what summary.json says of them."""
    prediction, reference = slices.prediction, case.reference
    dtype = np.uint8 if prediction.max() < 256 else np.uint16
    output.add_maps("prediction", "the model's segmentation", [prediction.astype(dtype)], case)
    found: dict = {"voxels": {name: int((prediction == value).sum()) for value, name in slices.names.items()}}
    caption = f"Case {case.name} as segmented by {model.trainer.__name__}, {model.file.parent.name}."
    legends, errors = {"labels": slices.legend}, None
    if reference is None:
        caption += " No reference was given, so errors are unknown."
    else:
        errors = error_map(reference, prediction, model.labels.ignore)
        line = "0 background, " + ", ".join(f"{value} {name}" for value, (name, _) in ERRORS.items())
        output.add_maps("errors", line, [errors], case)
        legends["errors"] = {name: colour for value, (name, colour) in ERRORS.items() if (errors == value).any()}
        found["scores"] = scores(model, reference, prediction)
        dice = {name.replace("_", " "): values["dice"] for name, values in found["scores"].items()}
        shown = ", ".join(f"{name} {'undefined' if value is None else f'{value:.3f}'}" for name, value in dice.items())
        caption += f" Dice over the whole image: {shown}."
    panels = []
    for index in slices.through(3):
        image = slices.image(index)
        row = [Panel(slices.title("image", index), image)]
        if errors is not None:
            row.append(Panel("reference", image, slices.overlay(reference, index)))
        row.append(Panel("prediction", image, slices.overlay(prediction, index)))
        if errors is not None:
            colours = {value: colour for value, (_, colour) in ERRORS.items()}
            row.append(Panel("errors", image, coloured(slices.plane(errors, index), colours, 0.8)))
        panels += row
    path = output.add("segmentation.png", "image, reference, prediction and where they differ")
    draw_panels(panels, len(row), path, caption, legends, case.aspect)
    return found
