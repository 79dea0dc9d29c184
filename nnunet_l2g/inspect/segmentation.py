"""What every model has: its prediction, and where it is wrong."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.evaluation import count_voxels, overlap_scores
from nnunet_l2g.inspect.case import Case
from nnunet_l2g.inspect.drawing import Panel, coloured, draw_panels
from nnunet_l2g.inspect.geometry import write_map
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.inspect.output import Output
from nnunet_l2g.inspect.view import View
from nnunet_l2g.lookup import quiet

# value in the error map: name, colour; blue, yellow and vermilion differ in lightness too
ERRORS = {
    1: ("right", "#0072B2"),
    2: ("false positive", "#F0E442"),
    3: ("false negative", "#D55E00"),
    4: ("wrong class", "#CC79A7"),
    5: ("ignored", "#7F7F7F"),
}


def predict(model: Model, case: Case, device: str) -> np.ndarray:
    """nnU-Net's sliding window, mirrored as in its validation: labels on the image's grid (*shape)."""
    import torch

    with quiet():
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            perform_everything_on_device=device == "cuda", device=torch.device(device), verbose=False, allow_tqdm=True
        )
    predictor.manual_initialization(
        model.network, model.plans, model.configuration, None, model.dataset, model.trainer, model.mirroring
    )
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(case.data)).cpu()  # (heads, *grid)
    prediction = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, model.plans, model.configuration, model.manager, case.properties, num_threads_torch=torch.get_num_threads()
    )
    return np.asarray(prediction).astype(np.int16)


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
    """For each structure of dataset.json: dice, iou, precision, recall (None where undefined) and voxels in each."""
    labels = model.labels
    valid = None if labels.ignore is None else reference != labels.ignore
    found = {}
    for name, values in labels.structures:
        counts = count_voxels(labels.mask(reference, values), labels.mask(prediction, values), valid)
        numbers = {key: None if np.isnan(value) else round(value, 6) for key, value in overlap_scores(*counts).items()}
        found[name] = numbers | dict(zip(("true_positive", "false_positive", "false_negative"), counts, strict=True))
    return found


def inspect_segmentation(model: Model, case: Case, view: View, output: Output) -> dict:
    """prediction.nii.gz, errors.nii.gz and segmentation.png; returns what summary.json says of it."""
    write_map(view.prediction.astype(np.uint8 if view.prediction.max() < 256 else np.uint16), case.properties,
              output.add("prediction.nii.gz", "the model's segmentation"))  # fmt: skip
    found: dict = {"voxels": {name: int((view.prediction == value).sum()) for value, name in view.names.items()}}
    errors, legends = None, {"labels": view.legend}
    if case.reference is not None:
        errors = error_map(case.reference, view.prediction, model.labels.ignore)
        write_map(errors, case.properties, output.add("errors.nii.gz", _error_line()))
        found["scores"] = scores(model, case.reference, view.prediction)
        legends["errors"] = {name: colour for value, (name, colour) in ERRORS.items() if (errors == value).any()}
    path = output.add("segmentation.png", "image, reference, prediction and where they differ")
    rows = [_row(case, view, errors, index) for index in view.indices(3)]
    draw_panels(rows, path, _caption(case, view, found), legends, view.aspect)
    return found


def _row(case: Case, view: View, errors: np.ndarray | None, index: int) -> list[Panel]:
    image, name = view.image(index), view.slice_name(index)
    panels = [Panel(f"image, {name}" if name else "image", image)]
    if case.reference is not None:
        panels.append(Panel("reference", image, view.labels(case.reference, index)))
    panels.append(Panel("prediction", image, view.labels(view.prediction, index)))
    if errors is not None:
        colours = {value: colour for value, (_, colour) in ERRORS.items()}
        panels.append(Panel("errors", image, coloured(view.plane(errors, index), colours, 0.8)))
    return panels


def _caption(case: Case, view: View, found: dict) -> str:
    text = f"Case {case.name} as segmented by {view.model.trainer}, fold {view.model.fold}."
    if "scores" in found:
        dice = [f"{name.replace('_', ' ')} {_shown(values['dice'])}" for name, values in found["scores"].items()]
        return f"{text} Dice over the whole image: {', '.join(dice)}."
    return f"{text} No reference was given, so errors are unknown."


def _shown(value: float | None) -> str:
    return "undefined (not in reference nor prediction)" if value is None else f"{value:.3f}"


def _error_line() -> str:
    return "0 background, " + ", ".join(f"{value} {name}" for value, (name, _) in ERRORS.items())
