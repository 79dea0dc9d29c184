"""Kills trainings of the phantom at random moments, continues them with --c, and checks that nothing was lost.

    python benchmarks/kills.py [--kills 36] [--trainers L2GNet GRCSF GLUA] [--seed 0] [--folder DIR] [--json FILE]

Each training is nnU-Net's own command (`nnUNetv2_train`) in its own process, which gets SIGKILL at a random moment, or
after it as soon as a checkpoint is being written. After each kill:

- every checkpoint on disk can be read, holds no NaN, and is from no earlier epoch than before;
- no epoch is lost that the log calls complete, except one whose checkpoint was being written;
- no worker process is left after a while;
- the next run with --c starts at the epoch after the newest checkpoint.

After its share of kills a training has to reach its last epoch, validate and predict. If something was lost, the exit
status is 1. Processes are forked from one that has imported everything, so that a kill takes seconds. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

SOURCE, TARGET = 991, 992
EPOCHS, ITERATIONS = 6, 4
PLANS = {"GLUA": f"nnUNetPlans_to{TARGET}"}
STAGE_EPOCHS = EPOCHS // 2
NOTHING = (-1, 0)
LONGEST = 10.0  # seconds until a kill


class Breach(AssertionError):
    """Something was lost."""


@dataclass
class Training:
    """The training of one fold, and what was found after its kills."""

    name: str
    results: Path
    kills: list[dict] = field(default_factory=list)
    saved: tuple[int, int] = NOTHING  # (0 stage or 1 segmenter, epochs in the newest checkpoint)
    started: bool = False

    @property
    def trainer(self) -> str:
        return f"nnUNetTrainer{self.name}_{EPOCHS}epochs_{ITERATIONS}iterations"

    @property
    def plans(self) -> str:
        return next((plans for part, plans in PLANS.items() if part in self.name), "nnUNetPlans")

    @property
    def fold(self) -> Path:
        return next(iter(self.results.glob(f"*/{self.trainer}__{self.plans}__2d/fold_0")), self.results / "none")

    @property
    def arguments(self) -> list[str]:
        fixed = [str(SOURCE), "2d", "0", "-device", "cpu", "-tr", self.trainer, "-p", self.plans]
        return [*fixed, "--c"] if self.started else fixed

    def being_written(self) -> set[tuple[str, int]]:
        """Name and time of each temporary file."""
        found = set()
        for file in self.fold.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                found.add((file.name, file.stat().st_mtime_ns))
        return found

    def log(self) -> str:
        """Of the newest run."""
        files = sorted(self.fold.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime_ns)
        return files[-1].read_text() if files else ""


def fork(function, arguments: list[str], output: Path) -> int:
    """Runs the function of a console script in a forked process with its own session. Returns the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1), os.dup2(target, 2)
    sys.argv = [function.__name__, *arguments]
    status = 1
    try:
        function()
        status = 0
    except BaseException as error:
        import traceback

        traceback.print_exc()
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def left_processes(session: int, patience: float = 60.0) -> list[int]:
    """Processes of a session that still run after a while. Spawned ones import first, then find that their parent is gone."""
    end = time.time() + patience
    while True:
        found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
        alive = [int(line.split()[0]) for line in found.splitlines() if "Z" not in line.split()[1]]
        if not alive or time.time() > end:
            return alive
        time.sleep(0.05)


def read_checkpoints(fold: Path) -> tuple[int, int]:
    """The progress in the newest checkpoint. Breach if a checkpoint cannot be read or is not finite."""
    import torch

    from nnunet_l2g.files import load_safely
    from nnunet_l2g.training.checkpoints import check_finite

    epochs = {}
    for file in [*fold.glob("checkpoint_*.pth"), *fold.glob("stage_*.pth")]:
        of_a_stage = file.name.startswith("stage_")
        try:
            content = torch.load(file, weights_only=True) if of_a_stage else load_safely(file)
            check_finite({key: value for key, value in content.items() if key != "logging"})
        except Exception as error:
            raise Breach(f"{file} is broken: {error}") from error
        epochs[file.name] = (0, content["epoch"]) if of_a_stage else (1, content["current_epoch"])
    for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):  # the order in which nnU-Net asks
        if name in epochs:
            return epochs[name]
    return max(epochs.values(), default=NOTHING)


def completed(log: str) -> tuple[int, int] | None:
    """The number of epochs that the log of a run calls complete."""
    epochs = re.findall(r"Epoch (\d+) *\n(?:(?!Epoch \d).*\n)*?.*Epoch time", log)
    if epochs:
        return (1, int(epochs[-1]) + 1)
    stage = re.findall(r"stage \w+, epoch (\d+) of", log)
    return (0, int(stage[-1])) if stage else None


def started_at(log: str) -> tuple[int, int] | None:
    """Where a run continued, as the number of epochs before its first one."""
    before_segmenter = log.split("Current learning rate")[0]
    stage = re.search(r"stage \w+: (\d+) of (\d+) epochs are in", before_segmenter)
    if stage and int(stage[1]) < int(stage[2]):
        return (0, int(stage[1]))
    first = re.search(r": Epoch (\d+)", log)
    return (1, int(first[1])) if first else None


def kill_once(training: Training, how: str, generator: random.Random, folder: Path, train) -> bool:
    """Starts or continues a training and kills it. False if it ended before."""
    before, partials = training.saved, training.being_written()
    delay = generator.uniform(0.3, LONGEST)
    child, began = fork(train, training.arguments, folder / f"{training.name}.log"), time.time()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() - began > delay and (how == "moment" or training.being_written() - partials):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    else:
        training.started, training.saved = False, NOTHING
        return False
    training.started = True
    if left := left_processes(child):
        raise Breach(f"processes {left} outlived the training")
    training.saved = read_checkpoints(training.fold)
    check_progress(training, before)
    in_write = bool(training.being_written() - partials)
    training.kills.append({"after_s": round(time.time() - began, 2), "in_write": in_write, "saved": list(training.saved)})
    return True


def check_progress(training: Training, before: tuple[int, int]) -> None:
    """Breach unless the killed run began after the newest checkpoint and saved the epochs that it completed."""
    log, name, saved = training.log(), training.name, training.saved
    done, start = completed(log), started_at(log)
    if saved < before:
        raise Breach(f"{name}: {before} was saved before, now {saved}")
    if done and done != (1, 1) and saved < (done[0], done[1] - 1):
        raise Breach(f"{name}: epochs {done} were complete, {saved} are saved")
    expected = (1, 0) if before == (0, STAGE_EPOCHS) else before
    if start and before != NOTHING and start != expected:
        raise Breach(f"{name}: {before} was saved, the next run started at {start}")


def finish(training: Training, folder: Path, train, predict) -> None:
    """Lets a training finish, and predicts with it."""
    child = fork(train, training.arguments, folder / f"{training.name}.log")
    _, status = os.waitpid(child, 0)
    if status or read_checkpoints(training.fold) != (1, EPOCHS):
        raise Breach(f"{training.name} did not finish (status {status}); see {folder / training.name}.log")
    images = folder / "nnUNet_raw" / f"Dataset{SOURCE}_Source" / "imagesTs"
    output = folder / f"predicted_{training.name}"
    arguments = ["-d", str(SOURCE), "-c", "2d", "-f", "0", "-tr", training.trainer, "-p", training.plans, "-device", "cpu"]
    arguments += ["-i", str(images), "-o", str(output), "-npp", "1", "-nps", "1"]
    _, status = os.waitpid(fork(predict, arguments, folder / f"{training.name}.log"), 0)
    if status or len(list(output.glob("*.nii.gz"))) != len(list(images.iterdir())):
        raise Breach(f"{training.name} is finished and does not predict; see {folder / training.name}.log")


def make_data(folder: Path) -> None:
    """Two phantom datasets, planned by nnU-Net, the second one adapted to."""
    from nnunet_l2g.cli import main
    from nnunet_l2g.nnunet import nnunet_command
    from nnunet_l2g.phantom import write_dataset

    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / f"nnUNet_{name}")
        Path(os.environ[f"nnUNet_{name}"]).mkdir(exist_ok=True)
    if (folder / "nnUNet_preprocessed" / f"Dataset{SOURCE}_Source" / f"{PLANS['GLUA']}.json").exists():
        return
    size = dict(size=(32, 32, 8), spacing=(3.6, 3.6, 10.0))
    write_dataset(folder / "nnUNet_raw", 6, 2, dataset_id=SOURCE, name="Source", **size)
    write_dataset(folder / "nnUNet_raw", 5, 2, "late_enhancement", seed=7, dataset_id=TARGET, name="Target", **size)
    command = nnunet_command("nnUNetv2_plan_and_preprocess", ["-d", str(SOURCE), "-c", "2d", "-np", "2"])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if main(["adapt", "-s", str(SOURCE), "-t", str(TARGET), "-c", "2d", "-np", "1"]):
        raise SystemExit("adapt failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="in all, shared among the trainers")
    parser.add_argument("--trainers", nargs="+", default=["L2GNet", "GRCSF", "GLUA", "GLUASelfTraining"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for data and logs, kept; default: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder)
        print(json.dumps(result := run(args, folder), indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def run(args, folder: Path) -> dict:
    import torch
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    from nnunetv2.run.run_training import run_training_entry

    import nnunet_l2g.trainers  # noqa: F401  (imported before the forks)
    from nnunet_l2g.autoload import VARIABLE, with_trainers

    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))
    generator, trainings = random.Random(args.seed), []
    for number, name in enumerate(args.trainers):
        share = args.kills // len(args.trainers) + (number < args.kills % len(args.trainers))
        training = Training(name, folder / "nnUNet_results")
        while len(training.kills) < share:
            how = ("write", "moment")[len(training.kills) % 2]
            if kill_once(training, how, generator, folder, run_training_entry):
                print(f"{name}: {training.kills[-1]}", file=sys.stderr, flush=True)
            else:
                print(f"{name}: finished, now from the start", file=sys.stderr, flush=True)
        finish(training, folder, run_training_entry, predict_entry_point)
        trainings.append(training)
    kills = [kill for training in trainings for kill in training.kills]
    return {
        "kills": len(kills),
        "in_a_checkpoint_write": sum(kill["in_write"] for kill in kills),
        "torch": torch.__version__,
        "trainers": {training.trainer: training.kills for training in trainings},
    }


if __name__ == "__main__":
    main()
