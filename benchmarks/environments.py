"""Runs the short test suite under several Pythons with the oldest and the newest nnU-Net and torch that are allowed.

    python benchmarks/environments.py [--python python3.10 ...] [--versions oldest newest] [--folder DIR] [--json FILE]

For each interpreter that is found, and each of both ends, a virtual environment is made (6 GB with CUDA's libraries, removed
afterwards), the checkout is installed into it, and the short suite is run (`pytest -m "not slow and not commands and
not long"`). JSON is added to. Exit status 1 if a test failed, or if the tests took longer than
--minutes. Without arguments: every python3.10 to python3.13 on PATH, both ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
ASKED = ("nnunetv2", "torch", "numpy", "dynamic-network-architectures")
VERSIONS = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {ASKED}}}))"


def test_environment(python: str, versions: str, folder: Path, minutes: float, more: list[str]) -> dict:
    """Makes the environment and runs the suite in it, so many minutes each; what was installed, and the counts of the tests."""
    code = "import sys; print(*sys.version_info[:3])"
    version = tuple(map(int, subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()))
    began, environment = time.time(), folder / f"{versions}-{version[0]}.{version[1]}"
    if not environment.exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
    inside = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pinned = ("-c", PROJECT / "tests" / "oldest.txt") if versions == "oldest" else ()
    subprocess.run([inside, "-m", "pip", "install", "-q", *pinned, "-e", f"{PROJECT}[test]"], check=True, timeout=60 * minutes)
    installed = json.loads(subprocess.run([inside, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout)
    print(f"Python {'.'.join(map(str, version))}, {installed}: installed in {time.time() - began:.0f} s", flush=True)
    began = time.time()
    command = [inside, "-m", "pytest", "-q", "-m", "not slow and not commands and not long", *more]
    status, output = run_tests(list(map(str, command)), minutes)
    lines = output.splitlines() or ["no output"]
    print(*[line for line in lines if line.startswith(("FAILED", "ERROR"))], lines[-1], sep="\n", flush=True)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return {
        "python": ".".join(map(str, version)),
        "versions": versions,
        **installed,
        **{kind: counts.get(kind, 0) for kind in ("passed", "failed", "skipped", "error")},
        "seconds": round(time.time() - began),
        "exit_status": status,
    }


def run_tests(command: list[str], minutes: float) -> tuple[int, str]:
    """Exit status and output; after so many minutes the status is 124. None of its processes outlives this function."""
    child = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=60 * minutes)
        return child.returncode, output
    except BaseException as error:
        if sys.platform == "win32":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, f"{output}\nstopped after {minutes:g} minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=[name for name in PYTHONS if shutil.which(name)])
    parser.add_argument("--versions", nargs="+", choices=("oldest", "newest"), default=["oldest", "newest"])
    parser.add_argument("--folder", type=Path, help="where environments are kept and used again; default: a temporary one")
    parser.add_argument(
        "--minutes", type=float, default=60, help="for installing, and for the tests; longer is a failure; default: %(default)s"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("more", nargs="*", help="after --, for pytest")
    args = parser.parse_args()
    results = []
    for python in args.python:
        for versions in args.versions:
            with tempfile.TemporaryDirectory() as temporary:
                results.append(test_environment(python, versions, args.folder or Path(temporary), args.minutes, args.more))
            if args.json:
                write(args.json, results[-1])
    if not results or any(result["exit_status"] for result in results):
        raise SystemExit(1)


def write(file: Path, result: dict) -> None:
    """Adds a result, in the place of an earlier one of the same Python and versions."""
    before = json.loads(file.read_text()) if file.exists() else []
    same = (result["python"].rsplit(".", 1)[0], result["versions"])
    kept = [other for other in before if (other["python"].rsplit(".", 1)[0], other["versions"]) != same]
    ordered = sorted([*kept, result], key=lambda r: (tuple(map(int, r["python"].split("."))), r["versions"]))
    file.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
