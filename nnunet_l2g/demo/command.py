"""`nnunet_l2g demo`: phantom, plan, train, predict, evaluate, picture, with nnU-Net's own commands."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from nnunet_l2g import __version__
from nnunet_l2g.demo.folder import PICTURE, SUMMARY, open_folder
from nnunet_l2g.demo.steps import Demo, Step
from nnunet_l2g.errors import UserError
from nnunet_l2g.lookup import file_that_wins
from nnunet_l2g.nnunet import Interrupted, choose_device, nnunet_variables, shown_command

DEFAULT_TRAINER = "nnUNetTrainerL2GNet_8epochs_50iterations"


def configure(parser: argparse.ArgumentParser) -> None:
    """-o, --overwrite, --seed, --device, -tr."""
    parser.add_argument(
        "-o",
        dest="folder",
        type=Path,
        default=Path("nnunet_l2g_demo"),
        metavar="FOLDER",
        help="where everything goes (default: ./nnunet_l2g_demo); finished steps in it are reused",
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh in a folder that an earlier demo made")
    parser.add_argument("--seed", type=int, default=0, help="of the phantom (default: 0)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a CUDA GPU if torch sees one (default)"
    )
    parser.add_argument(
        "-tr",
        dest="trainer",
        default=DEFAULT_TRAINER,
        metavar="TRAINER",
        help=f"any trainer nnU-Net finds (default: {DEFAULT_TRAINER}; "
        "<trainer>_<N>epochs_<M>iterations exists for every trainer of nnunet_l2g)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs what is not finished yet. 0 done, 130 interrupted; UserError for everything the user can mend."""
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    settings = {"seed": args.seed, "trainer": args.trainer, "version": __version__}
    folder = open_folder(args.folder, settings, args.overwrite)
    demo = Demo(folder, args.trainer, choose_device(args.device), args.seed)
    steps = demo.steps()
    print(f"nnunet_l2g demo in {folder.path}", flush=True)
    if file := file_that_wins(args.trainer):
        print(f"note: nnU-Net takes {args.trainer} from {file}, not from nnunet_l2g", flush=True)
    begin = time.monotonic()
    try:
        run_steps(demo, steps)
    except (Interrupted, KeyboardInterrupt):
        print(interruption(steps, folder.finished), file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - begin:.0f} s.\n{closing(demo)}")
    return 0


def run_steps(demo: Demo, steps: list[Step]) -> None:
    """Runs each step that is not finished, or whose result is gone, and all after it."""
    folder = demo.folder
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.title}"
        if step.name in folder.finished and step.result.exists():
            print(f"{head}: done before", flush=True)
            continue
        print(head, flush=True)
        resume = step.name in folder.started and step.name not in folder.finished
        folder.forget([later.name for later in steps[number:]])
        folder.start(step.name)
        begin = time.monotonic()
        step.run(resume)
        if not step.result.exists():
            raise UserError(
                f"step {step.name} ended without an error, but {step.result} is missing; "
                f"see the logs in {demo.path}, and run the demo with --overwrite"
            )
        folder.finish(step.name, time.monotonic() - begin)
        print(f"      {time.monotonic() - begin:.0f} s", flush=True)


def interruption(steps: list[Step], finished: dict[str, float]) -> str:
    """What is done, what is not, and how to go on."""
    done = [step.name for step in steps if step.name in finished]
    missing = [step.name for step in steps if step.name not in finished]
    return (
        f"\nnnunet_l2g demo: interrupted; no process of it is left running.\n  done: {', '.join(done) or 'nothing'}\n"
        f"  not done: {', '.join(missing)}\nTo go on, run the same command again (without --overwrite): "
        "finished steps are kept, and training continues from its last checkpoint."
    )


def closing(demo: Demo) -> str:
    """Where everything is, and the commands that were run."""
    setter = "set" if os.name == "nt" else "export"
    variables = nnunet_variables(demo.path).items()
    lines = [
        f"  folder   {demo.path}",
        f"  picture  {demo.path / PICTURE}",
        f"  summary  {demo.path / SUMMARY}",
        f"  model    {demo.model}",
        "To repeat it by hand:",
    ]
    lines += [f"  {setter} {name}={value if os.name == 'nt' else shlex.quote(value)}" for name, value in variables]
    return "\n".join([*lines, *(f"  {shown_command(*command)}" for command in demo.commands().values())])
