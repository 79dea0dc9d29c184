"""The report's folder: new, empty, or one that `nnunet_l2g compare` made before."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nnunet_l2g.demo.files import write_text
from nnunet_l2g.errors import UserError

MARKER = ".nnunet_l2g_compare"
CACHE = "cache"


def open_output(path: Path) -> Path:
    """The folder's absolute path, made if missing. UserError if it is a file, cannot be written, or holds other files."""
    path = path.expanduser().absolute()
    advice = "name another folder with -o"
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"-o {path}: this is a file; {advice}")
        if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
            raise UserError(
                f"-o {path}: not empty, and not made by `nnunet_l2g compare`, so nothing in it is touched; {advice}"
            )
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        write_text(path / MARKER, "Made by `nnunet_l2g compare`, which replaces its own files in this folder.\n")
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written ({error.strerror or error}); {advice}") from error
    return path
