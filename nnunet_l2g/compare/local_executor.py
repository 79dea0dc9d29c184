"""Trains on this machine: one training on each GPU, `--jobs` of one thread each on a CPU, or one at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_l2g.compare.training import Training
from nnunet_l2g.errors import UserError
from nnunet_l2g.nnunet import ADVICE, Child, available_cores, run_children

VISIBLE = "CUDA_VISIBLE_DEVICES"
# On a CPU nnU-Net asks torch for os.cpu_count() threads. Those of several trainings would wait for one another.
ONE_CORE = "import os; os.cpu_count = lambda: 1; "
ONE_THREAD = {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}  # no processes that make batches


@dataclass(frozen=True)
class Place:
    """Where one training runs at a time: a name for the terminal, variables, and Python code that its process runs first."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    prelude: str = ""


def places(device: str, jobs: int | None) -> list[Place]:
    """One place for each GPU; on a CPU one with all cores, or `jobs` of one thread each.

    UserError for more jobs than cores, or for jobs on GPUs.
    """
    if device == "cuda":
        if jobs is not None:
            raise UserError(f"--jobs {jobs}: is for trainings on a CPU; one training runs on each GPU. Leave --jobs out")
        return [Place(f"GPU {name}", {VISIBLE: name}) for name in cuda_devices()]
    if jobs is None:
        return [Place("CPU")]
    if jobs > (cores := available_cores()):
        raise UserError(f"--jobs {jobs}: this process may use {cores} cores; expected 1 to {cores}, each training takes one")
    return [Place(f"core {number}", ONE_THREAD, ONE_CORE) for number in range(1, jobs + 1)]


def cuda_devices() -> list[str]:
    """The name of each GPU that torch sees, for CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    if visible := os.environ.get(VISIBLE):
        return [name.strip() for name in visible.split(",")][:count]  # numbers, or names of GPUs and their parts
    return [str(number) for number in range(count)]


def train_locally(trainings: list[Training], device: str, places: list[Place], output: Path) -> None:
    """Runs all trainings, as many at once as there are places. One that fails does not stop the others.

    UserError names every training that failed, with its log and the log's last lines. Interrupted as in `run_children`.
    """
    started: dict[Child, Training] = {}

    def start(training: Training, place: Place) -> Child:
        more = {"prelude": place.prelude, "prefix": f"      {training.name}: "}
        child = training.start(output, ["-device", device], place.environment, **more)
        started[child] = training
        print(f"[{len(started)}/{len(trainings)}] on {place.name}: {child.shown}", flush=True)
        return child

    ended = run_children(trainings, places, start)
    failures = [failure for child in ended if (failure := started[child].failure(child)) is not None]
    if failures:
        raise UserError("\n".join([*failures, ADVICE]))
