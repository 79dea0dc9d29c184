"""What can make a comparison unfair although its cases match. The report warns of it; runs of one method must not differ."""

from __future__ import annotations

import json

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Inputs, Run, read_plans
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import some
from nnunet_l2g.evaluation.labels import read_dataset_json
from nnunet_l2g.files import DAMAGE, read_json

FEW_CASES = 6
DATASET_KEYS = ("regions_class_order", "channel_names", "file_ending")
NOT_COMPARED = ("data_identifier", "architecture", "network_arch_class_name")  # they may differ between methods


def model_warnings(models: list[Model], folds: list[str], runs: list[Run], dataset: str) -> list[str]:
    """Other data, plans, epochs or splits, predictions older than their checkpoint, and too few folds.

    models, runs : of all methods, in one order

    Raises
    ------
    UserError : runs of one method were trained with other plans or other numbers of epochs
    """
    first = []
    for model, run in zip(models, runs, strict=True):
        if model.run == 1:
            first.append((model, run))
        else:
            _check_run(*first[-1], model, run)
    warnings = [
        *_other_settings([model for model, _ in first]),
        *_epochs([run for _, run in first]),
        *_unknown(runs, folds),
        *_stale(models, folds),
        *_splits(runs[0], dataset),
    ]
    if "all" in folds:
        warnings.append("Fold all validates on its own training cases: these scores say nothing about new images.")
    elif len(folds) < 5 and len(first) == len(runs):
        warnings.append(
            f"{'Folds' if len(folds) > 1 else 'Fold'} {', '.join(folds)} only: differences between folds are often larger than "
            "between methods; five folds, or a test set, tell more."
        )
    return warnings


def score_warnings(inputs: Inputs, scores: dict[tuple[str, int, str], dict[str, dict]]) -> list[str]:
    """Few cases, unequal numbers of runs, and runs with the same scores."""
    warnings = []
    if (count := len(inputs.cases)) < FEW_CASES:
        warnings.append(
            f"{count} case{'s' * (count > 1)} only: so few cases say little about others; with one case there is no interval."
        )
    numbers = {method.name: len(method.runs) for method in inputs.methods if not method.ensemble}
    if len(set(numbers.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in numbers.items())
        warnings.append(f"Unequal numbers of runs: {shown}. The method with fewer limits what can be seen.")
    for method in inputs.methods:
        earlier: list[dict] = []
        for number, run in enumerate(method.runs, 1):
            of_run = {case: scores[method.name, number, case] for case in inputs.cases}
            if of_run in earlier:
                same = method.runs[earlier.index(of_run)].name
                warnings.append(f"{run.name} and {same} have the same scores in every case: are they copies of one training?")
            earlier.append(of_run)
    return warnings


def _other_settings(models: list[Model]) -> list[str]:
    """Differences of plans and data between the first model and the others."""
    first, warnings = _settings(models[0]), []
    for model in models[1:]:
        differences = _differences(first, _settings(model), NOT_COMPARED)
        if differences:
            warnings.append(
                f"{models[0].name} and {model.name} were trained with other settings: {differences}. "
                "The difference between them does not come from the method alone."
            )
        if "regions_class_order" in differences:
            warnings[-1] += " The label values of their predictions mean other regions; both were scored by those of the first."
    return warnings


def _check_run(first: Model, first_run: Run, model: Model, run: Run) -> None:
    lengths = [{"epochs": sorted(set(r.epochs.values()))} for r in (first_run, run)]
    differences = _differences(_settings(first) | lengths[0], _settings(model) | lengths[1])
    if differences:
        raise UserError(
            f"{model.folder} is no further run of {first.folder.name}: {differences}. Runs differ in their random "
            "numbers alone; train it again, or compare fewer runs"
        )


def _settings(model: Model) -> dict:
    """What a training was told: its configuration in the plans, and the part of dataset.json beside the labels."""
    description = read_dataset_json(model.folder / "dataset.json")
    return _resolved(model) | {key: description.get(key) for key in DATASET_KEYS}


def _resolved(model: Model) -> dict:
    """The configuration with what it inherits, and the planned width and depth of the network."""
    configurations, name, chain = read_plans(model)["configurations"], model.configuration, []
    while isinstance(name, str) and name not in chain:
        chain.append(name)
        name = configurations.get(name, {}).get("inherits_from")
    resolved: dict = {}
    for name in reversed(chain):
        resolved |= configurations.get(name, {})
    resolved.pop("inherits_from", None)
    try:
        arguments = resolved["architecture"]["arch_kwargs"]
        resolved["backbone"] = {key: arguments.get(key) for key in ("n_stages", "features_per_stage", "strides")}
    except DAMAGE:  # plans made before nnU-Net 2.3 have none
        resolved["backbone"] = None
    return resolved


def _epochs(runs: list[Run]) -> list[str]:
    lengths = {run.name: sorted(set(run.epochs.values())) for run in runs if run.epochs}
    if len({number for numbers in lengths.values() for number in numbers}) < 2:
        return []
    shown = ", ".join(f"{name} {' and '.join(map(str, values))}" for name, values in lengths.items())
    return [f"Trained for other numbers of epochs: {shown}. Longer training alone may explain a difference."]


def _unknown(runs: list[Run], folds: list[str]) -> list[str]:
    return [
        f"{run.name}: checkpoint_final.pth of fold {', '.join(missing)} cannot be read without running code in it, so its "
        "epochs, parameters and curves are not known."
        for run in runs
        if (missing := [fold for fold in folds if fold not in run.epochs])
    ]


def _stale(models: list[Model], folds: list[str]) -> list[str]:
    warnings = []
    for folder in (model.fold(fold) for model in models for fold in folds):
        written = (folder / "validation" / "summary.json").stat().st_mtime
        if (folder / "checkpoint_final.pth").stat().st_mtime > written:
            warnings.append(
                f"{folder}: checkpoint_final.pth is newer than validation/summary.json, so the predictions may be of "
                "an older training. Validate again (nnUNetv2_train ... --val)."
            )
    return warnings


def _splits(run: Run, dataset: str) -> list[str]:
    """Folds of splits_final.json, where it is found, that are not those that were validated."""
    try:
        path = nnunet_folder("preprocessed") / dataset / "splits_final.json"
        validation = [{str(case) for case in split["val"]} for split in read_json(path)]
    except (UserError, FileNotFoundError):
        return []
    except DAMAGE as error:
        return [f"{path} cannot be read ({type(error).__name__}: {error}), so it is not known whether it was changed."]
    warnings = []
    for fold in sorted(set(run.folds.values())):
        if fold.isdigit() and int(fold) < len(validation):
            validated = {case for case, number in run.folds.items() if number == fold}
            if different := sorted(validated ^ validation[int(fold)]):
                warnings.append(
                    f"{path} has another fold {fold} than the models validated ({some(different)}): it was changed after "
                    "training."
                )
    return warnings


def _differences(one: dict, other: dict, ignored: tuple[str, ...] = ()) -> str:
    """`patch_size [8, 8] / [16, 16]; ...`: the keys in which two dictionaries differ."""
    keys = [key for key in one | other if key not in ignored and one.get(key) != other.get(key)]
    return "; ".join(f"{key} {_short(one.get(key))} / {_short(other.get(key))}" for key in keys)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
