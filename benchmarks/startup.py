"""What the start-up file costs each Python start: an environment with it against one without, in turn.

python benchmarks/startup.py [-n 200] [-o benchmarks/startup.json]

Needs no dependency: the environments hold a copy of nnunet_l2g and, one of them, its start-up files. Each pair starts
`python -c pass` in both, in alternating order; reported is the median of the paired differences.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nnunet_l2g"
TARGET_MS = 1.0
NEIGHBOURS = 300  # other folders in site-packages, which the first import there has to list: about nnU-Net's own number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, metavar="PAIRS", help="pairs of starts (default: %(default)s)")
    parser.add_argument("-o", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        without, with_file = make_environment(Path(folder, "without")), make_environment(Path(folder, "with"))
        place_startup_files(with_file)
        result = measure(without, with_file, args.n)
    result |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "neighbours": NEIGHBOURS,
        "target_ms": TARGET_MS,
    }
    if args.o:
        args.o.write_text(json.dumps(result, indent=2) + "\n")
    low, high = result["interval_95_ms"]
    print(
        f"start-up file: {result['median_difference_ms']:.3f} ms per Python start (95 % interval {low:.3f} to {high:.3f}, "
        f"{args.n} pairs; a start without it {result['median_without_ms']:.1f} ms; target under {TARGET_MS:g} ms)"
    )
    return 0 if result["median_difference_ms"] < TARGET_MS else 1


def make_environment(folder: Path) -> Path:
    """A bare environment with a byte-compiled copy of the package, as pip leaves it; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = site_packages(python)
    for number in range(NEIGHBOURS):
        (site / f"neighbour_{number}").mkdir()
    shutil.copytree(PACKAGE, site / "nnunet_l2g", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([str(python), "-m", "compileall", "-q", str(site / "nnunet_l2g")], check=True)
    return python


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def place_startup_files(python: Path) -> None:
    for file in (PACKAGE / "_startup").iterdir():
        shutil.copy(file, site_packages(python))
    code = "import os; print(os.environ['nnUNet_extTrainer'])"  # fails if the start-up file did nothing
    subprocess.run([str(python), "-c", code], env=environment(), check=True, capture_output=True)


def environment() -> dict[str, str]:
    ours = ("nnUNet_extTrainer", "NNUNET_L2G_AUTOLOAD", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in ours}


def start(python: Path, env: dict[str, str]) -> float:
    """Milliseconds of one `python -c pass`."""
    begin = time.perf_counter()
    subprocess.run([str(python), "-c", "pass"], env=env, check=True)
    return 1000 * (time.perf_counter() - begin)


def measure(without: Path, with_file: Path, pairs: int) -> dict:
    env = environment()
    for python in (without, with_file):  # warm the file cache
        start(python, env)
    times = {without: [], with_file: []}
    for pair in range(pairs):
        for python in (without, with_file) if pair % 2 else (with_file, without):
            times[python].append(start(python, env))
    differences = [b - a for a, b in zip(times[without], times[with_file], strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(differences, k=pairs)) for _ in range(1000))
    return {
        "pairs": pairs,
        "median_difference_ms": round(statistics.median(differences), 4),
        "interval_95_ms": [round(medians[25], 4), round(medians[974], 4)],
        "median_without_ms": round(statistics.median(times[without]), 4),
        "median_with_ms": round(statistics.median(times[with_file]), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
