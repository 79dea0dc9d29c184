"""Metadata is in setup.cfg. This file places the start-up files beside the package, which setup.cfg cannot do."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP_FILES = ("nnunet_l2g.pth", "nnunet_l2g.start")


class BuildWithStartupFiles(build_py):
    """Copies the start-up files beside the package. A wheel then lists them in its RECORD, and pip removes them.

    An editable install builds no such tree and has no start-up files: `nnunet_l2g env` serves it.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in STARTUP_FILES:
                self.copy_file(str(Path("nnunet_l2g", "_startup", name)), str(Path(self.build_lib, name)))


setup(cmdclass={"build_py": BuildWithStartupFiles})
