"""Reads what is to be compared: finished folds of models, or folders of predictions. Unequal case lists are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnunet_l2g.compare.curves import Curves, read_logs
from nnunet_l2g.compare.models import Model, nnunet_folder, read_checkpoint
from nnunet_l2g.compare.summaries import read_summary
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Pair
from nnunet_l2g.evaluation.folders import references_for, segmentations, some
from nnunet_l2g.evaluation.labels import Labels, read_dataset_json, read_labels
from nnunet_l2g.files import DAMAGE, read_object


@dataclass
class Run:
    """One training of a method, or one folder of its predictions.

    name : in messages
    predictions : file of each case
    folds : the fold that validated each case; empty for folders of predictions
    epochs, curves : by fold
    parameters : numbers in the network's state; None if unknown
    mirroring : axes that prediction mirrors; None for none, or unknown
    summaries : nnU-Net's Dice by case and label values
    """

    name: str
    predictions: dict[str, Path]
    folds: dict[str, str] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    parameters: int | None = None
    mirroring: tuple[int, ...] | None = None
    summaries: dict[str, dict[tuple[int, ...], float]] = field(default_factory=dict)


@dataclass
class Method:
    """One side of the comparison: a name, and the runs that show what it does. Run 1 is the first.

    ensemble : whether its one run is made of another method's
    """

    name: str
    runs: list[Run]
    ensemble: bool = False


@dataclass
class Inputs:
    """Methods, the baseline first, with the references they share."""

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
    methods : of each method its models, one a run, with all `folds` finished (`check_folds`)
    reference : folder of references; None takes gt_segmentations in nnUNet_preprocessed

    Raises
    ------
    UserError : models of different labels, a damaged summary, validation files that are not the summary's, a case in two
        folds, unequal case lists, no reference
    """
    first = methods[0][0].folder / "dataset.json"
    for model in [model for models in methods for model in models][1:]:
        theirs = model.folder / "dataset.json"
        if read_dataset_json(theirs)["labels"] != read_dataset_json(first)["labels"]:
            raise UserError(f"{theirs} declares other labels than {first}; only models of the same labels can be compared")
    labels = read_labels(first)
    read = [Method(models[0].name, [_read_model(m, folds, labels.file_ending) for m in models]) for models in methods]
    check_same_cases([run for method in read for run in method.runs])
    if reference is None:
        reference = nnunet_folder("preprocessed") / dataset / "gt_segmentations"
        if not reference.is_dir():
            raise UserError(
                f"{reference}: no such folder; run nnUNetv2_plan_and_preprocess, or name the folder of references "
                "(labelsTr) with --reference"
            )
    cases = list(read[0].runs[0].predictions)
    return Inputs(read, references_for(cases, reference, labels.file_ending), _reread(labels, first, reference), [])


def read_folders(predictions: list[tuple[str, Path]], reference: Path, dataset_json: Path | None) -> Inputs:
    """Folders of predictions of the same cases.

    Parameters
    ----------
    predictions : (name, folder), the baseline first; folders of one name are its runs
    dataset_json : None takes the one that nnU-Net put beside the predictions, or beside or above the references

    Raises
    ------
    UserError : a folder is missing, empty or given twice to one name, case lists differ, a case has no reference, no
        dataset.json
    """
    seen = set()
    for name, folder in predictions:
        if not folder.is_dir():
            raise UserError(f"--predictions {name}={folder}: no such folder")
        if (run := (name, folder.resolve())) in seen:
            raise UserError(f"--predictions {name}={folder}: named twice; each run of {name} has its own folder")
        seen.add(run)
    if not reference.is_dir():
        raise UserError(f"--reference {reference}: no such folder")
    if dataset_json is None:
        places = [*(folder for _, folder in predictions), reference, reference.parent]
        dataset_json = next((place / "dataset.json" for place in places if (place / "dataset.json").is_file()), None)
        if dataset_json is None:
            raise UserError(f"no dataset.json in {', '.join(str(place) for place in places)}; name it with --dataset-json")
    labels = read_labels(dataset_json)
    methods = [Method(name, []) for name in dict.fromkeys(name for name, _ in predictions)]
    for method in methods:
        for number, folder in enumerate((folder for name, folder in predictions if name == method.name), 1):
            shown = method.name if number == 1 else f"{method.name} run {number}"
            method.runs.append(Run(shown, segmentations(folder, labels.file_ending)))
    check_same_cases([run for method in methods for run in method.runs])
    cases = list(methods[0].runs[0].predictions)
    references = references_for(cases, reference, labels.file_ending)
    warnings = []
    left = sorted(set(segmentations(reference, labels.file_ending)) - set(cases))
    if left:
        warnings.append(
            f"{len(left)} of {len(left) + len(cases)} references have no prediction and are left out: {some(left)}."
        )
    return Inputs(methods, references, _reread(labels, dataset_json, reference), warnings)


def check_same_cases(runs: list[Run]) -> None:
    """UserError unless all runs have the first one's cases, in the same folds; nothing is averaged over other sets."""
    first = runs[0]
    for run in runs[1:]:
        only = [
            f"only {one.name} has {some(sorted(extra))}"
            for one, other in ((first, run), (run, first))
            if (extra := set(one.predictions) - set(other.predictions))
        ]
        if only:
            raise UserError(
                f"{first.name} and {run.name} have other cases: {'; '.join(only)}. Compare them on the same cases "
                "(the same splits_final.json for trainings, the same images for predictions)"
            )
        moved = [case for case, fold in run.folds.items() if first.folds.get(case) != fold]
        if moved:
            raise UserError(
                f"{first.name} and {run.name} validate {some(moved)} in other folds: they were trained with "
                "other splits; train both with one splits_final.json"
            )


def _read_model(model: Model, folds: list[str], ending: str) -> Run:
    run = Run(model.name, {})
    for fold in folds:
        folder = model.fold(fold)
        validation = folder / "validation"
        files = segmentations(validation, ending)
        summary = read_summary(validation / "summary.json")
        evaluated = {name.removesuffix(ending) for name in summary}
        if evaluated != set(files):
            raise UserError(
                f"{validation}: holds {len(files)} segmentations, its summary.json {len(evaluated)}; they differ in "
                f"{some(sorted(evaluated ^ set(files)))}; validate again: nnUNetv2_train ... {fold} --val"
            )
        twice = [case for case in files if case in run.predictions]
        if twice:
            raise UserError(
                f"{model.folder}: {some(twice)} validated in fold {run.folds[twice[0]]} and in fold {fold}; cases "
                "have to be independent, so name folds that share none"
            )
        run.predictions |= files
        run.folds |= dict.fromkeys(files, fold)
        run.summaries |= {name.removesuffix(ending): scores for name, scores in summary.items()}
        checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
        run.curves[fold] = read_logs(folder) if checkpoint is None else checkpoint.curves
        run.epochs[fold] = run.curves[fold].epochs if checkpoint is None else checkpoint.epochs
        if checkpoint is not None:
            run.parameters, run.mirroring = checkpoint.parameters, checkpoint.mirroring
    return run


def _reread(labels: Labels, dataset_json: Path, reference: Path) -> Labels:
    """The labels with a reader that was tried on one of the references: nnU-Net's own way to choose it."""
    return read_labels(dataset_json, next(iter(segmentations(reference, labels.file_ending).values())))


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
