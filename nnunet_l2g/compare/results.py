"""Reads what is to be compared: finished folds of trained models, or folders of predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnunet_l2g.compare.curves import Curves
from nnunet_l2g.compare.models import Model, nnunet_folder, read_checkpoint
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Pair, references_for, segmentations, some
from nnunet_l2g.evaluation.labels import Labels, read_dataset_json, read_labels
from nnunet_l2g.files import DAMAGE, read_object


@dataclass
class Run:
    """One training of a method, or one folder of its predictions.

    name : in messages
    predictions : file of each case
    folds : the fold that validated each case; empty for folders of predictions
    epochs, curves : by fold; a fold whose checkpoint cannot be read safely is missing
    parameters : numbers in the network's state; None if unknown
    mirroring : axes that prediction mirrors; None for none, or unknown
    """

    name: str
    predictions: dict[str, Path]
    folds: dict[str, str] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    parameters: int | None = None
    mirroring: tuple[int, ...] | None = None


@dataclass
class Method:
    """A name and its runs, run 1 first. `ensemble` : whether its one run was made from the runs of another method."""

    name: str
    runs: list[Run]
    ensemble: bool = False


@dataclass
class Inputs:
    """The methods, the baseline first, and the references that they share."""

    methods: list[Method]
    references: dict[str, Path]
    labels: Labels
    warnings: list[str]

    @property
    def cases(self) -> list[str]:
        return sorted(self.references)

    @property
    def runs(self) -> list[Run]:
        """Of all methods, the baseline's first."""
        return [run for method in self.methods for run in method.runs]

    @property
    def folds(self) -> list[str]:
        """Of trainings; none for folders of predictions."""
        return sorted(set(self.runs[0].folds.values()))

    def pairs(self) -> list[Pair]:
        """Every case of every run."""
        return [
            Pair(method.name, case, self.references[case], run.predictions[case], number)
            for method in self.methods
            for number, run in enumerate(method.runs, 1)
            for case in self.cases
        ]


def read_models(methods: list[list[Model]], folds: list[str], dataset: str, reference: Path | None = None) -> Inputs:
    """The validation cases of finished folds.

    Parameters
    ----------
    methods : the models of each method, one for each run, with all `folds` finished (`check_folds`)
    reference : folder of references; None takes gt_segmentations in nnUNet_preprocessed

    Raises
    ------
    UserError : models have different labels or cases, a case lies in two folds or has no reference
    """
    description = methods[0][0].folder / "dataset.json"
    for theirs in (model.folder / "dataset.json" for models in methods for model in models):
        if read_dataset_json(theirs)["labels"] != read_dataset_json(description)["labels"]:
            raise UserError(
                f"{theirs} declares other labels than {description}; only models of the same labels can be compared"
            )
    if reference is None:
        reference = nnunet_folder("preprocessed") / dataset / "gt_segmentations"
        if not reference.is_dir():
            raise UserError(
                f"{reference}: no such folder; run nnUNetv2_plan_and_preprocess, or name the folder of references "
                "(labelsTr) with --reference"
            )
    ending = read_labels(description).file_ending
    read = [Method(models[0].name, [_read_model(model, folds, ending) for model in models]) for models in methods]
    return _inputs(read, reference, description)


def read_folders(predictions: list[tuple[str, Path]], reference: Path, dataset_json: Path | None) -> Inputs:
    """Folders of predictions of the same cases.

    Parameters
    ----------
    predictions : (name, folder), the baseline first; folders of one name are its runs
    dataset_json : None takes the one that nnU-Net put beside the predictions, or beside or above the references

    Raises
    ------
    UserError : a folder is missing, empty or named twice for one method, cases differ or have no reference, no dataset.json
    """
    for number, (name, folder) in enumerate(predictions):
        if not folder.is_dir():
            raise UserError(f"--predictions {name}={folder}: no such folder")
        if (name, folder.resolve()) in [(other, path.resolve()) for other, path in predictions[:number]]:
            raise UserError(f"--predictions {name}={folder}: named twice; each run of {name} has its own folder")
    if not reference.is_dir():
        raise UserError(f"--reference {reference}: no such folder")
    if dataset_json is None:
        places = [*(folder for _, folder in predictions), reference, reference.parent]
        dataset_json = next((place / "dataset.json" for place in places if (place / "dataset.json").is_file()), None)
        if dataset_json is None:
            raise UserError(f"no dataset.json in {', '.join(str(place) for place in places)}; name it with --dataset-json")
    ending = read_labels(dataset_json).file_ending
    methods: dict[str, Method] = {}
    for name, folder in predictions:
        runs = methods.setdefault(name, Method(name, [])).runs
        runs.append(Run(f"{name} run {len(runs) + 1}" if runs else name, segmentations(folder, ending)))
    inputs = _inputs(list(methods.values()), reference, dataset_json)
    every = segmentations(reference, ending)
    if left := sorted(set(every) - set(inputs.cases)):
        inputs.warnings.append(f"{len(left)} of {len(every)} references have no prediction and are left out: {some(left)}.")
    return inputs


def read_plans(model: Model) -> dict:
    """plans.json of a trained model. UserError if it is missing or damaged, or lacks the configuration."""
    path = model.folder / "plans.json"
    try:
        plans = read_object(path)
        if not all(isinstance(plans["configurations"][name], dict) for name in (*plans["configurations"], model.configuration)):
            raise ValueError("a configuration is no JSON object")
    except DAMAGE as error:
        raise UserError(
            f"{path}: cannot be used ({type(error).__name__}: {error}); expected the plans that nnU-Net put beside "
            f"the model, with the configuration {model.configuration}"
        ) from error
    return plans


def _inputs(methods: list[Method], reference: Path, dataset_json: Path) -> Inputs:
    """The methods with their references, after a check that all runs have the same cases in the same folds."""
    first = methods[0].runs[0]
    for run in (run for method in methods for run in method.runs):
        for one, other in ((first, run), (run, first)):
            if only := sorted(set(one.predictions) - set(other.predictions)):
                raise UserError(
                    f"{first.name} and {run.name} have other cases: only {one.name} has {some(only)}. Compare them on the same "
                    "cases (the same splits_final.json for trainings, the same images for predictions)"
                )
        if moved := [case for case, fold in run.folds.items() if first.folds.get(case) != fold]:
            raise UserError(
                f"{first.name} and {run.name} validate {some(moved)} in other folds: they were trained with "
                "other splits; train both with one splits_final.json"
            )
    ending = read_labels(dataset_json).file_ending
    references = references_for(list(first.predictions), reference, ending)
    labels = read_labels(dataset_json, next(iter(segmentations(reference, ending).values())))  # a reader that opens a reference
    return Inputs(methods, references, labels, [])


def _read_model(model: Model, folds: list[str], ending: str) -> Run:
    run = Run(model.name, {})
    for fold in folds:
        files = segmentations(model.fold(fold) / "validation", ending)
        if twice := sorted(files.keys() & run.predictions.keys()):
            raise UserError(
                f"{model.folder}: {some(twice)} validated in fold {run.folds[twice[0]]} and in fold {fold}; cases "
                "have to be independent, so name folds that share none"
            )
        run.predictions |= files
        run.folds |= dict.fromkeys(files, fold)
        checkpoint = read_checkpoint(model.fold(fold) / "checkpoint_final.pth")
        if checkpoint is not None:
            run.curves[fold], run.epochs[fold] = checkpoint.curves, checkpoint.epochs
            run.parameters, run.mirroring = checkpoint.parameters, checkpoint.mirroring
    return run
