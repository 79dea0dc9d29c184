"""The folder that -o names: new, empty, or one that the same command made before."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nnunet_l2g.errors import UserError


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
