"""`nnunet_l2g COMMAND ...`: finds the command and hands over. Imports the one command that runs, so that --help is quick."""

from __future__ import annotations

import argparse
import importlib
import sys

from nnunet_l2g import __version__
from nnunet_l2g.errors import UserError

# Name and help. nnunet_l2g/<name>.py, or nnunet_l2g/<name>/command.py, has configure(parser) and run(args) -> exit status.
COMMANDS = {
    "adapt": "plans that adapt a labelled source dataset to an unlabelled target dataset",
    "compare": "trainings or prediction folders against a baseline: scores, paired statistics, cost, report",
    "demo": "the whole way on a small embedded phantom: plan, train, predict, evaluate, picture (CPU, minutes)",
    "doctor": "which interpreter, which nnU-Net, which trainers are found, and why not",
    "env": "print the line that sets nnUNet_extTrainer, for editable installs and for those who prefer to set it themselves",
    "inspect": "what a trained model does with one image: errors, references, residual maps, translations",
    "release": "a trained model as a zip that others can use without this package, or as ONNX",
}
FOLDERS = {"adapt", "compare", "demo", "inspect"}  # commands of several files


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 the command says no, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="nnunet_l2g", description="Research architectures inside a stock nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunet_l2g {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:
            command = importlib.import_module(f"nnunet_l2g.{name}" + ".command" * (name in FOLDERS))
            command.configure(subparser)
    args = parser.parse_args(argv)
    try:
        return command.run(args)
    except UserError as error:
        print(f"nnunet_l2g {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nnnunet_l2g {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
