"""Virtual environments for one test, without nnunet_l2g. All other packages come from the running Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = ("nnunet_l2g", "trainers", "architectures", "setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md")
TRAINER = "nnUNetTrainerL2GNet"
USER_TRAINERS = f"""
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOfMine(nnUNetTrainer): pass
class {TRAINER}_myloss(nnUNetTrainer): pass
"""
OURS = ("nnUNet_extTrainer", "NNUNET_L2G_AUTOLOAD", "PYTHONPATH")


def copy_project(target: Path) -> Path:
    """Copies the files that a build needs, so that build/ and egg-info are not made in the checkout."""
    target.mkdir()
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    return target


class Environment:
    """A virtual environment with links to all packages of the running Python except nnunet_l2g."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder = folder
        self.scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / "python"
        self.site = Path(self.check("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        # Not the running Python's own folder, where nnunet_l2g may be installed. A folder that a .pth file names is only
        # searched. The .pth files in it are not run, so nothing of the running Python starts here.
        links = folder / "links"
        links.mkdir()
        for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(packages).iterdir():
                if "nnunet_l2g" not in entry.name.replace("-", "_").lower():
                    (links / entry.name).symlink_to(entry)
        (self.site / "zz_links.pth").write_text(f"{links}\n")

    def start(self, program: str | Path, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs a program with only these variables of ours set."""
        inherited = {key: value for key, value in os.environ.items() if key not in OURS}
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PIP_ROOT_USER_ACTION": "ignore"}
        command = [str(program), *map(str, args)]
        environment = inherited | quiet | variables
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def check(self, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """`python *args`. The exit status must be 0."""
        done = self.start(self.python, *args, **variables)
        assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *args: str) -> subprocess.CompletedProcess:
        offline = ("--no-deps", "--no-build-isolation", "-q") if args[0] == "install" else ()
        return self.check("-m", "pip", args[0], *offline, *args[1:])

    def l2g(self, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """The installed command `nnunet_l2g`."""
        return self.start(self.scripts / "nnunet_l2g", *args, **variables)

    def variable(self, **variables: str) -> list[str]:
        """The folders in nnUNet_extTrainer as a fresh Python sees them."""
        code = "import os; print(os.environ.get('nnUNet_extTrainer', ''))"
        done = self.check("-c", code, **variables)
        assert done.stderr == ""
        return done.stdout.strip().split(os.pathsep) if done.stdout.strip() else []

    def files(self) -> set[str]:
        """Everything in site-packages."""
        return {str(path.relative_to(self.site)) for path in self.site.rglob("*")}
