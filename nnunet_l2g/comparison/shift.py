"""Predicts the validation cases again on perturbed images, with nnU-Net's own command, and scores them."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_l2g.comparison.models import Model, nnunet_folder
from nnunet_l2g.comparison.results import Inputs, read_plans
from nnunet_l2g.comparison.training import LOGS, run_nnunet
from nnunet_l2g.demo.files import write_json
from nnunet_l2g.demo.progress import prediction_progress
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs
from nnunet_l2g.evaluation.shifts import STRENGTHS, perturb
from nnunet_l2g.untrusted.images import check_whole
from nnunet_l2g.untrusted.json_files import DAMAGE, read_json

FOLDER = "shift"
VERSION = 1  # of the perturbations


def check_shift(models: list[Model], inputs: Inputs, dataset: str) -> dict[str, list[Path]]:
    """The raw image files of each validation case, one for each channel.

    UserError if one is missing, for a cascade, and for adapted plans.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_l2g.adaptation import TARGET_KEY  # imports nnU-Net's folders, too

    for model in models:
        plans = read_plans(model)
        if TARGET_KEY in plans:
            raise UserError(
                f"--shift: the plans of {model.trainer} are adapted to a target, so that nnU-Net's prediction normalises for "
                "it, and the validation images are the source's; compare predictions of target images with --predictions"
            )
        if plans["configurations"][model.configuration].get("previous_stage"):
            raise UserError(
                f"--shift: {model.configuration} is the second stage of a cascade, whose first stage would have to be "
                "predicted again too; use --shift on the other configurations"
            )
    raw = nnunet_folder("raw") / dataset
    try:
        files = get_filenames_of_train_images_and_targets(str(raw))
    except (*DAMAGE, RecursionError) as error:
        raise UserError(f"--shift: the raw images in {raw} cannot be listed ({type(error).__name__}: {error})") from error
    images = {case: [Path(file) for file in files.get(case, {}).get("images", [])] for case in inputs.cases}
    for case, paths in images.items():
        for path in paths or [raw / "imagesTr" / case]:
            if not path.is_file():
                raise UserError(f"--shift: {path} is missing; the raw images of all validation cases are needed")
    return images


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
    folds = sorted(set(inputs.methods[0].folds.values()))
    ending = inputs.labels.file_ending
    for fold in folds:
        cases = [case for case in inputs.cases if inputs.methods[0].folds[case] == fold]
        _write_images({case: images[case] for case in cases}, output / FOLDER / "images" / f"fold_{fold}", ending)
        for model in models:
            _predict(model, fold, dataset, device, output)
    pairs = [
        Pair(
            model.name,
            _name(case, kind, level),
            inputs.references[case],
            _predictions(output, model, inputs.methods[0].folds[case]) / f"{_name(case, kind, level)}{ending}",
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
                        {name: values["dice"] for name, values in scores[model.name, _name(case, kind, level)].items()}
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
        "images": {
            case: [_stamp(path) for path in (*paths, _spacing_file(paths[0], ending)) if path.is_file()]
            for case, paths in images.items()
        },
    }
    if _is_current(folder, state):
        return
    _renew(folder)
    print(f"perturbing the images of {len(images)} cases into {folder} ...", flush=True)
    for case, paths in images.items():
        for kind, strengths in STRENGTHS.items():
            for level, strength in enumerate(strengths):
                if (spacing := _spacing_file(paths[0], ending)).is_file():
                    shutil.copyfile(spacing, folder / f"{_name(case, kind, level)}.json")
                for channel, path in enumerate(paths):
                    name = f"{_name(case, kind, level)}_{channel:04d}{ending}"
                    perturb_file(path, folder / name, kind, strength, zlib.crc32(f"{case} {kind} {channel}".encode()))
    _finish(folder, state)


def _spacing_file(image: Path, ending: str) -> Path:
    """Where nnU-Net's TIFF reader looks for the spacing of CASE_0000.tif: CASE.json."""
    return image.with_name(f"{image.name.removesuffix(ending)[: -len('_0000')]}.json")


def _predict(model: Model, fold: str, dataset: str, device: str, output: Path) -> None:
    images, target = output / FOLDER / "images" / f"fold_{fold}", _predictions(output, model, fold)
    stamp = _stamp(model.fold(fold) / "checkpoint_final.pth")
    state = {"images": read_json(_state_file(images)), "checkpoint": stamp}
    if _is_current(target, state):
        return
    _renew(target)
    arguments = [
        "-i",
        str(images),
        "-o",
        str(target),
        "-d",
        dataset,
        "-c",
        model.configuration,
        "-p",
        model.plans,
        "-tr",
        model.trainer,
        "-f",
        fold,
        "-device",
        device,
        "-npp",
        "1",
        "-nps",
        "1",
    ]
    log = output / LOGS / f"shift_{model.folder.name}_fold_{fold}.log"
    run_nnunet("nnUNetv2_predict", arguments, f"predicting with {model.name}, fold {fold}", output, log, prediction_progress)
    _finish(target, state)


def _name(case: str, kind: str, level: int) -> str:
    return f"{case}__{kind}{level + 1}"


def _predictions(output: Path, model: Model, fold: str) -> Path:
    return output / FOLDER / "predictions" / model.folder.name / f"fold_{fold}"


def _stamp(path: Path) -> list:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _state_file(folder: Path) -> Path:
    """Beside the folder: nnU-Net reads every file in it."""
    return folder.with_name(f"{folder.name}.json")


def _is_current(folder: Path, state: dict) -> bool:
    try:
        return folder.is_dir() and read_json(_state_file(folder)) == state
    except (OSError, ValueError):
        return False


def _renew(folder: Path) -> None:
    _state_file(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(folder: Path, state: dict) -> None:
    write_json(_state_file(folder), state)
