"""Predicts the validation cases again with nnU-Net's own command: perturbed (--shift), or without the method."""

from __future__ import annotations

import functools
import hashlib
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
from nnunet_l2g.files import DAMAGE
from nnunet_l2g.nnunet import child_environment, run_nnunet

Images = dict[str, list[Path]]  # of each case, one file for each channel
WriteImage = Callable[[Path, Path], None]  # from a raw image to a new one


def raw_images(models: list[Model], inputs: Inputs, dataset: str, option: str) -> Images:
    """The raw images of the validation cases. UserError, which names `option`, if one is missing, or for adapted plans."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_l2g.adapt import TARGET_KEY

    for model in models:
        if TARGET_KEY in read_plans(model):
            raise UserError(
                f"{option}: the plans of {model.trainer} are adapted to a target, so that nnU-Net's prediction normalises for "
                "it, and the validation images are the source's; compare predictions of target images with --predictions"
            )
    raw = nnunet_folder("raw") / dataset
    try:
        found = get_filenames_of_train_images_and_targets(str(raw))
        images = {case: [Path(file) for file in found[case]["images"]] for case in inputs.cases}
    except (*DAMAGE, RecursionError) as error:
        raise UserError(f"{option}: {raw} does not list the validation images ({type(error).__name__}: {error})") from error
    for path in (path for paths in images.values() for path in paths):
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
        self, methods: list[list[Model]], images: Images, name: str, variants: dict[str, WriteImage], prelude: str = ""
    ) -> dict[tuple[str, int, str], dict[str, dict]]:
        """Scores by (method, run, name of case and variant), over all folds.

        Images and predictions are kept, and made again when an image or a checkpoint has changed.

        Parameters
        ----------
        methods : of each method its models, one a run
        name : of the folder in the report's folder, for images and predictions
        variants : what is added to a case's name, and how the images of that variant are written
        prelude : Python code that nnU-Net's process runs first

        UserError if nnU-Net fails or an image cannot be read. Interrupted if a stop signal comes.
        """
        fold_of, ending = self.inputs.runs[0].folds, self.inputs.labels.file_ending
        pairs = []
        for fold in self.inputs.folds:
            cases = {case: images[case] for case in self.inputs.cases if fold_of[case] == fold}
            files = [path for case, paths in cases.items() for path in [*paths, *spacing_files(case, paths)]]
            write = functools.partial(write_images, cases, ending, variants)
            source = filled_once(self.output / name / "images", [*files, *variants], write)
            for method, model in ((models[0].name, model) for models in methods for model in models):
                predict = functools.partial(self._predict, model, fold, source, prelude)
                made_from = [source.name, model.fold(fold) / "checkpoint_final.pth"]
                target = filled_once(self.output / name / "predictions" / model.folder.name, made_from, predict)
                for case, shown in ((case, case + variant) for case in cases for variant in variants):
                    prediction = target / f"{shown}{ending}"
                    pairs.append(Pair(method, shown, self.inputs.references[case], prediction, model.run))
        return score_pairs(pairs, self.inputs.labels, self.options, self.processes)[0]

    def _predict(self, model: Model, fold: str, source: Path, prelude: str, target: Path) -> None:
        arguments = ["-i", str(source), "-o", str(target), "-d", self.dataset, "-c", model.configuration, "-p", model.plans]
        arguments += ["-tr", model.trainer, "-f", fold, "-device", self.device, "-npp", "1", "-nps", "1"]
        log = self.output / LOGS / f"predict_{model.folder.name}_fold_{fold}.log"
        options = {"folder": self.output, "environment": child_environment(), "log": log, "prelude": prelude}
        run_nnunet("nnUNetv2_predict", arguments, f"predicting with {model.name}, fold {fold}", **options)


def shift_table(predictor: Predictor, models: list[Model], images: Images) -> pd.DataFrame:
    """Columns method, kind, strength, dice: mean over structures of the mean over the validation cases of all folds.

    Raises what `Predictor.scores` raises.
    """
    shifts = {f"__{kind}{strength:g}": (kind, strength) for kind in STRENGTHS for strength in STRENGTHS[kind]}
    variants = {name: functools.partial(perturb_file, kind=kind, strength=value) for name, (kind, value) in shifts.items()}
    scores = predictor.scores([[model] for model in models], images, "shift", variants)
    rows = []
    for model in models:
        for name, shift in shifts.items():
            of_cases = [scores[model.name, model.run, case + name] for case in predictor.inputs.cases]
            dice = pd.DataFrame([{structure: found["dice"] for structure, found in case.items()} for case in of_cases])
            rows.append((model.name, *shift, dice.mean().mean()))
    return pd.DataFrame(rows, columns=["method", "kind", "strength", "dice"])


def write_images(cases: Images, ending: str, variants: dict[str, WriteImage], folder: Path) -> None:
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


def filled_once(folder: Path, made_from: list[Path | str], fill: Callable[[Path], None]) -> Path:
    """A subfolder that `fill` has filled, now or before. Its name is a digest of what it was made from.

    A file counts with its size and time, so that other contents lead to another subfolder. The subfolder gets its name when
    it is complete.
    """
    stamps = [
        (str(item), item.stat().st_size, item.stat().st_mtime_ns) if isinstance(item, Path) else item for item in made_from
    ]
    path = folder / hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    if not path.is_dir():
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(path)
    return path
