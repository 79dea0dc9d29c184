"""The output folder: new, empty, or one that `nnunet_l2g inspect` made before; what an earlier run wrote is replaced."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from nnunet_l2g.files import is_plain_name, marker_of, open_folder, read_json, write_json, write_text

SUMMARY = "summary.json"


class Output:
    """A folder and what was written into it: file name -> one line about it, in order."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, {}

    @classmethod
    def open(cls, path: Path) -> Output:
        """Makes the folder if it is missing, and removes the files of an earlier inspection, none else.

        UserError as in `open_folder`.
        """
        output = cls(open_folder(path, "inspect"))
        for name in _read_marker(output.marker):
            with contextlib.suppress(OSError):  # a folder, or no name for a file: none of ours
                (output.folder / name).unlink()
        output._mark()
        return output

    @property
    def marker(self) -> Path:
        """Holds the names of what was written."""
        return marker_of(self.folder, "inspect")

    def add(self, name: str, line: str) -> Path:
        """Where to write a file of this name; noted, so that a later inspection replaces it."""
        self.written[name] = line
        self._mark()
        return self.folder / name

    def write_summary(self, content: dict) -> None:
        """summary.json, with the index of all files."""
        path = self.add(SUMMARY, "every number of the figures, and how it was made")
        write_json(path, content | {"files": self.written})

    def index(self) -> str:
        """One line for each file."""
        width = max(map(len, self.written))
        return "\n".join(f"  {name:{width}}  {line}" for name, line in self.written.items())

    def _mark(self) -> None:
        write_text(self.marker, json.dumps(list(self.written)) + "\n")


def _read_marker(marker: Path) -> list[str]:
    """Names of files that an earlier inspection wrote; a name with a folder in it is none of ours."""
    try:
        names = read_json(marker)
    except (OSError, ValueError):
        return []
    return [name for name in names if is_plain_name(name)] if isinstance(names, list) else []
