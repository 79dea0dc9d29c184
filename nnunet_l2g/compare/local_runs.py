"""Trainings on this machine: one on each of its GPUs, some of one thread each on its cores, or one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nnunet_l2g.compare.training import ADVICE, Training
from nnunet_l2g.errors import UserError
from nnunet_l2g.nnunet import available_cores
from nnunet_l2g.processes import POLL, Interrupted, end_children, stop_signals

VISIBLE = "CUDA_VISIBLE_DEVICES"
# On a CPU nnU-Net asks torch for as many threads as os.cpu_count() says: trainings side by side then wait for one another.
ONE_CORE = "import os; os.cpu_count = lambda: 1; "
ONE_THREAD = {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}  # batches made in that thread, too


@dataclass(frozen=True)
class Place:
    """Where one training runs at a time.

    name : for the terminal; empty if there is one place only
    environment : of the training, beside this process's own
    prelude : Python code that its process runs before nnU-Net's
    """

    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    prelude: str = ""


def places(device: str, jobs: int | None) -> list[Place]:
    """One place for each GPU; on a CPU one with all cores, or `jobs` of one thread each.

    UserError for more jobs than cores, or for jobs where GPUs train.
    """
    if device == "cuda":
        if jobs is not None:
            raise UserError(f"--jobs {jobs}: for trainings on a CPU; on GPUs one training runs on each. Leave --jobs out")
        return [Place(f"GPU {name}", {VISIBLE: name}) for name in cuda_devices()]
    if jobs is None:
        return [Place()]
    if jobs > (cores := available_cores()):
        raise UserError(f"--jobs {jobs}: this process may use {cores} cores; expected 1 to {cores}, each training takes one")
    return [Place(f"core {number}", ONE_THREAD, ONE_CORE) for number in range(1, jobs + 1)]


def cuda_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to name for each GPU that torch sees. Asks torch in a child: it would hold the GPUs."""
    code = "import torch; print(torch.cuda.device_count())"
    count = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    if visible := os.environ.get(VISIBLE):
        return [name.strip() for name in visible.split(",")][:count]  # numbers, or names of GPUs and their parts
    return [str(number) for number in range(count)]


def train_locally(trainings: Sequence[Training], places: Sequence[Place]) -> None:
    """As many trainings at once as there are places. After the first failure what runs is finished and none is started.

    Raises
    ------
    UserError : names every training that failed, its log and the log's last lines
    Interrupted : a stop signal came; no child is left
    """
    waiting, free, running, failures = list(trainings), list(places), {}, []
    together = min(len(free), len(waiting)) > 1
    with stop_signals() as received:
        try:
            while running or (waiting and not failures):
                while free and waiting and not failures:
                    training, place = waiting.pop(0), free.pop(0)
                    prefix = f"      {training.name}: " if together else "      "
                    child = training.start(place.environment, prefix, prelude=place.prelude)
                    running[child] = training, place
                    where = f" on {place.name}" if together else ""
                    print(f"[{len(trainings) - len(waiting)}/{len(trainings)}]{where} {child.shown}", flush=True)
                for child, (training, place) in list(running.items()):
                    if child.show():
                        child.kill_group()  # workers that outlived a crashed main process
                        del running[child]
                        free.append(place)
                        if (failure := training.failure(child)) is not None:
                            failures.append(failure)
                            if running:
                                print(f"{child.prefix}failed; what runs is finished first", flush=True)
                if received:
                    end_children(list(running), received)
                    raise Interrupted("training")
                time.sleep(POLL)
        finally:
            for child in running:
                child.kill_group()
    if failures:
        left = f"\n{len(waiting)} more not started." if waiting else ""
        raise UserError("\n".join(failures) + f"{left}\n{ADVICE}")
