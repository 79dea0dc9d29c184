"""nnU-Net's own command lines, run by this interpreter, whatever is on PATH."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.demo.folder import PREPROCESSED, RAW, RESULTS
from nnunet_l2g.errors import UserError


def nnunet_command(script: str, args: list[str]) -> list[str]:
    """argv that runs the console script `script` with `args`. UserError if this interpreter has no such script."""
    found = list(entry_points(group="console_scripts", name=script))
    if not found:
        raise UserError(
            f"nnU-Net's command {script} is not installed for {sys.executable}; run "
            f"`{sys.executable} -m pip install nnunetv2`, or call nnunet_l2g from nnU-Net's environment"
        )
    function = found[0].attr.split(".")[0]
    code = f"import sys; from {found[0].module} import {function}; sys.argv[0] = {script!r}; sys.exit({found[0].attr}())"
    return [sys.executable, "-c", code, *args]


def shown_command(script: str, args: list[str]) -> str:
    """The command as a user types it."""
    return shlex.join([script, *args])


def nnunet_variables(folder: Path) -> dict[str, str]:
    """nnU-Net's three variables for a demo in `folder`."""
    return {
        "nnUNet_raw": str(folder / RAW),
        "nnUNet_preprocessed": str(folder / PREPROCESSED),
        "nnUNet_results": str(folder / RESULTS),
    }


def child_environment(folder: Path) -> dict[str, str]:
    """The environment of nnU-Net's commands: the caller's, the three variables, our trainers, and few workers."""
    workers = str(min(available_cores(), 4))  # each worker imports torch first; the default of 8 to 12 costs a minute
    environment = os.environ | nnunet_variables(folder)
    environment |= {
        "nnUNet_n_proc_DA": workers,
        "nnUNet_def_n_proc": workers,
        VARIABLE: with_trainers(os.environ.get(VARIABLE, "")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "Agg",
    }
    environment.setdefault("nnUNet_compile", "f")  # on a GPU, compiling would take longer than the training
    return environment


def available_cores() -> int:
    """Cores this process may use: fewer than the machine's under taskset or a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(requested: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Asks torch in a child: the parent never imports it.

    UserError if torch cannot be imported, or "cuda" was asked for and torch sees no CUDA device.
    """
    if requested == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.is_available())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"torch cannot be imported by {sys.executable}: {last}; repair the installation (`nnunet_l2g doctor` looks further)"
        )
    available = answer.stdout.strip().endswith("True")
    if requested == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    return "cuda" if available else "cpu"
