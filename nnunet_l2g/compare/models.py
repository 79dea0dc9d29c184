"""Where nnU-Net left the models that are to be compared, and how far each fold is."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.training.names import has_run, run_name

FINISHED, NOT_VALIDATED, UNFINISHED, MISSING = "finished", "not validated", "unfinished", "missing"


@dataclass(frozen=True)
class Model:
    """One run of one trainer with its plans and configuration.

    name : in tables and plots: the trainer, with what tells it apart, and the run if it is not the first
    folder : nnU-Net's DatasetXXX/Trainer__Plans__Configuration
    run : 1, 2, ...
    """

    name: str
    trainer: str
    plans: str
    configuration: str
    folder: Path
    run: int = 1

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


def choose_models(
    dataset: str, trainers: list[str], plans: list[str], configurations: list[str], runs: Sequence[int] = (1,)
) -> list[list[Model]]:
    """Of each method its models, run 1 to R; a method for each position of the lists, and a list of one serves all.

    UserError if the lengths do not fit, fewer than two methods are named, one is named twice, or runs of a run are asked for.
    """
    count = max(len(trainers), len(plans), len(configurations))
    for option, values in (("-tr", trainers), ("-p", plans), ("-c", configurations)):
        if len(values) not in (1, count):
            raise UserError(
                f"{option} {' '.join(values)}: {len(values)} names, but another of -tr, -p, -c has {count}; give "
                "one name for all methods, or one for each"
            )
    if len(runs) not in (1, count):
        raise UserError(f"--runs {' '.join(map(str, runs))}: {count} methods are compared; give one number for all, or {count}")
    triples = list(zip(*(_for_each(values, count) for values in (trainers, plans, configurations)), strict=True))
    if count < 2:
        raise UserError(
            f"-tr {trainers[0]}: nothing to compare it with; name at least two trainers (or plans, or "
            "configurations), the baseline first"
        )
    for triple in triples:
        if triples.count(triple) > 1:
            raise UserError(f"{' '.join(triple)} is named twice; name each model once")
    numbers = _for_each(runs, count)
    for (trainer, *_), number in zip(triples, numbers, strict=True):
        if number > 1 and has_run(trainer):
            raise UserError(
                f"-tr {trainer} --runs {number}: the name says a run; name the trainer without it, --runs {number} takes "
                f"runs 1 to {number}"
            )
    folder = nnunet_folder("results") / dataset
    varies = [len({triple[i] for triple in triples}) > 1 for i in range(3)]
    methods = []
    for (trainer, *rest), number in zip(triples, numbers, strict=True):
        name = " ".join(part for part, differs in zip((trainer, *rest), varies, strict=True) if differs)
        methods.append([])
        for run in range(1, number + 1):
            shown, of_run = name if run == 1 else f"{name} run {run}", (run_name(trainer, run), *rest)
            methods[-1].append(Model(shown, *of_run, folder / "__".join(of_run), run))
    return methods


def _for_each(values: Sequence, count: int) -> Sequence:
    return values if len(values) > 1 else list(values) * count


def check_folds(models: list[Model], folds: list[str], dataset: str) -> None:
    """UserError unless every fold of every model is finished: names each that is not, and the command that mends it."""
    lines = []
    for model in models:
        for fold in folds:
            state = model.state(fold)
            if state != FINISHED:
                extra = {NOT_VALIDATED: " --val", UNFINISHED: " --c", MISSING: ""}[state]
                arguments = " ".join(model.train_arguments(dataset, fold))
                lines.append(f"{model.fold(fold)}: {state}; nnUNetv2_train {arguments}{extra}")
    if lines:
        text = f"{len(lines)} of the trainings to compare are not there; run them, or let --train do it:"
        names = [_suggestion(model) for model in models if model.run == 1 and not model.folder.is_dir()]  # slips, perhaps
        raise UserError("\n  ".join([text, *lines, *names]))


def _suggestion(model: Model) -> str:
    """Names that are there and look alike."""
    results = model.folder.parent
    names = sorted(path.name for path in results.glob("*__*__*")) if results.is_dir() else []
    close = difflib.get_close_matches(model.folder.name, names, n=3) or names[:5]
    there = f"there are {', '.join(close)}" if close else f"{results.name} has no results at all"
    return f"{model.folder}: no such model; {there}"
