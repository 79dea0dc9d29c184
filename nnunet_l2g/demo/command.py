"""`nnunet_l2g demo`: writes a phantom, then plans, trains and predicts it with nnU-Net's own commands, and draws the result.

Each step is done if its output is there, so the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, marker_of, open_folder, read_object, write_json
from nnunet_l2g.lookup import file_that_wins
from nnunet_l2g.nnunet import Interrupted, child_environment, choose_device, nnunet_variables, run_nnunet, shown_command

DEFAULT_TRAINER = "nnUNetTrainerL2GNet_8epochs_30iterations"
DATASET_ID, DATASET_NAME = 980, "CardiacPhantom"
DATASET = f"Dataset{DATASET_ID:03d}_{DATASET_NAME}"
CONFIGURATION, PLANS, FOLD = "2d", "nnUNetPlans", 0
NUM_TRAINING, NUM_TEST = 20, 4
SIZE, SPACING = (56, 56, 8), (2.1, 2.1, 10.0)  # voxels, mm; every structure is still a few voxels wide
LOGS, PREDICTIONS, PICTURE, SUMMARY = "logs", "predictions", "demo.png", "demo_summary.json"
# nnU-Net draws 100 million foreground intensities for the fingerprint of any dataset, with replacement. All cases of the
# phantom have about 40 thousand, and drawing so many of them takes longer than the rest of planning.
FEW_SAMPLES = """
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
DatasetFingerprintExtractor.num_foreground_voxels_for_intensitystats = property(lambda self: 1e5, lambda self, value: None)
"""
INTERRUPTED = """
nnunet_l2g demo: interrupted; no process of it is left. To go on, run the same command again (without --overwrite).
Finished steps are kept, and training continues from its last checkpoint."""


def configure(parser: argparse.ArgumentParser) -> None:
    """-o, --overwrite, --seed, --device, -tr."""
    add, home = parser.add_argument, Path("nnunet_l2g_demo")
    kept = "where all files go (default: ./nnunet_l2g_demo); finished steps in it are kept"
    add("-o", dest="folder", type=Path, default=home, metavar="FOLDER", help=kept)
    add("--overwrite", action="store_true", help="delete the files of an earlier demo in the folder first")
    add("--seed", type=int, default=0, help="of the phantom (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): a CUDA GPU if torch sees one")
    add("-tr", dest="trainer", default=DEFAULT_TRAINER, metavar="TRAINER", help="any that nnU-Net finds (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the steps whose output is missing, then writes the report. Exit status: 0 done, 130 interrupted."""
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    folder = open_demo(args.folder, {"seed": args.seed, "trainer": args.trainer}, args.overwrite)
    demo = Demo(folder, args.trainer, choose_device(args.device), args.seed)
    print(f"nnunet_l2g demo in {folder}", flush=True)
    if file := file_that_wins(args.trainer):
        print(f"note: nnU-Net takes {args.trainer} from {file}, not from nnunet_l2g", flush=True)
    begin = time.monotonic()
    try:
        demo.run()
    except (Interrupted, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - begin:.0f} s.\n{demo.closing()}")
    return 0


def open_demo(path: Path, settings: dict, overwrite: bool) -> Path:
    """Makes or opens the demo's folder. The settings that the files in it depend on are in its marker.

    UserError if the folder is somebody else's, cannot be written, or holds a demo with other settings.
    """
    folder = open_folder(path, "demo")
    marker = marker_of(folder, "demo")
    if overwrite:  # deletes what a demo writes, and nothing else that is in the folder
        for name in (*nnunet_variables(folder), LOGS, PREDICTIONS):
            shutil.rmtree(folder / name, ignore_errors=True)
        marker.unlink(missing_ok=True)
    if marker.exists():
        advice = "start again with --overwrite, or name another folder with -o"
        try:
            found = read_object(marker)
        except DAMAGE as error:
            raise UserError(f"{marker} cannot be read ({error}); {advice}") from error
        if found != settings:
            raise UserError(f"{folder} holds a demo with other settings (there {found}, now {settings}); {advice}")
    write_json(marker, settings)
    return folder


class Demo:
    """The demo in an opened folder: nnU-Net's commands, and where their results lie."""

    def __init__(self, folder: Path, trainer: str, device: str, seed: int):
        self.folder, self.trainer, self.seed = folder, trainer, seed
        self.raw, self.predictions = folder / "nnUNet_raw" / DATASET, folder / PREDICTIONS
        self.model = folder / "nnUNet_results" / DATASET / f"{trainer}__{PLANS}__{CONFIGURATION}"
        dataset, fold, chosen = str(DATASET_ID), str(FOLD), ["-tr", trainer, "-device", device]
        predict = ["-d", dataset, "-c", CONFIGURATION, "-f", fold, *chosen, "-npp", "0", "-nps", "0"]
        self.commands = {
            "plan": ("nnUNetv2_plan_and_preprocess", ["-d", dataset, "-c", CONFIGURATION, "-npfp", "1", "-np", "1"]),
            "train": ("nnUNetv2_train", [dataset, CONFIGURATION, fold, *chosen]),
            "predict": ("nnUNetv2_predict", [*predict, "-i", str(self.raw / "imagesTs"), "-o", str(self.predictions)]),
        }  # few workers, because each imports torch first

    def steps(self) -> list[tuple[str, Path, Callable[[], None]]]:
        """Title, the file or folder that the step writes last, and the step itself. Each needs the results before it."""
        last_training, last_test = f"phantom_tr{NUM_TRAINING - 1:03d}.nii.gz", f"phantom_ts{NUM_TEST - 1:03d}.nii.gz"
        planned = self.folder / "nnUNet_preprocessed" / DATASET / "gt_segmentations" / last_training
        trained = self.model / f"fold_{FOLD}" / "validation" / "summary.json"
        return [
            (f"write the phantom: {NUM_TRAINING} training and {NUM_TEST} test cases", self.raw, self.write_phantom),
            ("plan and preprocess", planned, lambda: self.run_nnunet("plan", prelude=FEW_SAMPLES)),
            (f"train {self.trainer}", trained, lambda: self.run_nnunet("train", resume=self.model.exists())),
            ("predict the test cases", self.predictions / last_test, lambda: self.run_nnunet("predict")),
        ]

    def run(self) -> None:
        """Runs the first step whose result is missing and all after it, then writes the report."""
        from nnunet_l2g.demo.report import write_report  # matplotlib

        steps, ran = self.steps(), False
        for number, (title, result, run_step) in enumerate(steps, start=1):
            head = f"[{number}/{len(steps) + 1}] {title}"
            if not ran and result.exists():
                print(f"{head}: done before", flush=True)
                continue
            print(head, flush=True)
            ran, begin = True, time.monotonic()
            run_step()
            if not result.exists():
                raise UserError(f"{title}: no error, but {result} is missing; see the logs in {self.folder / LOGS}")
            print(f"      {time.monotonic() - begin:.0f} s", flush=True)
        print(f"[{len(steps) + 1}/{len(steps) + 1}] table, picture and summary", flush=True)
        write_report(self.raw, self.predictions, self.trainer, self.folder / PICTURE, self.folder / SUMMARY)

    def write_phantom(self) -> None:
        from nnunet_l2g.phantom import write_dataset

        options = {"seed": self.seed, "dataset_id": DATASET_ID, "name": DATASET_NAME, "size": SIZE, "spacing": SPACING}
        write_dataset(self.raw.parent, NUM_TRAINING, NUM_TEST, **options)

    def run_nnunet(self, name: str, resume: bool = False, prelude: str = "") -> None:
        """Runs one of nnU-Net's commands. With --c nnU-Net begins anew if there is no checkpoint yet."""
        script, args = self.commands[name]
        run_nnunet(
            script,
            [*args, "--c"] if resume else args,
            f"step {name}",
            folder=self.folder,
            environment=child_environment(self.folder),
            log=self.folder / LOGS / f"{name}.log",
            prelude=prelude,
        )

    def closing(self) -> str:
        """Where the files are, and the commands that were run."""
        lines = [
            f"  picture  {self.folder / PICTURE}",
            f"  summary  {self.folder / SUMMARY}",
            f"  model    {self.model}",
            "To repeat it by hand (planning then draws more intensities, which takes longer):",
            *(f"  export {name}={shlex.quote(value)}" for name, value in nnunet_variables(self.folder).items()),
            *(f"  {shown_command(*command)}" for command in self.commands.values()),
        ]
        return "\n".join(lines)
