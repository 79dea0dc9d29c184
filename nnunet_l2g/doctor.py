"""`nnunet_l2g doctor`: which interpreter, which nnU-Net, which trainers nnU-Net finds, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import nnunet_l2g
from nnunet_l2g import lookup
from nnunet_l2g.autoload import OPT_OUT, VARIABLE
from nnunet_l2g.compatibility import check_nnunet, installed_version
from nnunet_l2g.errors import UserError

NOBODY = "NoTrainerHasThisName"  # to find it, nnU-Net imports all that it can import
SET_IT = 'eval "$(nnunet_l2g env)"'


def configure(parser: argparse.ArgumentParser) -> None:
    """-tr NAME [NAME ...]."""
    shown = "trainers to look up (default: all of nnunet_l2g)"
    parser.add_argument("-tr", dest="trainers", nargs="+", metavar="NAME", help=shown)


def run(args: argparse.Namespace) -> int:
    """Prints the report. Exit status 0 if nnU-Net finds every trainer, else 1."""
    say("Python", f"{platform.python_version()}  {sys.executable}")
    say("nnunet_l2g", f"{nnunet_l2g.__version__} ({installed_as()})  {Path(nnunet_l2g.__file__).parent}")
    for name in ("nnunetv2", "torch", "torchvision"):
        say(name, installed_version(name) or "not installed")
    report_variables()
    try:
        check_nnunet()
    except UserError as error:
        return say("PROBLEM", str(error))
    try:
        with lookup.quiet():
            from nnunet_l2g import trainers
    except lookup.IMPORT_ERRORS as error:
        return say("PROBLEM", "nnunet_l2g's trainers cannot be imported", *lookup.explain(error))
    known = []
    try:
        lookup.find_trainer(NOBODY)
    except lookup.IMPORT_ERRORS as error:
        known = lookup.explain(error)
        say("PROBLEM", "a module that nnU-Net searches cannot be imported, so it finds no trainer in it or behind it", *known)
    results = [report_trainer(name, trainers, known) for name in args.trainers or trainers.__all__]
    return 0 if all(results) else 1


def say(label: str, text: str, *details: str) -> int:
    """Prints a line of the report, and details below it. Returns 1, the exit status of a PROBLEM."""
    print(f"{label:<18} {text}", *(f"{'':<18}   {line}" for line in details), sep="\n", flush=True)
    return 1


def installed_as() -> str:
    """How nnunet_l2g is installed in this interpreter: "wheel" or "editable"; "not installed" if it is merely importable."""
    for distribution in importlib.metadata.distributions(name="nnunet-l2g"):
        if distribution.read_text("RECORD") is not None:  # a checkout's egg-info has none and is no installation
            url = json.loads(distribution.read_text("direct_url.json") or "{}")
            return "editable" if url.get("dir_info", {}).get("editable") else "wheel"
    return "not installed"


def report_variables() -> None:
    """The folders that nnU-Net searches and why ours is not among them; then nnU-Net's three data folders."""
    folders = lookup.searched_folders()
    ours = [folder for folder in folders if lookup.is_ours(folder)]
    say(VARIABLE, "set to" if folders else "not set", *(f"{f}  <- nnunet_l2g" if f in ours else f for f in folders))
    if not ours:
        say("PROBLEM", f"the folder of nnunet_l2g is not in {VARIABLE}: {why_absent()}")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(name)
        if not value:
            say("note", f"{name} is not set; nnU-Net's commands need it: export {name}=/path/to/folder")
        elif value[0] in "'\"" or value[-1] in "'\"":
            say("PROBLEM", f"{name} is {value}: nnU-Net takes the quotation marks for a part of the path; set it without")
        else:
            say(name, value if os.path.isdir(value) else f"{value}, which is no folder")


def why_absent() -> str:
    """Why the start-up file did not add our folder in this process, and what to do."""
    if sys.flags.no_site:
        return "Python runs with -S, which skips start-up files; start it without -S"
    if os.environ.get(OPT_OUT) == "0":
        return f"{OPT_OUT}=0 turns it off; unset it, or set the variable in each new shell: {SET_IT}"
    why = {
        "not installed": "nnunet_l2g is not installed in this Python; pip install it",
        "editable": "an editable install has no start-up file; pip install it without -e",
        "wheel": "the start-up file nnunet_l2g.pth is gone or did not run; pip install it again with --force-reinstall",
    }
    return f"{why[installed_as()]}, or set the variable in each new shell: {SET_IT}"


def report_trainer(name: str, trainers, known: list[str]) -> bool:
    """Looks one trainer up. Returns whether nnU-Net finds it, and finds ours if we have one of this name."""
    try:
        trainer = lookup.find_trainer(name)
    except lookup.IMPORT_ERRORS as error:
        cause = lookup.explain(error)
        say("NOT FOUND", name, *(cause if cause != known else []))
        return False
    if trainer is None:
        names = f"nnunet_l2g has {', '.join(trainers.__all__)}, each also as <Trainer>[_<N>epochs[_<M>iterations]][_run<K>]"
        say("NOT FOUND", name, *([] if name in trainers.__all__ else [names]))
        return False
    file = None if trainer.__module__.startswith("nnunet_l2g.") else lookup.file_that_wins(name)
    say("found", f"{name}  ({file or trainer.__module__})")
    if file is None or not hasattr(trainers, name):
        return True
    advice = f"to do: rename that class, or take its folder out of {VARIABLE}"
    say("PROBLEM", f"this is not nnunet_l2g's {name}: nnU-Net takes the first class of that name, the one in {file}", advice)
    return False
