"""Where nnU-Net left the models that are to be compared, and how far each fold is."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.errors import UserError

FINISHED, NOT_VALIDATED, UNFINISHED, MISSING = "finished", "not validated", "unfinished", "missing"


@dataclass(frozen=True)
class Model:
    """One trainer with its plans and configuration.

    name : in tables and plots: the trainer, with what tells it apart
    folder : nnU-Net's DatasetXXX/Trainer__Plans__Configuration
    """

    name: str
    trainer: str
    plans: str
    configuration: str
    folder: Path

    def fold(self, fold: str) -> Path:
        return self.folder / f"fold_{fold}"

    def state(self, fold: str) -> str:
        """How far a fold is: FINISHED, NOT_VALIDATED, UNFINISHED (has a checkpoint to continue from) or MISSING."""
        path = self.fold(fold)
        if (path / "checkpoint_final.pth").is_file():
            return FINISHED if (path / "validation" / "summary.json").is_file() else NOT_VALIDATED
        checkpoints = ("checkpoint_latest.pth", "checkpoint_best.pth")
        return UNFINISHED if any((path / name).is_file() for name in checkpoints) else MISSING

    def train_arguments(self, dataset: str, fold: str) -> list[str]:
        """Of nnUNetv2_train."""
        return [dataset, self.configuration, fold, "-tr", self.trainer, "-p", self.plans]


def nnunet_folder(kind: str) -> Path:
    """nnUNet_raw, nnUNet_preprocessed or nnUNet_results. UserError if the variable is not set or names no folder."""
    name = f"nnUNet_{kind}"
    value = os.environ.get(name)
    if not value:
        raise UserError(f"the variable {name} is not set; set it to nnU-Net's folder (`export {name}=...`)")
    path = Path(value)
    if not path.is_dir():
        raise UserError(f"{name}={value}: no such folder; set it to nnU-Net's folder")
    return path


def dataset_name(dataset: str) -> str:
    """`27`, `027` or `Dataset027_Name` to the folder's name, looked up in all of nnU-Net's folders.

    UserError if no dataset, or more than one, has that number.
    """
    folders = [Path(value) for kind in ("raw", "preprocessed", "results") if (value := os.environ.get(f"nnUNet_{kind}"))]
    names = sorted({path.name for folder in folders if folder.is_dir() for path in folder.glob("Dataset*_*") if path.is_dir()})
    if dataset in names:
        return dataset
    if not re.fullmatch("[0-9]{1,9}", dataset):
        raise UserError(f"-d {dataset}: no such dataset; nnU-Net's folders hold {', '.join(names) or 'none'}")
    found = [name for name in names if re.match(rf"Dataset{int(dataset):03d}_", name)]
    if len(found) != 1:
        have = (
            f"several: {', '.join(found)}; name one in full"
            if found
            else f"none of that number, but {', '.join(names) or 'no dataset'}"
        )
        raise UserError(f"-d {dataset}: nnU-Net's folders hold {have}")
    return found[0]


def choose_models(dataset: str, trainers: list[str], plans: list[str], configurations: list[str]) -> list[Model]:
    """One model for each position of the lists; a list of one serves all.

    UserError if the lengths do not fit, fewer than two models are named, or one is named twice.
    """
    count = max(len(trainers), len(plans), len(configurations))
    for option, values in (("-tr", trainers), ("-p", plans), ("-c", configurations)):
        if len(values) not in (1, count):
            raise UserError(
                f"{option} {' '.join(values)}: {len(values)} names, but another of -tr, -p, -c has {count}; give "
                "one name for all models, or one for each"
            )
    triples = [tuple(values[i if len(values) > 1 else 0] for values in (trainers, plans, configurations)) for i in range(count)]
    if count < 2:
        raise UserError(
            f"-tr {trainers[0]}: nothing to compare it with; name at least two trainers (or plans, or "
            "configurations), the baseline first"
        )
    for triple in triples:
        if triples.count(triple) > 1:
            raise UserError(f"{' '.join(triple)} is named twice; name each model once")
    folder = nnunet_folder("results") / dataset
    varies = [len({triple[i] for triple in triples}) > 1 for i in range(3)]
    models = []
    for triple in triples:
        parts = [part for part, differs in zip(triple, varies, strict=True) if differs]
        models.append(Model(" ".join(parts), *triple, folder / "__".join(triple)))
    return models


def check_folds(models: list[Model], folds: list[str], dataset: str) -> None:
    """UserError unless every fold of every model is finished: names each that is not, and the command that mends it."""
    lines = []
    for model in models:
        if not model.folder.is_dir():
            lines.append(f"{model.folder}: no such model{_suggestion(model)}")
            continue
        for fold in folds:
            state = model.state(fold)
            if state != FINISHED:
                extra = {NOT_VALIDATED: " --val", UNFINISHED: " --c", MISSING: ""}[state]
                arguments = " ".join(model.train_arguments(dataset, fold))
                lines.append(f"{model.fold(fold)}: {state}; nnUNetv2_train {arguments}{extra}")
    if lines:
        raise UserError(
            "\n  ".join([f"{len(lines)} of the trainings to compare are not there; run them, or let --train do it:", *lines])
        )


def _suggestion(model: Model) -> str:
    """Names that are there and look alike."""
    if not model.folder.parent.is_dir():
        return f" ({model.folder.parent.name} has no results at all)"
    names = sorted(path.name for path in model.folder.parent.iterdir() if path.name.count("__") == 2)
    close = difflib.get_close_matches(model.folder.name, names, n=3) or names[:5]
    return f"; there are {', '.join(close)}" if close else f" ({model.folder.parent.name} has no results at all)"
