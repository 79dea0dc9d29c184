"""nnU-Net's own look-up of trainers, and the real cause if it fails.

The look-up imports all of nnU-Net's trainers and then every module in each folder of nnUNet_extTrainer, until one has the
name. If one module cannot be imported, the look-up ends, and no trainer behind that module can be found.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, trainers_folder

IMPORT_ERRORS = (Exception, SystemExit)  # SystemExit: a script in a user's folder that runs when it is imported


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what nnU-Net and its dependencies print and warn while they are imported."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_trainer(name: str) -> type | None:
    """The class that nnU-Net finds under this name, or None. Raises what a module raises that cannot be imported."""
    with quiet():
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        try:
            return recursive_find_trainer_class_by_name(name)
        except RuntimeError as error:
            if str(error).startswith("Could not find requested nnunet trainer"):
                return None
            raise


def searched_folders() -> list[str]:
    """The folders in nnUNet_extTrainer, in nnU-Net's order."""
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def is_ours(folder: str) -> bool:
    """Whether a folder in nnUNet_extTrainer is the one of nnunet_l2g."""
    return os.path.realpath(folder) == os.path.realpath(trainers_folder())


def file_that_wins(name: str) -> Path | None:
    """The first file that defines `class <name>` in a folder that nnU-Net searches before ours, or None.

    It reads the text. The class itself does not tell: nnU-Net drops the modules of these folders after a look-up.
    """
    definition = re.compile(rf"^\s*class\s+{re.escape(name)}\b", re.MULTILINE)
    for folder in itertools.takewhile(lambda folder: not is_ours(folder), searched_folders()):
        for path in sorted(Path(folder).rglob("*.py")):
            if definition.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    return None


def explain(error: BaseException) -> list[str]:
    """Why an import failed, in lines: the first exception of the chain, the modules that led to it, and what to do."""
    frames = list(traceback.walk_tb(error.__traceback__))
    while origin := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = origin
        frames += traceback.walk_tb(error.__traceback__)
    names = dict.fromkeys(frame.f_globals.get("__name__", "?").partition(".")[0] for frame, _ in frames)
    modules = [name for name in names if name not in ("importlib", "nnunet_l2g", "__main__")]
    lines = [f"cause: {type(error).__name__}: {str(error).strip() or '(no message)'}"]
    if modules:
        lines.append(f"raised in: {' -> '.join(modules)}")
    for folder in itertools.filterfalse(is_ours, searched_folders()):
        files = [frame.f_code.co_filename for frame, _ in frames if Path(frame.f_code.co_filename).is_relative_to(folder)]
        if files:
            lines.append(f"to do: correct or remove {files[-1]}, or take {folder} out of {VARIABLE}")
            return lines
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if "torchvision" in (*modules, missing):
        lines.append(
            "nnU-Net's trainers import timm, which imports torchvision, and torchvision has to fit torch. To do: "
            "pip uninstall -y torchvision, then pip install torchvision with your torch's version and --index-url"
        )
    elif missing:
        lines.append(f"to do: install what provides the module {missing!r} into this Python")
    return lines
