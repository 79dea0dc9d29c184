"""Predicts the validation cases again, from their raw images, with nnU-Net's own command.

Predictions are kept in the report's folder and made again when an image or a checkpoint has changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Inputs, read_plans
from nnunet_l2g.compare.training import LOGS, run_nnunet
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, read_json, write_json
from nnunet_l2g.progress import prediction_progress
from nnunet_l2g.training.adapted_plans import TARGET_KEY


def raw_images(models: list[Model], inputs: Inputs, dataset: str, option: str) -> dict[str, list[Path]]:
    """The raw image files of each validation case, one for each channel; `option` is named in errors.

    UserError if one is missing, for a cascade, and for adapted plans.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    for model in models:
        plans = read_plans(model)
        if TARGET_KEY in plans:
            raise UserError(
                f"{option}: the plans of {model.trainer} are adapted to a target, so that nnU-Net's prediction normalises for "
                "it, and the validation images are the source's; compare predictions of target images with --predictions"
            )
        if plans["configurations"][model.configuration].get("previous_stage"):
            raise UserError(
                f"{option}: {model.configuration} is the second stage of a cascade, whose first stage would have to be "
                f"predicted again too; use {option} on the other configurations"
            )
    raw = nnunet_folder("raw") / dataset
    try:
        files = get_filenames_of_train_images_and_targets(str(raw))
    except (*DAMAGE, RecursionError) as error:
        raise UserError(f"{option}: the raw images in {raw} cannot be listed ({type(error).__name__}: {error})") from error
    images = {case: [Path(file) for file in files.get(case, {}).get("images", [])] for case in inputs.cases}
    for case, paths in images.items():
        for path in paths or [raw / "imagesTr" / case]:
            if not path.is_file():
                raise UserError(f"{option}: {path} is missing; the raw images of all validation cases are needed")
    return images


def predict_again(
    model: Model, fold: str, dataset: str, device: str, images: Path, target: Path, output: Path, label: str, prelude: str = ""
) -> None:
    """Predicts a folder of images, which `finish` has completed, into `target`; nothing if it is done already.

    Parameters
    ----------
    output : the report's folder
    label : of the log; `prelude` is Python code that nnU-Net's process runs first
    """
    state = {"images": read_json(_state_file(images)), "checkpoint": stamp(model.fold(fold) / "checkpoint_final.pth")}
    if is_current(target, state):
        return
    renew(target)
    arguments = ["-i", images, "-o", target, "-d", dataset, "-c", model.configuration, "-p", model.plans, "-tr", model.trainer]
    arguments += ["-f", fold, "-device", device, "-npp", "1", "-nps", "1"]
    run_nnunet(
        "nnUNetv2_predict",
        [str(argument) for argument in arguments],
        f"predicting with {model.name}, fold {fold}",
        output,
        output / LOGS / f"{label}_{model.folder.name}_fold_{fold}.log",
        prediction_progress,
        prelude,
    )
    finish(target, state)


def write_links(images: dict[str, list[Path]], folder: Path, ending: str) -> None:
    """The images as nnU-Net's prediction wants them: CASE_0000 and so on, links to the raw files."""
    state = {case: [stamp(path) for path in (*paths, *sidecar(case, paths))] for case, paths in images.items()}
    if is_current(folder, state):
        return
    renew(folder)
    for case, paths in images.items():
        for channel, path in enumerate(paths):
            (folder / f"{case}_{channel:04d}{ending}").symlink_to(path.resolve())
        for spacing in sidecar(case, paths):
            (folder / spacing.name).symlink_to(spacing.resolve())
    finish(folder, state)


def sidecar(case: str, images: list[Path]) -> list[Path]:
    """CASE.json beside the images, where nnU-Net's TIFF reader looks for the spacing; empty if there is none."""
    file = images[0].with_name(f"{case}.json")
    return [file] if file.is_file() else []


def stamp(path: Path) -> list:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _state_file(folder: Path) -> Path:
    """Beside the folder: nnU-Net reads every file in it."""
    return folder.with_name(f"{folder.name}.json")


def is_current(folder: Path, state: dict) -> bool:
    try:
        return folder.is_dir() and read_json(_state_file(folder)) == state
    except (OSError, ValueError):
        return False


def renew(folder: Path) -> None:
    _state_file(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def finish(folder: Path, state: dict) -> None:
    write_json(_state_file(folder), state)
