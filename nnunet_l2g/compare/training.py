"""One fold to be trained and validated through nnU-Net's own command line, and what has to be there for it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.compare.models import FINISHED, NOT_VALIDATED, UNFINISHED, Model, nnunet_folder
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name, read_object, write_text
from nnunet_l2g.nnunet import nnunet_command, shown_command
from nnunet_l2g.processes import Child, run_child
from nnunet_l2g.progress import TrainingProgress

LOGS = "logs"
SCRIPT = "nnUNetv2_train"
ADVICE = "What is finished is kept: mend the cause and run the same command again."


@dataclass(frozen=True)
class Training:
    """One fold of one model.

    device : of nnUNetv2_train: cpu or cuda
    output : the report's folder; the log is written below it
    gpus : more than one is nnU-Net's own -num_gpus
    """

    model: Model
    fold: str
    dataset: str
    device: str
    output: Path
    gpus: int = 1

    @property
    def name(self) -> str:
        return f"{self.model.name}, fold {self.fold}"

    @property
    def folder(self) -> Path:
        return self.model.fold(self.fold)

    @property
    def log(self) -> Path:
        return self.output / LOGS / f"{self.model.folder.name}_fold_{self.fold}.log"

    def arguments(self) -> list[str]:
        """Of nnUNetv2_train, as the fold is at this moment: anew, with --c, or only --val."""
        state = self.model.state(self.fold)
        extra = {NOT_VALIDATED: ["--val"], UNFINISHED: ["--c"]}.get(state, [])
        if not extra and any(self.folder.glob("stage_*.pth")):  # broken off in a stage before the segmenter
            extra = ["--c"]
        count = ["-num_gpus", str(self.gpus)] if self.gpus > 1 else []
        return [*self.model.train_arguments(self.dataset, self.fold), "-device", self.device, *count, *extra]

    def start(
        self, environment: dict[str, str], prefix: str = "      ", ignored: tuple[int, ...] = (), prelude: str = ""
    ) -> Child:
        """Starts nnUNetv2_train where the fold stands.

        `environment` is added to this process's own, `prelude` is Python code to run first; the others are those of Child.
        """
        set_broken_aside(self.folder)
        arguments = self.arguments()
        python, option, code, *rest = nnunet_command(SCRIPT, arguments)
        return Child(
            [python, option, prelude + code, *rest],
            what=f"training {self.name}",
            shown=shown_command(SCRIPT, arguments),
            folder=self.output,
            environment=child_environment() | environment,
            log=self.log,
            progress=TrainingProgress(),
            prefix=prefix,
            ignored=ignored,
        )

    def failure(self, child: Child) -> str | None:
        """What to tell about a child that has ended: it failed, or it left the fold unfinished. None if all is well."""
        if (failure := child.failure()) is not None:
            return failure
        if (state := self.model.state(self.fold)) == FINISHED:
            return None
        return f"{child.shown} ended without an error, but {self.folder} is {state}; see {self.log}"


def child_environment() -> dict[str, str]:
    """The user's own, our trainers, and output that arrives line by line."""
    return os.environ | {
        VARIABLE: with_trainers(os.environ.get(VARIABLE, "")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "Agg",
    }


def run_nnunet(
    script: str,
    arguments: list[str],
    what: str,
    folder: Path,
    log: Path,
    progress: Callable[[str], str | None],
    prelude: str = "",
) -> None:
    """Runs one of nnU-Net's commands, after the Python code `prelude`, in the user's own environment.

    UserError with the log's last lines if it fails.
    """
    python, option, code, *rest = nnunet_command(script, arguments)
    run_child(
        [python, option, prelude + code, *rest],
        what=what,
        shown=shown_command(script, arguments),
        folder=folder,
        environment=child_environment(),
        log=log,
        progress=progress,
        advice=ADVICE,
    )


def missing_trainings(
    models: list[Model], folds: list[str], dataset: str, device: str, output: Path, gpus: int = 1
) -> list[Training]:
    """Those not finished, in the order of the models."""
    pairs = [(model, fold) for model in models for fold in folds if model.state(fold) != FINISHED]
    return [Training(model, fold, dataset, device, output, gpus) for model, fold in pairs]


def set_broken_aside(folder: Path) -> None:
    """Renames checkpoints that a kill left half-written, so that --c takes the one before. Ours are never half-written."""
    for path in sorted(folder.glob("checkpoint_*.pth")):
        if not zipfile.is_zipfile(path):  # torch.save writes a zip's directory last
            aside = path.with_suffix(".broken")
            os.replace(path, aside)
            print(f"{path}: only partly written when its training was killed; now {aside.name}", flush=True)


def check_trainable(models: list[Model], folds: list[str], dataset: str) -> None:
    """UserError, before any hour is spent, unless nnU-Net finds every trainer and the preprocessed data of every plan.

    Writes splits_final.json as nnU-Net's first training would: trainings that begin together would write it at once.
    """
    from nnunet_l2g.lookup import explain, find_trainer

    preprocessed = nnunet_folder("preprocessed") / dataset
    for plans in dict.fromkeys(model.plans for model in models):
        if not (preprocessed / f"{plans}.json").is_file():
            raise UserError(f"{preprocessed / plans}.json: no such plans; run nnUNetv2_plan_and_preprocess for {dataset} first")
    for trainer in dict.fromkeys(model.trainer for model in models):
        try:
            found = find_trainer(trainer)
        except Exception as error:  # a module of any kind may have failed
            if str(error).startswith(f"trainer {trainer}: "):  # a name of ours, but wrong
                raise UserError(f"-tr: {error}") from error
            raise UserError(f"-tr {trainer}: nnU-Net's look-up fails: " + "; ".join(explain(error))) from error
        if found is None:
            raise UserError(
                f"-tr {trainer}: nnU-Net finds no trainer of this name; check the spelling, or run `nnunet_l2g doctor`"
            )
    cases = {pair: case_names(preprocessed, *pair) for pair in dict.fromkeys((m.plans, m.configuration) for m in models)}
    splits = preprocessed / "splits_final.json"
    if cases and folds != ["all"] and not splits.is_file():
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        names = next(iter(cases.values()))
        if len(names) < 5:
            raise UserError(f"{dataset}: {len(names)} cases, and nnU-Net splits 5 or more; write {splits}, or train -f all")
        write_text(splits, json.dumps(generate_crossval_split(names, seed=12345, n_splits=5), indent=4))


def case_names(preprocessed: Path, plans: str, configuration: str) -> list[str]:
    """Of the preprocessed data, sorted. UserError if the plans lack the configuration, or it was not preprocessed."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    path = preprocessed / f"{plans}.json"
    try:
        content = read_object(path)
        manager, available = PlansManager(content), list(content["configurations"])
        identifier = manager.get_configuration(configuration).data_identifier if configuration in available else None
    except (*DAMAGE, RuntimeError) as error:
        raise UserError(f"{path}: not nnU-Net's plans ({type(error).__name__}: {error}); plan the dataset again") from error
    if configuration not in available:
        raise UserError(f"-c {configuration}: {plans} has {', '.join(map(str, available))}")
    folder = preprocessed / check_plain_name(identifier, f"{path}: data_identifier of {configuration}")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder}: no preprocessed data; run nnUNetv2_preprocess -d {preprocessed.name} -plans_name {plans} -c "
            f"{configuration}"
        )
    try:
        return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, KeyError) as error:
        raise UserError(f"{folder}: not what nnU-Net's preprocessing writes ({error}); preprocess again") from error
