"""Checkpoints that a kill or a new run cannot damage, and the states of the random number generators in them."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from nnunet_l2g.errors import UserError

PARTIAL = ".partial"


def serialised(contents: dict) -> memoryview:
    """What torch.save would write. In memory, because on a full disk torch.save may only report an "iostream error"."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getbuffer()


def write_atomically(content: bytes | memoryview, filename: str) -> None:
    """Writes a temporary file, flushes it to disk and renames it: ``filename`` is the old file or the new one, always whole.

    Raises
    ------
    UserError
        If the file cannot be written: the disk is full, read-only or gone, or a quota is used up.
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
        folder = os.path.dirname(filename) or "."
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if os.path.isdir(folder) else "the folder is gone"
        before = "The file of that name from before is intact" if os.path.exists(filename) else "There was none before"
        raise UserError(
            f"{filename} could not be written: {error.strerror or error} ({free}). {before}. Make room there, then call the "
            "same command again, nnUNetv2_train with --c."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is renamed, or the disk has become read-only
            os.remove(partial)


def _flush_folder(folder: str) -> None:
    """Flushes the renaming, which a power cut could undo. Windows and some network file systems have no such call."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_finite(state: Mapping, may_be_infinite: Collection[str] = ()) -> None:
    """FloatingPointError that names the tensors with NaN or Inf in a nested state, which must not become a checkpoint.

    may_be_infinite : names, joined by dots, of tensors that may hold Inf, but no NaN
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
            f"NaN or Inf in {names}: no checkpoint is written, those on disk are from before. Look for NaN or Inf in the "
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
    """Removes half-written checkpoints that a kill has left."""
    for partial in Path(output_folder).glob(f"*_*.pth{PARTIAL}"):
        partial.unlink()


def set_previous_aside(output_folder: str) -> Path | None:
    """Moves all checkpoints of an earlier run into `previous_<time>/` and returns that folder, or None if there were none.

    If an old checkpoint_final.pth stayed, `--c` after a kill would continue the old run.
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


def get_random_state(device: torch.device) -> dict:
    """States of the generators of Python, numpy and torch, and of `device` if it is a GPU, as tensors and plain Python."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """The inverse. The state of a GPU is not changed if `state` was taken without one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
