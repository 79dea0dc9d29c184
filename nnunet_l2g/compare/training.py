"""The trainings of a comparison. A training is one fold of one run; nnU-Net's own command trains and validates it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import read_object, write_text
from nnunet_l2g.nnunet import Child, child_environment, shown_command

LOGS = "logs"  # nnU-Net's output, in the report's folder
SCRIPT = "nnUNetv2_train"
FINISHED, NOT_VALIDATED, UNFINISHED, MISSING = "finished", "not validated", "unfinished", "missing"
CONTINUE = {NOT_VALIDATED: ["--val"], UNFINISHED: ["--c"]}  # options of nnUNetv2_train


@dataclass(frozen=True)
class Training:
    """One fold of one model; `dataset` is the folder's name."""

    model: Model
    fold: str
    dataset: str

    @property
    def name(self) -> str:
        return f"{self.model.name}, fold {self.fold}"

    @property
    def folder(self) -> Path:
        return self.model.fold(self.fold)

    @property
    def state(self) -> str:
        """How far it is at this moment. UNFINISHED if there is a checkpoint to continue from, of a pretraining stage too."""
        if (self.folder / "checkpoint_final.pth").is_file():
            return FINISHED if (self.folder / "validation" / "summary.json").is_file() else NOT_VALIDATED
        names = ("checkpoint_latest.pth", "checkpoint_best.pth", "stage_*.pth")
        return UNFINISHED if any(path for name in names for path in self.folder.glob(name)) else MISSING

    def arguments(self, options: Sequence[str] = ()) -> list[str]:
        """Of nnUNetv2_train, which begins the training, continues it (--c) or only validates (--val)."""
        named = [self.dataset, self.model.configuration, self.fold, "-tr", self.model.trainer, "-p", self.model.plans]
        return [*named, *options, *CONTINUE.get(self.state, [])]

    def log(self, output: Path) -> Path:
        """nnU-Net's output, below the report's folder."""
        return output / LOGS / f"{self.model.folder.name}_fold_{self.fold}.log"

    def start(self, output: Path, options: list[str], environment: dict[str, str] | None = None, **more) -> Child:
        """Starts nnUNetv2_train with `options` where the training stands.

        `environment` is added to this process's own. `more` are parameters of `Child`.
        """
        set_broken_aside(self.folder)
        environment = child_environment() | (environment or {})
        return Child(SCRIPT, self.arguments(options), f"training {self.name}", output, environment, self.log(output), **more)

    def failure(self, child: Child) -> str | None:
        """What to tell about a child that has ended: it failed, or the training is not finished. None if all is well."""
        if (failure := child.failure()) is not None or self.state == FINISHED:
            return failure
        return f"{child.shown} ended without an error, but {self.folder} is {self.state}; see {child.log}"


def missing_trainings(models: list[Model], folds: list[str], dataset: str) -> list[Training]:
    """Those that are not finished, in the order of the models."""
    trainings = [Training(model, fold, dataset) for model in models for fold in folds]
    return [training for training in trainings if training.state != FINISHED]


def check_folds(models: list[Model], folds: list[str], dataset: str) -> None:
    """UserError unless every fold of every model is finished. It names each that is not, and the command to run."""
    missing = missing_trainings(models, folds, dataset)
    if not missing:
        return
    results = models[0].folder.parent
    there = ", ".join(sorted(path.name for path in results.glob("*__*__*"))) or "no trainings"
    lines = [f"  {training.folder}: {training.state}; {shown_command(SCRIPT, training.arguments())}" for training in missing]
    head = f"{len(lines)} of the trainings to compare are not finished; run them, or let --train do it:"
    raise UserError("\n".join([head, *lines, f"  {results} holds {there}"]))


def set_broken_aside(folder: Path) -> None:
    """Renames checkpoints that nnU-Net had half written when it was killed, so that --c takes the one before."""
    for path in sorted(folder.glob("checkpoint_*.pth")):
        if not zipfile.is_zipfile(path):  # torch.save writes the directory of the zip file last
            aside = path.with_suffix(".broken")
            os.replace(path, aside)
            print(f"{path}: only partly written when its training was killed; now {aside.name}", flush=True)


def check_trainable(trainings: list[Training]) -> None:
    """UserError, before any hour is spent, unless nnU-Net finds every trainer and the preprocessed data of every plan.

    Writes splits_final.json as nnU-Net's first training would, because trainings that begin together would all write it.
    """
    for trainer in dict.fromkeys(training.model.trainer for training in trainings):
        check_trainer(trainer)
    preprocessed = nnunet_folder("preprocessed") / trainings[0].dataset
    data = dict.fromkeys((training.model.plans, training.model.configuration) for training in trainings)
    cases, *_ = [case_names(preprocessed, plans, configuration) for plans, configuration in data]
    splits = preprocessed / "splits_final.json"
    if trainings[0].fold != "all" and not splits.is_file():
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        if len(cases) < 5:
            raise UserError(
                f"{preprocessed}: nnU-Net splits 5 cases or more, found {len(cases)}; write {splits}, or use -f all"
            )
        write_text(splits, json.dumps(generate_crossval_split(cases, seed=12345, n_splits=5), indent=4))


def check_trainer(trainer: str) -> type:
    """The class that nnU-Net finds. UserError if it finds none."""
    from nnunet_l2g.lookup import explain, find_trainer

    try:
        found = find_trainer(trainer)
    except Exception as error:  # the look-up imports modules of any kind
        if str(error).startswith(f"trainer {trainer}: "):  # a name with lengths or a run that is not well formed
            raise UserError(f"-tr: {error}") from error
        raise UserError(f"-tr {trainer}: nnU-Net's look-up fails: " + "; ".join(explain(error))) from error
    if found is None:
        raise UserError(f"-tr {trainer}: nnU-Net finds no trainer of this name; check the spelling, or run `nnunet_l2g doctor`")
    return found


def case_names(preprocessed: Path, plans: str, configuration: str) -> list[str]:
    """The preprocessed cases of a dataset, sorted. UserError if they, the plans or the configuration are missing or damaged."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnunet_l2g.nnunet_files import check_plans

    path = preprocessed / f"{plans}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such plans; run nnUNetv2_plan_and_preprocess for {preprocessed.name} first")
    try:
        manager = check_plans(read_object(path), path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); plan the dataset again") from error
    if configuration not in manager.available_configurations:
        raise UserError(f"-c {configuration}: {plans} has {', '.join(manager.available_configurations)}")
    folder = preprocessed / manager.get_configuration(configuration).data_identifier
    try:
        return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (OSError, AssertionError, KeyError) as error:
        command = f"nnUNetv2_preprocess -d {preprocessed.name} -plans_name {plans} -c {configuration}"
        raise UserError(f"{folder}: no data that nnU-Net can train on ({error}); run {command}") from error
