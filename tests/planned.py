"""Phantom datasets that nnU-Net's own commands plan and preprocess, once for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.nnunet import nnunet_command
from nnunet_l2g.phantom import write_dataset

PLAIN, RICH = "Dataset981_PhantomPlain", "Dataset982_PhantomRich"  # RICH: two channels, scar, regions, ignore label
TARGET, ADAPTED = "Dataset983_Late", "nnUNetPlans_to983"  # late enhancement for PLAIN to adapt to, and the plans for it
SIZE, SPACING = (32, 32, 8), (3.6, 3.6, 10.0)
FEATURES = 16  # at most, in each stage of the planned networks
# nnU-Net spawns its workers, and each imports torch, which is most of the time of preprocessing a phantom
FORKED = "import multiprocessing as m; context = m.get_context; m.get_context = lambda _: context('fork'); "
# nnU-Net draws 100 million foreground intensities for a fingerprint, which is most of the time of planning a phantom
FEW_SAMPLES = """
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor as Extractor
run = Extractor.run
def run_on_few_samples(self, overwrite_existing=False):
    self.num_foreground_voxels_for_intensitystats = 1e5
    return run(self, overwrite_existing)
Extractor.run = run_on_few_samples
"""


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

    def start(self, script: str, *args: object, prelude: str = "", **variables: str) -> subprocess.Popen:
        """Starts one of nnU-Net's commands outside the checkout, with text output. `prelude` is Python code to run first."""
        python, option, code, *rest = nnunet_command(script, [str(arg) for arg in args])
        return subprocess.Popen(
            [python, option, prelude + code, *rest],
            env=self.environment | variables | {"PYTHONUNBUFFERED": "1"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *args: object, fails: bool = False, prelude: str = "", **variables: str) -> str:
        """The output of one of nnU-Net's commands, whose exit status has to be 0, or not 0 with `fails`."""
        child = self.start(script, *args, prelude=prelude, **variables)
        output, _ = finish(child, 600)
        assert (child.returncode != 0) == fails, f"{script} {args}: exit status {child.returncode}\n{output}"
        return output


def finish(child: subprocess.Popen, timeout: float) -> tuple[str, str | None]:
    """communicate(). If it fails, all processes of the child's session are killed. The child has to lead a session."""
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
    prelude = (FORKED if sys.platform == "linux" else "") + FEW_SAMPLES
    project.run("nnUNetv2_plan_and_preprocess", "-d", 981, 982, "-c", "3d_fullres", "2d", "-np", 2, prelude=prelude)
    for dataset in (PLAIN, RICH):
        narrow(project.path("preprocessed", dataset, "nnUNetPlans.json"))
    return project


def narrow(path: Path, first: int = 8, most: int = FEATURES) -> None:
    """Gives the networks of a plans file few features, and changes nothing else."""
    plans = json.loads(path.read_text())
    for name in ("2d", "3d_fullres"):
        network = plans["configurations"][name]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [min(first << stage, most) for stage in range(network["n_stages"])]
    path.write_text(json.dumps(plans, indent=4))
