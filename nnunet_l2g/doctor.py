"""`nnunet_l2g doctor`: which interpreter, which nnU-Net, which trainers nnU-Net finds, and why not."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import nnunet_l2g
from nnunet_l2g import lookup
from nnunet_l2g.autoload import OPT_OUT, VARIABLE, trainers_folder
from nnunet_l2g.compatibility import NNUNET_RANGE, check_nnunet, installed_version
from nnunet_l2g.errors import UserError
from nnunet_l2g.installation import find_installation


def configure(parser: argparse.ArgumentParser) -> None:
    """-tr NAME [NAME ...]."""
    parser.add_argument(
        "-tr", dest="trainers", nargs="+", metavar="NAME", help="trainers to look up (default: all of nnunet_l2g)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report. 0 only if nnU-Net finds every trainer."""
    report_versions()
    report_variable()
    report_data_folders()
    try:
        check_nnunet()
    except UserError as error:
        return say("PROBLEM", str(error))
    try:
        lookup.import_nnunet_trainers()
    except lookup.IMPORT_ERRORS as error:
        say("PROBLEM", "nnU-Net's own trainers cannot be imported, so no trainer outside nnU-Net can be found")
        return detail(lookup.explain(error))
    report_folders()
    try:
        own = lookup.own_trainers()
    except lookup.IMPORT_ERRORS as error:
        say("PROBLEM", "nnunet_l2g.trainers cannot be imported")
        return detail(lookup.explain(error))
    results = [report_trainer(name, own) for name in args.trainers or own]
    return 0 if all(results) else 1


def say(label: str, text: str) -> int:
    """One line of the report; 1, so that a PROBLEM can be returned as exit status."""
    print(f"{label:<18} {text}", flush=True)
    return 1


def detail(lines: list[str]) -> int:
    """Lines that belong to the one before; 1, as `say`."""
    for line in lines:
        say("", f"  {line}")
    return 1


def report_versions() -> None:
    package = Path(nnunet_l2g.__file__).parent
    installation = find_installation()
    kind = installation.kind if installation else "not installed, merely importable"
    say("Python", f"{platform.python_version()}  {sys.executable}")
    say("prefix", sys.prefix)
    say("nnunet_l2g", f"{nnunet_l2g.__version__} ({kind})  {package}")
    if installation and not installation.editable and package.parent.resolve() != installation.folder.resolve():
        detail([f"a folder on Python's path hides the installed one in {installation.folder}"])
    say("nnunetv2", f"{installed_version('nnunetv2') or 'not installed'} (supported: {NNUNET_RANGE})")
    for name in ("torch", "torchvision"):
        say(name, installed_version(name) or "not installed")


def report_variable() -> None:
    """Lists the folders nnU-Net searches, and says why ours is not among them."""
    folders = lookup.searched_folders()
    say(VARIABLE, "set to" if folders else "not set")
    ours = [folder for folder in folders if lookup.same_folder(folder, trainers_folder())]
    detail([f"{folder}  <- nnunet_l2g" if folder in ours else folder for folder in folders])
    if not ours:
        say("PROBLEM", f"nnunet_l2g's folder is not in {VARIABLE}: {why_absent()}")


def report_data_folders() -> None:
    """nnU-Net's three folders: says which variable is not set, holds quotation marks, or names no folder."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(name)
        if not value:
            say("note", f"{name} is not set; nnU-Net's commands need it: export {name}=/path/to/folder")
        elif {value[0], value[-1]} & {'"', "'"}:
            say("PROBLEM", f"{name} is {value}: nnU-Net takes the quotation marks for a part of the path; set it without")
        elif not os.path.isdir(value):
            say("note", f"{name} is {value}, which is no folder")
        else:
            say(name, value)


def why_absent() -> str:
    """Why the start-up files did not append our folder in this process, and what to do."""
    if sys.flags.no_site:
        return "Python runs with -S, which skips start-up files; start it without -S"
    if os.environ.get(OPT_OUT) == "0":
        return f'{OPT_OUT}=0 switches it off; unset it, or set the variable yourself with: eval "$(nnunet_l2g env)"'
    installation = find_installation()
    if installation is None:
        return 'nnunet_l2g is not installed in this Python; pip install it, or use: eval "$(nnunet_l2g env)"'
    missing = ", ".join(file.name for file in installation.missing_startup_files())
    if missing and installation.editable:
        return f"an editable install does not place {missing} in {installation.folder}; run: nnunet_l2g register"
    if missing:
        return f"{missing} is gone from {installation.folder}; pip install --force-reinstall --no-deps nnunet-l2g"
    return (
        f"the start-up files in {installation.folder} did not run, or the variable was changed since; "
        'set it yourself with: eval "$(nnunet_l2g env)"'
    )


def report_folders() -> None:
    """Imports each folder as a look-up does: one that fails hides all trainers behind it."""
    for folder in lookup.searched_folders():
        if not os.path.isdir(folder):
            say("note", f"{folder} in {VARIABLE} does not exist; nnU-Net skips it")
            continue
        try:
            lookup.import_folder(folder)
        except lookup.IMPORT_ERRORS as error:
            say("PROBLEM", f"a module in {folder} cannot be imported: trainers in it and behind it cannot be found")
            detail([*lookup.explain(error), f"to do: mend or remove that module, or take the folder out of {VARIABLE}"])


def report_trainer(name: str, own: list[str]) -> bool:
    """Looks one trainer up; whether nnU-Net found it."""
    try:
        trainer = lookup.find_trainer(name)
    except lookup.IMPORT_ERRORS as error:
        say("NOT FOUND", name)
        detail(lookup.explain(error))
        return False
    if trainer is not None:
        file = None if trainer.__module__.startswith("nnunet_l2g.") else lookup.file_that_wins(name)
        say("found", f"{name}  ({file or trainer.__module__})")
        if file is None or not lookup.is_ours(name):
            return True
        say("PROBLEM", f"this is not nnunet_l2g's {name}: nnU-Net takes the first class of that name, the one in {file}")
        return detail([f"to do: rename that class, or take its folder out of {VARIABLE}"]) == 0
    say("NOT FOUND", name)
    if name in own:
        detail([f"nnunet_l2g has it, but nnU-Net does not search nnunet_l2g's folder: see {VARIABLE} above"])
    else:
        detail(
            [
                f"nnunet_l2g has {', '.join(own)}; any trainer also as <Trainer>_<N>epochs, <Trainer>_<N>epochs_<M>iterations, "
                "and each of these with _run<K>"
            ]
        )
    return False
