"""Phantom datasets planned and preprocessed once for all tests, by nnU-Net's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.demo.nnunet import nnunet_command
from nnunet_l2g.phantom import write_dataset

PLAIN, RICH = "Dataset981_PhantomPlain", "Dataset982_PhantomRich"  # RICH: two channels, scar, regions, ignore label
TARGET, ADAPTED = "Dataset983_Late", "nnUNetPlans_to983"  # late enhancement for PLAIN to adapt to, and the plans for it
SIZE, SPACING = (32, 32, 8), (3.6, 3.6, 10.0)
# nnU-Net spawns its workers, and each imports torch first: most of planning a phantom
FORKED = "import multiprocessing as m; context = m.get_context; m.get_context = lambda _: context('fork'); "


@dataclass(frozen=True)
class Planned:
    """nnU-Net's three folders."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        workers = {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "1"}
        return {name: str(self.folder / name) for name in names} | workers

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | self.variables | {VARIABLE: with_trainers(os.environ.get(VARIABLE, ""))}

    def path(self, kind: str, *parts: str) -> Path:
        return Path(self.folder, f"nnUNet_{kind}", *parts)

    def start(self, script: str, *args: object, forked: bool = False, **variables: str) -> subprocess.Popen:
        """Starts one of nnU-Net's commands, away from the checkout; output as text."""
        python, option, code, *rest = nnunet_command(script, [str(arg) for arg in args])
        return subprocess.Popen(
            [python, option, FORKED + code if forked and sys.platform == "linux" else code, *rest],
            env=self.environment | variables | {"PYTHONUNBUFFERED": "1"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *args: object, fails: bool = False, forked: bool = False, **variables: str) -> str:
        """The output of one of nnU-Net's commands, which has to end well (or badly, with `fails`)."""
        child = self.start(script, *args, forked=forked, **variables)
        output, _ = finish(child, 600)
        assert (child.returncode != 0) == fails, f"{script} {args}: exit status {child.returncode}\n{output}"
        return output


def finish(child: subprocess.Popen, timeout: float) -> tuple[str, str | None]:
    """communicate(); if that fails, no process of the child's session outlives it. The child has to lead one."""
    try:
        return child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise


def plan_phantoms(folder: Path) -> Planned:
    """Writes both datasets below a folder, plans and preprocesses them."""
    project = Planned(folder)
    for kind in ("raw", "preprocessed", "results"):
        project.path(kind).mkdir()
    write_dataset(project.path("raw"), 6, 2, dataset_id=981, name="PhantomPlain", size=SIZE, spacing=SPACING)
    write_dataset(
        project.path("raw"), 5, 1, ("cine", "late_enhancement"), True, dataset_id=982, name="PhantomRich", size=SIZE,
        spacing=SPACING, regions=True, ignore_label=True,
    )  # fmt: skip
    project.run("nnUNetv2_plan_and_preprocess", "-d", 981, 982, "-c", "3d_fullres", "2d", "-np", 2, forked=True)
    return project
