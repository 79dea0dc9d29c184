"""JSON files of others: any damage is one of two exceptions, so that every reader can name the file and what to do."""

from __future__ import annotations

import json
from pathlib import Path

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
