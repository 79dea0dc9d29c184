"""What makes a comparison unfair although its cases match; said loudly, not refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Inputs, Run, read_plans
from nnunet_l2g.compare.summaries import disagreements
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.folders import some
from nnunet_l2g.evaluation.labels import read_dataset_json
from nnunet_l2g.files import DAMAGE, read_json

FEW_CASES = 6
DATASET_KEYS = {
    "regions_class_order": "The label values of their predictions mean other regions; both were scored by the first one's.",
    "channel_names": "They may have seen other images, or have normalised them otherwise.",
    "file_ending": "They were trained on other files.",
}  # of dataset.json, and what a difference means
NOT_COMPARED = ("data_identifier", "architecture", "network_arch_class_name")  # the method's own business, or only a name


def model_warnings(models: list[Model], folds: list[str], runs: list[Run], dataset: str) -> list[str]:
    """Other datasets, plans, epochs or splits, checkpoints newer than their validation, and folds that prove little.

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
        *_datasets(models),
        *_plans([model for model, _ in first]),
        *_epochs([run for _, run in first]),
        *_stale(models, folds),
        *_splits(runs[0], dataset),
    ]
    if "all" in folds:
        warnings.append("Fold all validates on its own training cases: these scores say nothing about new images.")
    elif len(folds) < 5 and len(first) == len(runs):
        named = f"{'Folds' if len(folds) > 1 else 'Fold'} {', '.join(folds)}"
        warnings.append(
            f"{named} only: differences between folds are often larger than between methods; five folds, or a test set, tell "
            "more."
        )
    return warnings


def score_warnings(inputs: Inputs, scores: dict[tuple[str, int, str], dict[str, dict]]) -> list[str]:
    """Too few cases for the test, and Dice that is not what nnU-Net's summary says."""
    warnings = []
    if len(inputs.cases) < FEW_CASES:
        warnings.append(
            f"{len(inputs.cases)} case{'s' * (len(inputs.cases) > 1)} only: what holds for so few says little about others; "
            "below two, there is no interval."
        )
    numbers = {method.name: len(method.runs) for method in inputs.methods if not method.ensemble}
    if len(set(numbers.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in numbers.items())
        warnings.append(f"Unequal numbers of runs: {shown}. The method with fewer limits what can be seen.")
    for method in inputs.methods:
        all_scores = []
        for number, run in enumerate(method.runs, 1):
            mine = {case: scores[method.name, number, case] for case in inputs.cases}
            if mine in all_scores:
                twin = method.runs[all_scores.index(mine)].name
                warnings.append(
                    f"{run.name} and {twin} have the same scores in every case: they may be copies of one training."
                )
            all_scores.append(mine)
            different = disagreements(run.summaries, mine, inputs.labels.structures)
            if different:
                warnings.append(
                    f"{run.name}: Dice of {some(different)} is not what nnU-Net's summary.json says; predictions or "
                    "references changed after the validation. Validate again (nnUNetv2_train ... --val)."
                )
    return warnings


def dropped_warnings(paired: pd.DataFrame) -> list[str]:
    """Cases that count in some runs only: the structure is not in the reference, and these runs invented it."""
    rows = paired[(paired["score"] == "dice") & (paired["dropped"] > 0)]
    return [
        f"{row.structure}: {row.dropped} cases are left out of the difference between {row.method} and {row.baseline}: their "
        "references do not have it, and only some runs predicted it there. See the table of empty structures."
        for row in rows.itertuples()
    ]


def _datasets(models: list[Model]) -> list[str]:
    """What else than the labels differs between the dataset.json of two models, and what it means."""
    first = read_dataset_json(models[0].folder / "dataset.json")
    warnings = []
    for model in models[1:]:
        other = read_dataset_json(model.folder / "dataset.json")
        for key, meaning in DATASET_KEYS.items():
            if first.get(key) != other.get(key):
                warnings.append(
                    f"{models[0].name} and {model.name} were trained with other {key}: {_short(first.get(key))} / "
                    f"{_short(other.get(key))}. {meaning}"
                )
    return warnings


def _plans(models: list[Model]) -> list[str]:
    first = _resolved(models[0])
    warnings = []
    for model in models[1:]:
        other = _resolved(model)
        keys = sorted({*first, *other} - set(NOT_COMPARED))
        differences = [
            f"{key} {_short(first.get(key))} / {_short(other.get(key))}" for key in keys if first.get(key) != other.get(key)
        ]
        if differences:
            warnings.append(
                f"{models[0].name} and {model.name} were trained with other plans: {'; '.join(differences)}. "
                "The difference between them is not the method's alone."
            )
    return warnings


def _check_run(first: Model, first_run: Run, model: Model, run: Run) -> None:
    one, other = _resolved(first), _resolved(model)
    differences = [
        f"{key} {_short(one.get(key))} / {_short(other.get(key))}" for key in one | other if one.get(key) != other.get(key)
    ]
    epochs = [sorted(set(r.epochs.values())) for r in (first_run, run)]
    if epochs[0] != epochs[1]:
        differences.append(f"epochs {epochs[0]} / {epochs[1]}")
    if differences:
        raise UserError(
            f"{model.folder} is no further run of {first.folder.name}: {'; '.join(differences)}. Runs differ in their random "
            "numbers alone; train it again, or compare fewer runs"
        )


def _resolved(model: Model) -> dict:
    """The configuration with what it inherits."""
    plans = read_plans(model)
    name, chain = model.configuration, []
    while isinstance(name, str) and name not in chain:
        chain.append(name)
        name = plans["configurations"].get(name, {}).get("inherits_from")
    resolved: dict = {}
    for name in reversed(chain):
        resolved |= plans["configurations"].get(name, {})
    resolved.pop("inherits_from", None)
    return resolved | {"backbone": _backbone(resolved)}


def _backbone(configuration: dict) -> object:
    """Width and depth of the planned network, without its class."""
    try:
        arguments = configuration["architecture"]["arch_kwargs"]
        return {key: arguments.get(key) for key in ("n_stages", "features_per_stage", "strides")}
    except DAMAGE:  # plans of before nnU-Net 2.3 have none
        return None


def _epochs(runs: list[Run]) -> list[str]:
    lengths = {run.name: sorted(set(run.epochs.values())) for run in runs}
    if len({tuple(values) for values in lengths.values()}) < 2 and all(len(values) < 2 for values in lengths.values()):
        return []
    shown = ", ".join(f"{name} {' and '.join(map(str, values))}" for name, values in lengths.items())
    return [f"Trained for other numbers of epochs: {shown}. Longer training alone may explain a difference."]


def _stale(models: list[Model], folds: list[str]) -> list[str]:
    warnings = []
    for model in models:
        for fold in folds:
            folder = model.fold(fold)
            written = (folder / "validation" / "summary.json").stat().st_mtime
            if (folder / "checkpoint_final.pth").stat().st_mtime > written:
                warnings.append(
                    f"{folder}: checkpoint_final.pth is newer than validation/summary.json, so the predictions may be "
                    f"an older training's. Validate again (nnUNetv2_train ... {fold} --val)."
                )
            if (folder / "checkpoint_latest.pth").is_file():
                warnings.append(
                    f"{folder}: beside checkpoint_final.pth lies checkpoint_latest.pth, so another training began "
                    "here after the one that is compared."
                )
    return warnings


def _splits(run: Run, dataset: str) -> list[str]:
    """The cases that were validated are those of splits_final.json, if it can be found."""
    try:
        path = nnunet_folder("preprocessed") / dataset / "splits_final.json"
    except UserError:
        return []
    if not path.is_file():
        return []
    try:
        validation = [{str(case) for case in split["val"]} for split in read_json(path)]
    except DAMAGE as error:
        return [f"{path} cannot be read ({type(error).__name__}: {error}), so it is not known whether it was changed."]
    return [warning for fold in sorted(set(run.folds.values())) for warning in _split(run, fold, validation, path)]


def _split(run: Run, fold: str, validation: list[set[str]], path: Path) -> list[str]:
    if not fold.isdigit() or int(fold) >= len(validation):
        return []
    validated = {case for case, number in run.folds.items() if number == fold}
    different = sorted(validated ^ validation[int(fold)])
    if not different:
        return []
    return [f"{path} has another fold {fold} than the models validated ({some(different)}): it was changed after training."]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
