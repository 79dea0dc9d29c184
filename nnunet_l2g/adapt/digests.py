"""Short hashes of values, arrays, files and folders: what adapt remembers, to know later what has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

_PIECES, _PIECE = 4, 1 << 16  # a large file is judged by its size and this many pieces of 64 KiB, first and last among them


def digest_json(value: object) -> str:
    """32 hex digits of a value that JSON can hold; the order of keys does not count. TypeError for anything else."""
    return _hash(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_array(array: np.ndarray) -> str:
    """32 hex digits of the values, in C order."""
    return _hash(np.ascontiguousarray(array).data)


def digest_samples(path: Path) -> str:
    """32 hex digits of the size and of at most 256 KiB spread over the file: preprocessed data are too large to read whole.

    Compressed voxels differ everywhere once their normalisation differs, so this finds a file made with other settings; it
    is no proof against a changed byte. OSError if the file cannot be read.
    """
    size = path.stat().st_size
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= _PIECES * _PIECE:
            hasher.update(file.read())
        else:
            for i in range(_PIECES):
                file.seek((size - _PIECE) * i // (_PIECES - 1))
                hasher.update(file.read(_PIECE))
    return hasher.hexdigest()


def digest_folder(folder: Path, endings: tuple[str, ...]) -> str:
    """32 hex digits of the names and `digest_samples` of the files in `folder` with one of these endings."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    return digest_json([[path.name, digest_samples(path)] for path in files])


def _hash(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
