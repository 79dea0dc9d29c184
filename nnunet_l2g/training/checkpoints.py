"""Checkpoints that a kill or a new run cannot spoil."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

PARTIAL = ".partial"


def write_atomically(write: Callable[[str], None], filename: str) -> None:
    """Calls write(temporary name), flushes to disk, renames: ``filename`` is the old file or the new one, never half of one.

    If write makes no file (nnU-Net with --disable_checkpointing), nothing happens. Whatever write raises is raised, and the
    temporary file is removed.
    """
    partial = filename + PARTIAL
    try:
        write(partial)
        if not os.path.exists(partial):
            return
        with open(partial, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(partial, filename)
    finally:
        Path(partial).unlink(missing_ok=True)


def set_previous_aside(output_folder: str) -> Path | None:
    """Moves an earlier run's checkpoints, those of stages too, into `previous_<time>/`; the folder, or None if there were none.

    Otherwise an old checkpoint_final.pth outlives the start of a new run, and `--c` after a kill continues the wrong one.
    """
    folder = Path(output_folder)
    for partial in folder.glob(f"*_*.pth{PARTIAL}"):  # left by a kill
        partial.unlink()
    checkpoints = sorted([*folder.glob("checkpoint_*.pth"), *folder.glob("stage_*.pth")])
    if not checkpoints:
        return None
    previous = folder / f"previous_{datetime.now():%Y%m%d_%H%M%S_%f}"
    previous.mkdir()
    for checkpoint in checkpoints:
        checkpoint.rename(previous / checkpoint.name)
    return previous
