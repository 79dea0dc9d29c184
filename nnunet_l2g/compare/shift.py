"""Predicts the validation cases again on perturbed images, with nnU-Net's own command, and scores them."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.predicting import finish, is_current, predict_again, renew, sidecar, stamp
from nnunet_l2g.compare.results import Inputs
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs
from nnunet_l2g.evaluation.shifts import STRENGTHS, perturb
from nnunet_l2g.images import check_whole

FOLDER = "shift"
VERSION = 1  # of the perturbations


def shift_table(
    models: list[Model],
    inputs: Inputs,
    images: dict[str, list[Path]],
    dataset: str,
    device: str,
    output: Path,
    options: Options,
    processes: int,
) -> pd.DataFrame:
    """Columns method, kind, strength, dice: mean over structures of the mean over the validation cases of all folds.

    Images and predictions are kept in `output`/shift and reused while images, checkpoints and perturbations stay the same.
    Raises UserError if nnU-Net fails, Interrupted on Ctrl-C.
    """
    fold_of = inputs.runs[0].folds
    ending = inputs.labels.file_ending
    for fold in inputs.folds:
        cases = [case for case in inputs.cases if fold_of[case] == fold]
        _write_images({case: images[case] for case in cases}, output / FOLDER / "images" / f"fold_{fold}", ending)
        for model in models:
            perturbed, target = output / FOLDER / "images" / f"fold_{fold}", _predictions(output, model, fold)
            predict_again(model, fold, dataset, device, perturbed, target, output, "shift")
    pairs = [
        Pair(
            model.name,
            _name(case, kind, level),
            inputs.references[case],
            _predictions(output, model, fold_of[case]) / f"{_name(case, kind, level)}{ending}",
        )
        for model in models
        for case in inputs.cases
        for kind in STRENGTHS
        for level in range(len(STRENGTHS[kind]))
    ]
    scores, _ = score_pairs(pairs, inputs.labels, options, processes)
    rows = []
    for model in models:
        for kind, strengths in STRENGTHS.items():
            for level, strength in enumerate(strengths):
                dice = pd.DataFrame(
                    [
                        {name: values["dice"] for name, values in scores[model.name, 1, _name(case, kind, level)].items()}
                        for case in inputs.cases
                    ]
                )
                rows.append((model.name, kind, strength, dice.mean().mean()))
    return pd.DataFrame(rows, columns=["method", "kind", "strength", "dice"])


def perturb_file(source: Path, target: Path, kind: str, strength: float, seed: int) -> None:
    """Writes a perturbed copy on the same grid, in the source's pixel type (rounded and clipped for integers).

    UserError if the source cannot be read.
    """
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(source))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"--shift: {source} cannot be read ({cause}); replace the file") from error
    check_whole(source)
    array = SimpleITK.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel()
    spacing = tuple(reversed(image.GetSpacing()))
    planes = [array[..., index] for index in range(channels)] if channels > 1 else [array]
    changed = [perturb(plane, spacing, kind, strength, seed + index) for index, plane in enumerate(planes)]
    result = np.stack(changed, axis=-1) if channels > 1 else changed[0]
    if np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(array.dtype)
        result = np.clip(np.rint(result), limits.min, limits.max)
    written = SimpleITK.GetImageFromArray(result.astype(array.dtype), isVector=channels > 1)
    written.CopyInformation(image)
    SimpleITK.WriteImage(written, str(target), True)


def _write_images(images: dict[str, list[Path]], folder: Path, ending: str) -> None:
    state = {
        "version": VERSION,
        "strengths": {kind: list(values) for kind, values in STRENGTHS.items()},
        "images": {case: [stamp(path) for path in (*paths, *sidecar(case, paths))] for case, paths in images.items()},
    }
    if is_current(folder, state):
        return
    renew(folder)
    print(f"perturbing the images of {len(images)} cases into {folder} ...", flush=True)
    for case, paths in images.items():
        for kind, strengths in STRENGTHS.items():
            for level, strength in enumerate(strengths):
                for spacing in sidecar(case, paths):
                    shutil.copyfile(spacing, folder / f"{_name(case, kind, level)}.json")
                for channel, path in enumerate(paths):
                    name = f"{_name(case, kind, level)}_{channel:04d}{ending}"
                    perturb_file(path, folder / name, kind, strength, zlib.crc32(f"{case} {kind} {channel}".encode()))
    finish(folder, state)


def _name(case: str, kind: str, level: int) -> str:
    return f"{case}__{kind}{level + 1}"


def _predictions(output: Path, model: Model, fold: str) -> Path:
    return output / FOLDER / "predictions" / model.folder.name / f"fold_{fold}"
