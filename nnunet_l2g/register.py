"""`nnunet_l2g register`: places the start-up files that an editable install lacks."""

from __future__ import annotations

import argparse
from pathlib import Path

import nnunet_l2g
from nnunet_l2g.errors import UserError
from nnunet_l2g.installation import (
    Installation,
    find_installation,
    record_line,
    record_without,
    startup_content,
    write_atomically,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Registers this interpreter's editable install."""
    installation = require_installation()
    if not installation.editable:
        return report_wheel(installation)
    names = ", ".join(file.name for file in installation.startup_files)
    try:
        changed = register(installation)
    except OSError as error:
        raise UserError(
            f"cannot write {names} to {installation.folder} ({error.strerror or error}); make that folder writable, or "
            'set the variable yourself with: eval "$(nnunet_l2g env)"'
        ) from error
    if changed:
        print(f"Placed {names} in {installation.folder}.")
        print("nnU-Net finds the trainers in every Python process started from now on. Undo: nnunet_l2g unregister")
    else:
        print(f"Already registered: {names} are in {installation.folder}.")
    return 0


def require_installation() -> Installation:
    """The installation in this interpreter; a UserError where there is none."""
    installation = find_installation()
    if installation is None:
        raise UserError(
            f"nnunet_l2g is imported from {Path(nnunet_l2g.__file__).parent} but not installed in this Python; install "
            'it (pip install -e . in the checkout), or set the variable yourself with: eval "$(nnunet_l2g env)"'
        )
    return installation


def report_wheel(installation: Installation) -> int:
    """A wheel has its start-up files from pip."""
    missing = installation.missing_startup_files()
    if missing:
        raise UserError(
            f"{', '.join(map(str, missing))} should have come with the wheel but is gone; bring it back with: "
            "pip install --force-reinstall --no-deps nnunet-l2g"
        )
    print(f"Nothing to do: installed from a wheel, which brought its start-up files to {installation.folder}.")
    return 0


def register(installation: Installation) -> bool:
    """Writes RECORD and files where they differ from what they should be; whether anything changed."""
    content = startup_content()
    record = record_without(installation.record) + "".join(record_line(*item) for item in content.items())
    # RECORD first: should the rest fail, pip skips a listed file that is absent, but would never find an unlisted one
    wanted = {installation.record: record.encode()}
    wanted.update((installation.folder / name, data) for name, data in content.items())
    outdated = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    for path in outdated:
        write_atomically(path, wanted[path])
    return bool(outdated)
