"""Trainings on this machine: one at a time, or one on each of its GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from nnunet_l2g.comparison.training import ADVICE, Training
from nnunet_l2g.demo.runner import POLL, Interrupted, end_children, stop_signals
from nnunet_l2g.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def cuda_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to name for each GPU that torch sees. Asks torch in a child: it would hold the GPUs."""
    code = "import torch; print(torch.cuda.device_count())"
    count = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    if visible := os.environ.get(VISIBLE):
        return [name.strip() for name in visible.split(",")][:count]  # numbers, or names of GPUs and their parts
    return [str(number) for number in range(count)]


def train_locally(trainings: Sequence[Training], devices: Sequence[str] = ()) -> None:
    """As many trainings at once as there are devices, each child seeing its own; without devices one after the other.

    After the first failure the others that run are finished and none is started.

    Raises
    ------
    UserError : names every training that failed, its log and the log's last lines
    Interrupted : a stop signal came; no child is left
    """
    free: list[str | None] = list(devices) or [None]
    waiting, running, failures = list(trainings), {}, []
    together = min(len(free), len(waiting)) > 1
    with stop_signals() as received:
        try:
            while running or (waiting and not failures):
                while free and waiting and not failures:
                    training, device = waiting.pop(0), free.pop(0)
                    prefix = f"      {training.name}: " if together else "      "
                    child = training.start({} if device is None else {VISIBLE: device}, prefix)
                    running[child] = training, device
                    where = f" on GPU {device}" if together else ""
                    print(f"[{len(trainings) - len(waiting)}/{len(trainings)}]{where} {child.shown}", flush=True)
                for child, (training, device) in list(running.items()):
                    if child.show():
                        child.kill_group()  # workers that outlived a crashed main process
                        del running[child]
                        free.append(device)
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
