"""Predicts the validation cases again with nnU-Net's own command: perturbed ones (--shift), or without a method.

Predictions are kept in the report's folder. They are made again when an image or a checkpoint has changed.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Inputs, read_plans
from nnunet_l2g.compare.training import LOGS
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs
from nnunet_l2g.evaluation.shifts import STRENGTHS, perturb_file
from nnunet_l2g.files import DAMAGE, read_json, write_json
from nnunet_l2g.nnunet import child_environment, run_nnunet
from nnunet_l2g.training.adapted_plans import TARGET_KEY

WriteImage = Callable[[Path, Path], None]  # from a raw image to a new one


def raw_images(models: list[Model], inputs: Inputs, dataset: str, option: str) -> dict[str, list[Path]]:
    """The raw image files of each validation case, one for each channel. `option` is named in errors.

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
                f"{option}: {model.configuration} is the second stage of a cascade, whose first stage is not predicted again; "
                f"use {option} on the other configurations"
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


@dataclass(frozen=True)
class Predictor:
    """Predicts and scores the validation cases of trained models again.

    output : the report's folder
    options, processes : of the scoring
    """

    inputs: Inputs
    dataset: str
    device: str
    output: Path
    options: Options
    processes: int

    def scores(
        self,
        methods: list[list[Model]],
        images: dict[str, list[Path]],
        name: str,
        variants: dict[str, WriteImage],
        prelude: str = "",
    ) -> dict[tuple[str, int, str], dict[str, dict]]:
        """Scores by (method, run, name of case and variant), over all folds.

        Parameters
        ----------
        methods : of each method its models, one a run
        images : of each case, one for each channel (`raw_images`)
        name : of the folder in the report's folder, for images and predictions
        variants : what is added to a case's name, and how the images of that variant are written
        prelude : Python code that nnU-Net's process runs first

        Raises
        ------
        UserError : nnU-Net fails, or an image cannot be read
        Interrupted : a stop signal came
        """
        fold_of, ending, folder = self.inputs.runs[0].folds, self.inputs.labels.file_ending, self.output / name
        pairs = []
        for fold in self.inputs.folds:
            cases = {case: images[case] for case in self.inputs.cases if fold_of[case] == fold}
            source = folder / "images" / f"fold_{fold}"
            files = {case: [*paths, *spacing_files(case, paths)] for case, paths in cases.items()}
            state = {"variants": list(variants), "images": {case: list(map(stamp, paths)) for case, paths in files.items()}}
            if renewed(source, state):
                write_images(cases, source, ending, variants)
                write_json(state_file(source), state)
            for models in methods:
                for model in models:
                    target = folder / "predictions" / model.folder.name / f"fold_{fold}"
                    of_model = state | {"checkpoint": stamp(model.fold(fold) / "checkpoint_final.pth")}
                    if renewed(target, of_model):
                        self._predict(model, fold, source, target, name, prelude)
                        write_json(state_file(target), of_model)
                    for case in cases:
                        for variant in variants:
                            prediction = target / f"{case}{variant}{ending}"
                            reference = self.inputs.references[case]
                            pairs.append(Pair(models[0].name, case + variant, reference, prediction, model.run))
        return score_pairs(pairs, self.inputs.labels, self.options, self.processes)[0]

    def _predict(self, model: Model, fold: str, source: Path, target: Path, name: str, prelude: str) -> None:
        arguments = ["-i", str(source), "-o", str(target), "-d", self.dataset, "-c", model.configuration, "-p", model.plans]
        arguments += ["-tr", model.trainer, "-f", fold, "-device", self.device, "-npp", "1", "-nps", "1"]
        run_nnunet(
            "nnUNetv2_predict",
            arguments,
            f"predicting with {model.name}, fold {fold}",
            folder=self.output,
            environment=child_environment(),
            log=self.output / LOGS / f"{name}_{model.folder.name}_fold_{fold}.log",
            prelude=prelude,
        )


def shift_table(predictor: Predictor, models: list[Model], images: dict[str, list[Path]]) -> pd.DataFrame:
    """Columns method, kind, strength, dice: mean over structures of the mean over the validation cases of all folds.

    Raises what `Predictor.scores` raises.
    """
    shifts = {f"__{kind}{strength:g}": (kind, strength) for kind in STRENGTHS for strength in STRENGTHS[kind]}
    variants = {
        name: functools.partial(perturb_file, kind=kind, strength=strength) for name, (kind, strength) in shifts.items()
    }
    scores = predictor.scores([[model] for model in models], images, "shift", variants)
    rows = []
    for model in models:
        for name, shift in shifts.items():
            of_cases = [scores[model.name, model.run, case + name] for case in predictor.inputs.cases]
            dice = pd.DataFrame([{structure: found["dice"] for structure, found in case.items()} for case in of_cases])
            rows.append((model.name, *shift, dice.mean().mean()))
    return pd.DataFrame(rows, columns=["method", "kind", "strength", "dice"])


def write_images(cases: dict[str, list[Path]], folder: Path, ending: str, variants: dict[str, WriteImage]) -> None:
    """The images of all variants, with the names that nnU-Net's prediction expects: CASE_0000 and so on."""
    print(f"writing the images of {len(cases)} cases into {folder} ...", flush=True)
    for case, paths in cases.items():
        for variant, write in variants.items():
            for file in spacing_files(case, paths):
                (folder / f"{case}{variant}.json").symlink_to(file.resolve())
            for channel, path in enumerate(paths):
                write(path, folder / f"{case}{variant}_{channel:04d}{ending}")


def spacing_files(case: str, images: list[Path]) -> list[Path]:
    """CASE.json beside the images, where nnU-Net's TIFF reader looks for the spacing. Empty if there is none."""
    file = images[0].with_name(f"{case}.json")
    return [file] if file.is_file() else []


def stamp(path: Path) -> list:
    """What changes when a file is written again."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def renewed(folder: Path, state: dict) -> bool:
    """Whether the folder was emptied, because what it holds was not made for this state."""
    with contextlib.suppress(OSError, ValueError):
        if folder.is_dir() and read_json(state_file(folder)) == state:
            return False
    state_file(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return True


def state_file(folder: Path) -> Path:
    """Says for which images and checkpoint a folder was filled. It lies beside it: nnU-Net reads every file in the folder."""
    return folder.with_name(f"{folder.name}.json")
