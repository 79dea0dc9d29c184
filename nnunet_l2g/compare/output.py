"""The report's folder."""

from __future__ import annotations

from pathlib import Path

from nnunet_l2g.files import marker_of, open_folder, write_text


def open_output(path: Path) -> Path:
    """The folder's absolute path, made if missing. UserError as in `open_folder`."""
    path = open_folder(path, "compare")
    write_text(marker_of(path, "compare"), "Made by `nnunet_l2g compare`, which replaces its own files in this folder.\n")
    return path
