"""Checkpoints that a kill or a new run cannot spoil."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import torch

from nnunet_l2g.errors import UserError

PARTIAL = ".partial"


def serialised(contents: dict) -> memoryview:
    """As torch.save would write it, in memory: writing to a full disk itself, torch may call that an "iostream error"."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getbuffer()


def write_atomically(content: bytes | memoryview, filename: str) -> None:
    """Writes beside, flushes to disk, renames: ``filename`` is the old file or the new one, never half of one.

    Raises
    ------
    UserError
        If the disk does not take the file: full, over a quota, read-only, gone. The temporary file is removed.
    """
    partial = filename + PARTIAL
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, filename)
        _flush_folder(os.path.dirname(filename))
    except OSError as error:
        raise UserError(_cannot_write(filename, error)) from error
    finally:
        _remove(partial)


def _flush_folder(folder: str) -> None:
    """The new name itself, which a power cut could undo. Windows and some network file systems cannot: the file is in place."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(filename: str, error: OSError) -> str:
    folder = os.path.dirname(filename) or "."
    free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if os.path.isdir(folder) else "the folder is gone"
    before = "The file of that name from before is intact" if os.path.exists(filename) else "There was none before"
    return (
        f"{filename} could not be written: {error.strerror or error} ({free}). {before}. Make room there, then call the same "
        "command again, nnUNetv2_train with --c."
    )


def _remove(partial: str) -> None:
    with contextlib.suppress(OSError):  # a disk that has become read-only: what it did to the file is the error to tell
        os.remove(partial)


def check_finite(state: Mapping, may_be_infinite: Collection[str] = ()) -> None:
    """FloatingPointError naming the tensors of a nested state that hold NaN or Inf: such a checkpoint must not replace one.

    may_be_infinite : names, joined by dots, that may hold Inf, but no NaN
    """
    spoilt = [
        name
        for name, tensor in _tensors(state)
        if tensor.is_floating_point()
        and not (~torch.isnan(tensor) if name in may_be_infinite else torch.isfinite(tensor)).all()
    ]
    if spoilt:
        names = ", ".join(spoilt[:5]) + (f" and {len(spoilt) - 5} more" if len(spoilt) > 5 else "")
        raise FloatingPointError(
            f"NaN or Inf in {names}: no checkpoint of it is written, those on disk are from before. Look for NaN or Inf in the "
            "images, or lower the learning rate, and continue with --c."
        )


def _tensors(state, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from _tensors(value, f"{name}.{number}")


def remove_partial(output_folder: str) -> None:
    """Removes the half-written checkpoints that a kill has left."""
    for partial in Path(output_folder).glob(f"*_*.pth{PARTIAL}"):
        partial.unlink()


def set_previous_aside(output_folder: str) -> Path | None:
    """Moves an earlier run's checkpoints, those of stages too, into `previous_<time>/`; the folder, or None if there were none.

    Otherwise an old checkpoint_final.pth outlives the start of a new run, and `--c` after a kill continues the wrong one.
    """
    folder = Path(output_folder)
    checkpoints = sorted([*folder.glob("checkpoint_*.pth"), *folder.glob("stage_*.pth")])
    if not checkpoints:
        return None
    previous = folder / f"previous_{datetime.now():%Y%m%d_%H%M%S_%f}"
    previous.mkdir()
    for checkpoint in checkpoints:
        checkpoint.rename(previous / checkpoint.name)
    return previous
