"""Scores that were computed before, found by the content of the files and the definitions they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nnunet_l2g.demo.files import write_text
from nnunet_l2g.untrusted.json_files import read_object

BLOCK = 1 << 20


class Cache:
    """One JSON file for each scored pair, in a folder; a file that cannot be read is as good as none.

    folder : None keeps nothing
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict | None:
        """The scores stored under the key, None if there are none."""
        if self.folder is None:
            return None
        try:
            return read_object(self.folder / f"{key}.json")
        except (OSError, ValueError):
            return None

    def put(self, key: str, scores: dict) -> None:
        """Stores scores; NaN is written as Python's json does, only we read it."""
        if self.folder is not None:
            write_text(self.folder / f"{key}.json", json.dumps(scores))


def key_of(reference: Path, prediction: Path, definition: str) -> str:
    """SHA-256 of both files' contents and of the definition (labels, options, version)."""
    digest = hashlib.sha256(definition.encode())
    for path in (reference, prediction):
        digest.update(file_hash(path))
    return digest.hexdigest()


def file_hash(path: Path) -> bytes:
    """SHA-256 of a file's content. OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.digest()
