"""Writes files whole or not at all, and reads files of other people without running anything that they name."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from nnunet_l2g.errors import UserError

# What can be raised if a file is read, and then content is taken out of it that should be there.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
LARGEST = 512 << 20  # bytes of a JSON file; summaries of ten thousand cases are smaller
LONGEST = 200  # bytes of a name; file systems allow 255, with the ending


def write_text(path: Path, text: str) -> None:
    """Writes a file beside the target and renames it, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    """Writes indented JSON. ValueError if a number is NaN, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> object:
    """The JSON value in the file, with NaN and Infinity, which nnU-Net writes. OSError if it cannot be read; ValueError if
    it is not JSON in UTF-8, is larger than 512 MiB, is nested too deeply, or a number has too many digits."""
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except MemoryError:
        raise ValueError("it does not fit into memory") from None


def read_object(path: Path) -> dict:
    """The JSON object in the file. ValueError also if it holds another kind of value."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a JSON {type(content).__name__}, expected an object")
    return content


def is_plain_name(name: object) -> bool:
    """Whether a folder joined with this name is a path in that folder: the name has no other folder, root, drive or NUL."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        return False
    encoded = name.encode("utf-8", "ignore")
    return len(encoded) <= LONGEST and encoded.decode() == name  # not equal if there is a lone surrogate


def check_plain_name(name: object, what: str) -> str:
    """Returns the name. UserError unless it is plain. `what` says whose name it is and where it was read."""
    if not is_plain_name(name):
        raise UserError(f"{what} is {str(name)[:80]!r}; expected a name without slashes, as nnU-Net writes: correct it there")
    return name


def load_safely(path: Path) -> dict:
    """A checkpoint on the CPU, read with `weights_only=True`: tensors, numbers and lists, and no code that runs.

    Numpy's scalar and dtype classes are allowed too, because nnU-Net's log holds numpy scalars. Raises what torch raises
    for a damaged file, and for one that holds other classes.
    """
    import numpy as np
    import torch

    rebuild = np.float64(0).__reduce__()[0]  # numpy's function that makes a scalar
    # numpy 2 moved the function, and a checkpoint has the name of the numpy that wrote it
    scalars = [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    with torch.serialization.safe_globals([*scalars, np.dtype, *dtypes]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def marker_of(path: Path, command: str) -> Path:
    """The file in a folder that says which command made it."""
    return path / f".nnunet_l2g_{command}"


def open_folder(path: Path, command: str) -> Path:
    """Makes a command's output folder if it is missing, and returns its absolute path. The caller writes the marker.

    UserError if it is a file, cannot be written, or holds files and has no marker of `nnunet_l2g <command>`.
    """
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        foreign = any(path.iterdir()) and not marker_of(path, command).is_file()
        if not foreign:
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = "this is a file" if path.is_file() else error.strerror or error
        raise UserError(f"-o {path}: cannot be written ({reason}); name another folder with -o") from error
    if foreign:
        made = f"not made by `nnunet_l2g {command}`, so nothing in it is touched"
        raise UserError(f"-o {path}: not empty, and {made}; name another folder with -o")
    return path
