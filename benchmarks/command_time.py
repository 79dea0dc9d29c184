"""What `nnunet_l2g --help` and nnU-Net's look-up of a trainer cost, each in a fresh Python.

python benchmarks/command_time.py [-n 15] [-o command_time.json]

Commands: wall milliseconds beside `python -c pass`, in turn. Look-up: milliseconds of nnU-Net's own function, once nnU-Net and
torch are imported: of a trainer of its own, of a name that nobody has with our folder off (nnU-Net then imports all its own
trainers in vain, as it does before it comes to ours), and of ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import conditions, positive, write_json

from nnunet_l2g.autoload import VARIABLE, with_trainers

LOOK_UP = """
import sys, time
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
began = time.perf_counter()
try:
    find(sys.argv[1])
except RuntimeError:
    pass
print(1000 * (time.perf_counter() - began))
"""
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "nnunet_l2g --help": ["-m", "nnunet_l2g.cli", "--help"],
    "nnunet_l2g env": ["-m", "nnunet_l2g.cli", "env"],
}
NAMES = {
    "nnU-Net's own": ("nnUNetTrainer_20epochs", False),
    "nobody's, our folder off": ("nnUNetTrainerThatNobodyHas", False),
    "ours": ("nnUNetTrainerL2GNet_20epochs", True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=positive, default=15, metavar="N", help="starts of each; default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in (*COMMANDS, *NAMES)}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.n + 1):  # the first one warms the file cache
            for name in times:
                took = of_command(COMMANDS[name], folder) if name in COMMANDS else of_look_up(*NAMES[name], folder)
                if turn:
                    times[name].append(took)
    rows = {}
    for name, values in times.items():
        reference = times["python -c pass" if name in COMMANDS else "nobody's, our folder off"]
        above = statistics.median(a - b for a, b in zip(values, reference, strict=True))
        rows[name] = {"median_ms": round(statistics.median(values), 2), "above_reference_ms": round(above, 2)}
        print(f"{name:<28}{rows[name]['median_ms']:>9.1f} ms{above:>+9.1f} ms")
    write_json(conditions(torch.device("cpu")) | {"starts": args.n, "results": rows}, args.output)
    return 0


def of_command(arguments: list[str], folder: str) -> float:
    """Milliseconds of `python *arguments`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment(True), capture_output=True, check=True)
    return 1000 * (time.perf_counter() - began)


def of_look_up(name: str, with_ours: bool, folder: str) -> float:
    """Milliseconds that the look-up takes, as the child says."""
    command = [sys.executable, "-W", "ignore", "-c", LOOK_UP, name]
    child = subprocess.run(command, cwd=folder, env=environment(with_ours), capture_output=True, text=True, check=True)
    return float(child.stdout.split()[-1])


def environment(with_ours: bool) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != VARIABLE}
    return inherited | ({VARIABLE: with_trainers("")} if with_ours else {"NNUNET_L2G_AUTOLOAD": "0"})


if __name__ == "__main__":
    sys.exit(main())
