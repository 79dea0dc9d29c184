"""Where and how nnunet_l2g is installed in this interpreter, and its start-up files there.

A wheel brings the start-up files along and lists them in its RECORD. An editable install holds no files of the package:
`nnunet_l2g register` places them beside its metadata and adds them to its RECORD, so that pip removes them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

STARTUP_NAMES = ("nnunet_l2g.pth", "nnunet_l2g.start")


@dataclass(frozen=True)
class Installation:
    """An installed nnunet_l2g: the site-packages folder with its metadata, its RECORD, wheel or editable."""

    folder: Path
    record: Path
    editable: bool

    @property
    def kind(self) -> str:
        return "editable" if self.editable else "wheel"

    @property
    def startup_files(self) -> list[Path]:
        return [self.folder / name for name in STARTUP_NAMES]

    def missing_startup_files(self) -> list[Path]:
        return [file for file in self.startup_files if not file.is_file()]


def find_installation() -> Installation | None:
    """The installation Python finds first, or None (e.g. when the checkout is merely on PYTHONPATH)."""
    for distribution in importlib.metadata.distributions(name="nnunet-l2g"):
        files = distribution.files or []
        # a checkout's egg-info, met first when its folder is on sys.path, has no RECORD and is no installation
        record = next((file for file in files if file.name == "RECORD" and file.parent.suffix == ".dist-info"), None)
        if record is not None:
            editable = all(file.as_posix() != "nnunet_l2g/autoload.py" for file in files)
            return Installation(Path(distribution.locate_file("")), Path(distribution.locate_file(record)), editable)
    return None


def startup_content() -> dict[str, bytes]:
    """The start-up files by name, as shipped in the package."""
    source = Path(__file__).parent / "_startup"
    return {name: (source / name).read_bytes() for name in STARTUP_NAMES}


def record_without(record: Path) -> str:
    """The RECORD's text without the lines of the start-up files."""
    lines = record.read_bytes().decode("utf-8").splitlines(keepends=True)  # pip's own line ends stay
    text = "".join(line for line in lines if line.split(",")[0] not in STARTUP_NAMES)
    return text if text.endswith("\n") or not text else f"{text}\n"


def record_line(name: str, content: bytes) -> str:
    """A RECORD line: name, sha256 in urlsafe base64 without padding, size."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames: a Python that starts meanwhile sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
