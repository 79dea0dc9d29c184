"""`nnunet_l2g env`: the line that sets nnUNet_extTrainer, for editable installs and for all who set it themselves."""

from __future__ import annotations

import argparse
import os
import shlex

from nnunet_l2g.autoload import VARIABLE, with_trainers

ASSIGN = {
    "sh": lambda value: f"export {VARIABLE}={shlex.quote(value)}",
    "fish": lambda value: "set -gx {} '{}'".format(VARIABLE, value.replace("\\", "\\\\").replace("'", "\\'")),
    "powershell": lambda value: "$env:{} = '{}'".format(VARIABLE, value.replace("'", "''")),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """--shell, by default that of the platform."""
    parser.epilog = 'Use it as: eval "$(nnunet_l2g env)"    fish: nnunet_l2g env --shell fish | source'
    default = "powershell" if os.name == "nt" else "sh"
    parser.add_argument("--shell", choices=list(ASSIGN), default=default, help="whose syntax (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the line. Folders that the variable holds already stay before ours."""
    print(ASSIGN[args.shell](with_trainers(os.environ.get(VARIABLE, ""))))
    return 0
