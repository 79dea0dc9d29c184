"""Coverage-guided fuzzing of our parsers: `python tests/files/fuzz/fuzz_parsers.py TARGET --seconds N`, or `all`.

Needs atheris (`pip install atheris`), which the tests do not. An input that breaks the contract of fuzz/targets.py is printed
and kept in tests/files/fuzz/corpus/<target>/, where
tests/files/test_parsers.py replays it from then on. Times and executions are added to fuzzed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "fuzzed.json"
MEMORY = "/dev/shm"  # thousands of small files a second
SLOWEST = 20  # s that one input may take


def main() -> int:
    """Exit status 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="one of fuzz/targets.py: TARGETS, or all")
    parser.add_argument("--seconds", type=int, default=120, help="for each target (default: 120)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        return fuzz(args.target, args.seconds)
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from fuzz.targets import TARGETS, clean

    clean()
    names = list(TARGETS) if args.target == "all" else [args.target]
    return max([start(name, args.seconds) for name in names])


def start(name: str, seconds: int) -> int:
    """Fuzzes one target in a process of its own, which a finding ends, and notes what was done."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as folder:
        command = [sys.executable, __file__, name, "--seconds", str(seconds), "--in-process"]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              env=os.environ | {"TMPDIR": folder})  # fmt: skip
        output = done.stdout.decode("utf-8", "replace")
        found = [path for path in Path(folder).iterdir() if path.name.startswith(("crash-", "timeout-", "oom-"))]
        for path in found:
            kept = HERE / "corpus" / name / path.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(path.read_bytes())
            print(f"{name}: {kept}")
    executions = [int(number) for number in re.findall(r"number_of_executed_units: (\d+)", output)]
    executions = executions or [int(number) for number in re.findall(r"#(\d+)\t", output)]
    note(name, time.monotonic() - begin, max(executions, default=0))
    print(f"{name}: {time.monotonic() - begin:.0f} s, {max(executions, default=0)} executions, {len(found)} found", flush=True)
    if done.returncode or found:
        print("\n".join(output.splitlines()[-40:]), flush=True)
    return int(bool(done.returncode or found))


def note(name: str, seconds: float, executions: int) -> None:
    """Adds to fuzzed.json, one process at a time."""
    with RECORD.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        record = json.loads(file.read() or "{}")
        entry = record.setdefault(name, {"seconds": 0, "executions": 0, "findings_mended": 0})
        entry["seconds"] += round(seconds)
        entry["executions"] += executions
        file.truncate(0)
        file.write(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


def fuzz(name: str, seconds: int) -> int:
    """Runs libFuzzer here; it ends the process."""
    import atheris

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with atheris.instrument_imports(include=["nnunet_l2g"]):
        from fuzz.targets import TARGETS

        target = TARGETS[name]
        with contextlib.suppress(Exception):  # libFuzzer finds it again
            target(b"")  # imports what it needs, instrumented
    options = [
        f"-max_total_time={seconds}",
        "-print_final_stats=1",
        "-max_len=400",
        f"-timeout={SLOWEST}",
        "-rss_limit_mb=6000",
    ]
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
