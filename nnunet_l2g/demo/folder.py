"""The demo's folder: what it may write into, what it has finished, and what --overwrite may delete."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, read_object, write_json, write_text

MARKER = ".nnunet_l2g_demo"
STATE = "state.json"
RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
PREDICTIONS, LOGS, PICTURE, SUMMARY = "predictions", "logs", "demo.png", "demo_summary.json"
OWN = (RAW, PREPROCESSED, RESULTS, PREDICTIONS, LOGS, PICTURE, SUMMARY, STATE)  # all that --overwrite deletes
NEEDED_BYTES = 1024**3  # the default trainer's run writes a tenth of it, larger networks more


@dataclass
class DemoFolder:
    """A folder that belongs to the demo, and which steps are finished in it.

    settings : what the results depend on; a folder serves one set of settings
    finished : seconds that each finished step took, by name
    started : names of steps that were started, finished or not
    """

    path: Path
    settings: dict
    finished: dict[str, float] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    def start(self, step: str) -> None:
        """Notes that a step begins and is unfinished."""
        self.finished.pop(step, None)
        if step not in self.started:
            self.started.append(step)
        self._save()

    def finish(self, step: str, seconds: float) -> None:
        """Notes that a step succeeded. Called only after all its results are written."""
        self.finished[step] = round(seconds, 1)
        self._save()

    def forget(self, steps: list[str]) -> None:
        """Drops steps whose results depend on one that must run again."""
        self.finished = {name: seconds for name, seconds in self.finished.items() if name not in steps}
        self.started = [name for name in self.started if name not in steps]
        self._save()

    def _save(self) -> None:
        content = {"settings": self.settings, "finished": self.finished, "started": self.started}
        write_json(self.path / STATE, content)


def open_folder(path: Path, settings: dict, overwrite: bool) -> DemoFolder:
    """Makes or reopens the demo's folder, before anything is computed.

    Raises
    ------
    UserError : the path is no folder, cannot be written, has too little space, holds somebody else's files, or holds a
        run with other settings or an unreadable state (the last two: unless `overwrite`)
    """
    path = path.expanduser().absolute()
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; name a folder with -o")
        if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
            raise UserError(
                f"{path} is not empty and was not made by `nnunet_l2g demo`, so nothing in it is touched; "
                "name another folder with -o"
            )
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        _check_space(path)
        write_text(path / MARKER, "Made by `nnunet_l2g demo`. With --overwrite it deletes its own files in this folder.\n")
        if overwrite:
            _delete_own(path)
        return _read(path, settings)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error}; name another folder with -o") from error


def _check_space(path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{path} has {free / 1024**3:.1f} GiB free, the demo needs {NEEDED_BYTES / 1024**3:.0f} GiB; "
            "make room, or name another folder with -o"
        )


def _delete_own(path: Path) -> None:
    """Deletes what the demo writes, and nothing else that somebody may have put beside it."""
    for name in OWN:
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _read(path: Path, settings: dict) -> DemoFolder:
    state = path / STATE
    if not state.exists():
        return DemoFolder(path, settings)
    advice = "start afresh with --overwrite, or name another folder with -o"
    try:
        content = read_object(state)
        finished = {str(name): float(seconds) for name, seconds in content["finished"].items()}
        if not all(map(math.isfinite, finished.values())):
            raise ValueError("a step took no finite time")
        found = DemoFolder(path, dict(content["settings"]), finished, [str(name) for name in content["started"]])
    except DAMAGE as error:
        raise UserError(f"{state} cannot be read ({error!r}); {advice}") from error
    if found.settings != settings:
        names = sorted({*found.settings, *settings})
        differences = [
            f"{name} {found.settings.get(name)!r} there, {settings.get(name)!r} now"
            for name in names
            if found.settings.get(name) != settings.get(name)
        ]
        raise UserError(f"{path} holds a demo with other settings ({'; '.join(differences)}); {advice}")
    return found
