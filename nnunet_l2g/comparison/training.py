"""Trains and validates what is missing, through nnU-Net's own command lines, one fold after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.comparison.models import FINISHED, NOT_VALIDATED, UNFINISHED, Model, nnunet_folder
from nnunet_l2g.demo.nnunet import nnunet_command, shown_command
from nnunet_l2g.demo.progress import TrainingProgress
from nnunet_l2g.demo.runner import run_child
from nnunet_l2g.errors import UserError

LOGS = "logs"


def check_trainable(models: list[Model], dataset: str) -> None:
    """UserError, before any hour is spent, unless nnU-Net finds every trainer and the preprocessed data of every plan."""
    from nnunet_l2g.lookup import explain, find_trainer

    preprocessed = nnunet_folder("preprocessed") / dataset
    for plans in dict.fromkeys(model.plans for model in models):
        if not (preprocessed / f"{plans}.json").is_file():
            raise UserError(f"{preprocessed / plans}.json: no such plans; run nnUNetv2_plan_and_preprocess for {dataset} first")
    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))
    for trainer in dict.fromkeys(model.trainer for model in models):
        try:
            found = find_trainer(trainer)
        except Exception as error:  # a module of any kind may have failed
            raise UserError(f"-tr {trainer}: nnU-Net's look-up fails: " + "; ".join(explain(error))) from error
        if found is None:
            raise UserError(
                f"-tr {trainer}: nnU-Net finds no trainer of this name; check the spelling, or run `nnunet_l2g doctor`"
            )


def train_missing(models: list[Model], folds: list[str], dataset: str, device: str, output: Path) -> None:
    """Runs nnUNetv2_train for each fold that is not finished: anew, with --c, or only --val.

    Logs are kept in `output`/logs. Raises UserError if a training fails, Interrupted on Ctrl-C; finished folds stay.
    """
    todo = [(model, fold) for model in models for fold in folds if model.state(fold) != FINISHED]
    for number, (model, fold) in enumerate(todo, start=1):
        state = model.state(fold)
        extra = {NOT_VALIDATED: ["--val"], UNFINISHED: ["--c"]}.get(state, [])
        arguments = [*model.train_arguments(dataset, fold), "-device", device, *extra]
        shown = shown_command("nnUNetv2_train", arguments)
        print(f"[{number}/{len(todo)}] {shown}", flush=True)
        log = output / LOGS / f"{model.folder.name}_fold_{fold}.log"
        run_nnunet("nnUNetv2_train", arguments, f"training {model.name}, fold {fold}", output, log, TrainingProgress())
        if model.state(fold) != FINISHED:
            raise UserError(
                f"{shown} ended without an error, but {model.fold(fold)} is {model.state(fold)}; see {output / LOGS}"
            )


def run_nnunet(
    script: str, arguments: list[str], what: str, folder: Path, log: Path, progress: Callable[[str], str | None]
) -> None:
    """Runs one of nnU-Net's commands in the user's own environment. UserError with the log's last lines if it fails."""
    environment = os.environ | {
        VARIABLE: with_trainers(os.environ.get(VARIABLE, "")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "Agg",
    }
    shown = shown_command(script, arguments)
    try:
        run_child(
            nnunet_command(script, arguments),
            what=what,
            shown=shown,
            folder=folder,
            environment=environment,
            log=log,
            progress=progress,
        )
    except UserError as error:
        *report, _ = str(error).splitlines()  # the last line is advice for the demo
        advice = "What is finished is kept: mend the cause and run the same command again."
        raise UserError("\n".join([*report, advice])) from error
