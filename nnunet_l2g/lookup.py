"""nnU-Net's own trainer look-up, run for a diagnosis: its chatter captured, the real cause of a failure dug out.

The look-up imports all of nnU-Net's trainers, then every module in each folder of nnUNet_extTrainer, until one has the
name. One module that cannot be imported ends it, and makes every trainer behind it unfindable.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, trainers_folder
from nnunet_l2g.compatibility import installed_version

NOBODY = "NoTrainerHasThisName"  # a look-up for it imports everything there is
IMPORT_ERRORS = (Exception, SystemExit)  # SystemExit: a script without a main guard in a user's folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what nnU-Net and its dependencies print and warn while they are imported."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def import_nnunet_trainers() -> None:
    """Imports all of nnU-Net's own trainers, the first part of every look-up; raises what the import raises."""
    with quiet():
        import nnunetv2
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        package = nnunetv2.__path__[0]
        folder = os.path.join(package, "training", "nnUNetTrainer")
        recursive_find_python_class(folder, NOBODY, "nnunetv2.training.nnUNetTrainer", package)


def import_folder(folder: str) -> None:
    """Imports every module of a folder in nnUNet_extTrainer as a look-up does; raises what the import raises."""
    with quiet():
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        recursive_find_python_class(folder, NOBODY, None, base_folder=folder, cleanup_imports_from_base_folder=True)


def find_trainer(name: str) -> type | None:
    """The class nnU-Net finds under this name, None if it finds none; raises what ends the look-up early."""
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


def same_folder(first: str, second: str) -> bool:
    """Whether both paths lead to one folder."""
    return os.path.realpath(first) == os.path.realpath(second)


def file_that_wins(name: str) -> Path | None:
    """The first file that defines `class <name>` in a folder that nnU-Net searches before ours, None if there is none.

    Reads text and imports nothing: a look-up drops the modules of these folders again, so that a class no longer tells where
    it came from.
    """
    definition = re.compile(rf"^\s*class\s+{re.escape(name)}\b", re.MULTILINE)
    before_ours = itertools.takewhile(lambda folder: not same_folder(folder, trainers_folder()), searched_folders())
    files = (path for folder in before_ours for path in sorted(Path(folder).rglob("*.py")))
    return next((path for path in files if definition.search(path.read_text(encoding="utf-8", errors="replace"))), None)


def own_trainers() -> list[str]:
    """The names in `nnunet_l2g.trainers.__all__`; raises what the import raises."""
    with quiet():
        from nnunet_l2g import trainers

        return list(trainers.__all__)


def is_ours(name: str) -> bool:
    """Whether nnunet_l2g has a trainer of this name, schedules included."""
    from nnunet_l2g import trainers

    with quiet():
        return hasattr(trainers, name)


def chain(error: BaseException) -> list[BaseException]:
    """The exception and what it came from, the root last."""
    errors = [error]
    while True:
        last = errors[-1]
        origin = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if origin is None or origin in errors:
            return errors
        errors.append(origin)


def import_path(error: BaseException) -> list[str]:
    """The top-level modules whose code was running when the root cause was raised, outermost first."""
    names = []
    for link in chain(error):
        traceback = link.__traceback__
        while traceback is not None:
            name = traceback.tb_frame.f_globals.get("__name__", "?").partition(".")[0]
            if name not in (*names, "importlib", "nnunet_l2g", "__main__"):
                names.append(name)
            traceback = traceback.tb_next
    return names


def explain(error: BaseException) -> list[str]:
    """The root cause, the way that led to it and what to do, one line each."""
    root = chain(error)[-1]
    path = import_path(error)
    lines = [f"cause: {type(root).__name__}: {str(root).strip() or '(no message)'}"]
    if path:
        lines.append(f"raised in: {' -> '.join(path)}")
    if "torchvision" in path or (isinstance(root, ModuleNotFoundError) and root.name == "torchvision"):
        lines.extend(_explain_torchvision())
    elif isinstance(root, ModuleNotFoundError) and root.name:
        lines.append(f"to do: install what provides the module {root.name!r} into this Python")
    return lines


def _explain_torchvision() -> list[str]:
    torch, torchvision = installed_version("torch"), installed_version("torchvision")
    wanted = [line for line in _requirements("torchvision") if line.replace("(", " ").split()[0].startswith("torch")]
    asks = f", which asks for {', '.join(wanted)}" if wanted else ""
    pinned = f'"torch=={torch.partition("+")[0]}"' if torch else "torch"
    return [
        f"torch {torch or 'not installed'}, torchvision {torchvision or 'not installed'}{asks}; nnU-Net's look-up "
        "imports all of its own trainers first, and those import timm, which imports torchvision",
        f"to do: pip uninstall -y torchvision, then pip install {pinned} torchvision (torch's --index-url)",
    ]


def _requirements(distribution: str) -> list[str]:
    try:
        return [line for line in importlib.metadata.requires(distribution) or [] if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        return []
