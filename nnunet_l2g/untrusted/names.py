"""Names that are read from files and joined to folders."""

from __future__ import annotations

from nnunet_l2g.errors import UserError

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
