"""The six steps of the demo, in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.demo.folder import LOGS, PICTURE, PREDICTIONS, PREPROCESSED, RAW, RESULTS, SUMMARY, DemoFolder
from nnunet_l2g.demo.report import write_report
from nnunet_l2g.nnunet import child_environment, run_nnunet, shown_command

DATASET_ID, DATASET_NAME = 980, "CardiacPhantom"
DATASET = f"Dataset{DATASET_ID:03d}_{DATASET_NAME}"
CONFIGURATION, PLANS, FOLD = "3d_fullres", "nnUNetPlans", 0
NUM_TRAINING, NUM_TEST = 20, 4
SIZE, SPACING = (56, 56, 8), (2.1, 2.1, 10.0)  # as small as keeps every structure a few voxels wide: CPU time


@dataclass(frozen=True)
class Step:
    """One step: run(demo, resume) does it; `result` exists afterwards. resume: an earlier try was broken off."""

    name: str
    title: str
    result: Path
    run: Callable[[bool], None]


@dataclass(frozen=True)
class Demo:
    """The demo in an opened folder, on a device, with a trainer; knows nnU-Net's commands and where results lie."""

    folder: DemoFolder
    trainer: str
    device: str
    seed: int

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def raw(self) -> Path:
        return self.path / RAW / DATASET

    @property
    def model(self) -> Path:
        return self.path / RESULTS / DATASET / f"{self.trainer}__{PLANS}__{CONFIGURATION}"

    def commands(self, resume: bool = False) -> dict[str, tuple[str, list[str]]]:
        """nnU-Net's script and arguments for each step that is one of its commands."""
        dataset, fold = str(DATASET_ID), str(FOLD)
        predictions = str(self.path / PREDICTIONS)
        train = [dataset, CONFIGURATION, fold, "-tr", self.trainer, "-device", self.device]
        predict = ["-d", dataset, "-c", CONFIGURATION, "-f", fold, "-tr", self.trainer, "-device", self.device]
        files = ["-i", str(self.raw / "imagesTs"), "-o", predictions, "-npp", "1", "-nps", "1"]
        return {
            "plan": ("nnUNetv2_plan_and_preprocess", ["-d", dataset, "-c", CONFIGURATION, "-np", "2"]),
            # without a checkpoint nnU-Net warns and starts anew, so --c is right wherever the first try broke off
            "train": ("nnUNetv2_train", [*train, "--c"] if resume else train),
            "predict": ("nnUNetv2_predict", [*predict, *files]),
            "evaluate": (
                "nnUNetv2_evaluate_folder",
                [
                    str(self.raw / "labelsTs"),
                    predictions,
                    "-djfile",
                    str(self.raw / "dataset.json"),
                    "-pfile",
                    str(self.model / "plans.json"),
                    "-np",
                    "2",
                ],
            ),
        }

    def steps(self) -> list[Step]:
        """Each step needs the results of those before it."""
        predictions = self.path / PREDICTIONS
        return [
            Step(
                "phantom", f"write the phantom: {NUM_TRAINING} training and {NUM_TEST} test cases", self.raw, self.write_phantom
            ),
            Step(
                "plan",
                "plan and preprocess",
                self.path / PREPROCESSED / DATASET / f"{PLANS}.json",
                lambda _: self.run_command("plan"),
            ),
            Step(
                "train",
                f"train {self.trainer}, fold {FOLD}, on {self.device}",
                self.model / f"fold_{FOLD}" / "checkpoint_final.pth",
                self.train,
            ),
            Step("predict", "predict the held-out test cases", predictions / "dataset.json", self.predict),
            Step(
                "evaluate",
                "evaluate the predictions",
                predictions / "summary.json",
                lambda _: self.run_command("evaluate"),
            ),
            Step("report", "table, picture and summary", self.path / PICTURE, lambda _: self.report()),
        ]

    def write_phantom(self, resume: bool) -> None:
        from nnunet_l2g.phantom import write_dataset

        if self.raw.exists():  # complete, but the demo ended before it noted so
            shutil.rmtree(self.raw)
        write_dataset(
            self.path / RAW,
            NUM_TRAINING,
            NUM_TEST,
            seed=self.seed,
            dataset_id=DATASET_ID,
            name=DATASET_NAME,
            size=SIZE,
            spacing=SPACING,
        )

    def train(self, resume: bool) -> None:
        if not resume:  # checkpoints of data that is no longer there would be mistaken for this run's
            shutil.rmtree(self.model, ignore_errors=True)
        self.run_command("train", resume)

    def predict(self, resume: bool) -> None:
        shutil.rmtree(self.path / PREDICTIONS, ignore_errors=True)
        self.run_command("predict")

    def run_command(self, name: str, resume: bool = False) -> None:
        """Runs nnU-Net's command of the step `name` as a child process."""
        script, args = self.commands(resume)[name]
        log = self.path / LOGS / f"{name}.log"
        run_nnunet(script, args, f"step {name}", folder=self.path, environment=child_environment(self.path), log=log)

    def report(self) -> None:
        commands = [shown_command(*command) for command in self.commands().values()]
        write_report(
            self.path,
            self.raw,
            self.folder.settings | {"device": self.device},
            self.folder.finished,
            commands,
            self.path / PICTURE,
            self.path / SUMMARY,
        )
