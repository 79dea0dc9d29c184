"""`nnunet_l2g env`: the line that sets nnUNet_extTrainer, for those who prefer to set it themselves."""

from __future__ import annotations

import argparse
import os
import shlex

from nnunet_l2g.autoload import VARIABLE, with_trainers

ASSIGN = {
    "sh": lambda value: f"export {VARIABLE}={shlex.quote(value)}",
    "fish": lambda value: f"set -gx {VARIABLE} '{_escape_fish(value)}'",
    "powershell": lambda value: "$env:{} = '{}'".format(VARIABLE, value.replace("'", "''")),
    "cmd": lambda value: f'set "{VARIABLE}={value}"',
}


def configure(parser: argparse.ArgumentParser) -> None:
    """--shell, which follows the platform unless given."""
    parser.epilog = 'Use it as: eval "$(nnunet_l2g env)"    fish: nnunet_l2g env --shell fish | source'
    default = "powershell" if os.name == "nt" else "sh"
    parser.add_argument("--shell", choices=list(ASSIGN), default=default, help="whose syntax (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the line; folders that the variable holds already stay, and stay first."""
    print(ASSIGN[args.shell](with_trainers(os.environ.get(VARIABLE, ""))))
    return 0


def _escape_fish(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
