"""`nnunet_l2g unregister`: removes what `nnunet_l2g register` placed."""

from __future__ import annotations

import argparse

from nnunet_l2g.errors import UserError
from nnunet_l2g.installation import Installation, record_without, write_atomically
from nnunet_l2g.register import require_installation


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Unregisters this interpreter's editable install."""
    installation = require_installation()
    if not installation.editable:
        raise UserError(
            f"the start-up files in {installation.folder} belong to an installed wheel, which removes them itself: set "
            "NNUNET_L2G_AUTOLOAD=0 to switch them off, or pip uninstall nnunet-l2g"
        )
    try:
        removed = unregister(installation)
    except OSError as error:
        raise UserError(f"cannot change {installation.folder} ({error.strerror or error}); make it writable") from error
    if removed:
        print(f"Removed {', '.join(removed)} from {installation.folder}.")
        print("Python processes started from now on no longer tell nnU-Net about the trainers.")
    else:
        print(f"Nothing to do: no start-up files in {installation.folder}.")
    return 0


def unregister(installation: Installation) -> list[str]:
    """Removes the files, then their RECORD lines; the names of the files removed."""
    present = [file for file in installation.startup_files if file.exists()]
    for file in present:
        file.unlink()
    record = record_without(installation.record).encode()
    if record != installation.record.read_bytes():
        write_atomically(installation.record, record)
    return [file.name for file in present]
