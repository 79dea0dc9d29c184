"""Files: written whole or not at all; read without trust. One writer, and one reader of each kind."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from nnunet_l2g.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes beside the target and renames: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    """`write_text` of indented JSON. NaN is refused: JSON has none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


LARGEST = 512 << 20  # bytes; summaries of ten thousand cases stay below
MOST_DIGITS = 4300  # Python's own limit, which its first 3.10 releases do not have
# what reading a file, and then taking things out of it that should be there, can raise
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read_json(path: Path) -> object:
    """Whatever JSON value the file holds; NaN and Infinity too, which nnU-Net writes.

    Raises
    ------
    OSError : the file is missing or cannot be read
    ValueError : it holds no JSON, not UTF-8, or more than 512 MiB; it is nested too deeply, or a number has too many digits
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MiB")
    try:
        return json.loads(content, parse_int=_integer)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except MemoryError:
        raise ValueError("it does not fit into memory") from None


def _integer(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > MOST_DIGITS:
        raise ValueError(f"a number has {digits} digits")
    return int(text)


def read_object(path: Path) -> dict:
    """A JSON object; what else the file may hold is a ValueError as well."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a JSON {type(content).__name__}, expected an object")
    return content


LONGEST = 200  # bytes; file systems allow 255, endings included


def is_plain_name(name: object) -> bool:
    """Whether a path joined from a folder and this name lies in that folder: no other folder, root, drive or NUL in it."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        return False
    encoded = name.encode("utf-8", "ignore")
    return len(encoded) <= LONGEST and encoded.decode() == name  # a lone surrogate is in no name


def check_plain_name(name: object, what: str) -> str:
    """The name. UserError unless it is plain; `what` says whose it is and where it was read."""
    if not is_plain_name(name):
        raise UserError(f"{what} is {str(name)[:80]!r}; expected a name without slashes, as nnU-Net writes: correct it there")
    return name


def load_safely(path: Path) -> dict:
    """A checkpoint's content on the CPU, by `weights_only=True`: it can hold tensors, numbers and lists, and run nothing.

    nnU-Net's log holds numpy scalars, so exactly numpy's scalar and dtype classes are allowed.

    Raises
    ------
    Exception : whatever torch raises for a damaged file, or for one that holds other classes
    """
    import torch

    with torch.serialization.safe_globals(_numpy_classes()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _numpy_classes() -> list:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # numpy's function that rebuilds a scalar
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    # numpy 2 moved the function; a checkpoint keeps the name of the numpy that wrote it
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *dtypes]


def marker_of(path: Path, command: str) -> Path:
    """The file in it that says which command made the folder."""
    return path / f".nnunet_l2g_{command}"


def open_folder(path: Path, command: str) -> Path:
    """The folder's absolute path, made if missing; whoever opens it writes its marker.

    UserError if it is a file, cannot be written, or holds files and was not made by `nnunet_l2g <command>`.
    """
    path, advice = path.expanduser().absolute(), "name another folder with -o"
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"-o {path}: this is a file; {advice}")
        if path.is_dir() and any(path.iterdir()) and not marker_of(path, command).is_file():
            raise UserError(
                f"-o {path}: not empty, and not made by `nnunet_l2g {command}`, so nothing in it is touched; {advice}"
            )
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written ({error.strerror or error}); {advice}") from error
    return path
