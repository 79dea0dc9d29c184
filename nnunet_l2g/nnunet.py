"""Runs nnU-Net's own commands as child processes: with a log, live progress, and an end to all of them on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.errors import UserError

POLL = 0.2  # s
GRACE = 15.0  # s from SIGTERM to SIGKILL
KILL = 9
LAST_LINES = 15  # of a log, in an error
HEAD = "### "  # before each command in a log
ADVICE = "What is finished is kept. Correct the cause and run the same command again."
_TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ")
_EPOCH = re.compile(r"(Epoch|train_loss|val_loss|Pseudo dice) ")
_SHOWN = re.compile(r"(Fingerprint extraction|Experiment planning|Preprocessing)\.\.\.|[Pp]redicting \w|Mean Validation Dice")


class Interrupted(Exception):
    """The user, or the system, asked to stop. No child process is left."""


def nnunet_command(script: str, args: list[str], prelude: str = "") -> list[str]:
    """The argv that runs nnU-Net's console script with this interpreter, whatever is on PATH.

    `prelude` is Python code that runs first. UserError if this interpreter has no such script.
    """
    for found in entry_points(group="console_scripts", name=script):
        function = found.attr.split(".")[0]
        code = f"import sys; from {found.module} import {function}; sys.argv[0] = {script!r}; sys.exit({found.attr}())"
        return [sys.executable, "-c", prelude + code, *args]
    raise UserError(
        f"nnU-Net's command {script} is not installed for {sys.executable}; call nnunet_l2g from nnU-Net's environment"
    )


def shown_command(script: str, args: list[str]) -> str:
    """The command as a user types it."""
    return shlex.join([script, *args])


def nnunet_variables(folder: Path) -> dict[str, str]:
    """nnU-Net's three variables for a project that lies in one folder."""
    return {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def child_environment(folder: Path | None = None) -> dict[str, str]:
    """The variables of the caller, with our trainers; output arrives line by line.

    `folder` is that of a small project (`nnunet_variables`), which gets few workers: each of them imports torch first.
    """
    environment = os.environ | {
        VARIABLE: with_trainers(os.environ.get(VARIABLE, "")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "Agg",
    }
    if folder is not None:
        workers = str(min(available_cores(), 4))
        environment |= nnunet_variables(folder) | {"nnUNet_n_proc_DA": workers, "nnUNet_def_n_proc": workers}
        environment.setdefault("nnUNet_compile", "f")  # on a GPU, compiling would take longer than the training
    return environment


def available_cores() -> int:
    """Cores that this process may use. Under taskset or a scheduler they are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(requested: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". UserError if torch is broken, or sees no CUDA device that was requested."""
    if requested == "cpu":
        return "cpu"
    try:
        import torch
    except Exception as error:  # a broken installation: each kind raises its own
        raise UserError(f"torch cannot be imported ({error}); run `nnunet_l2g doctor` for the cause") from error
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


class Progress:
    """Reads a command's log for the terminal: one line for each epoch, each case and each part of planning.

    It opens the log each time: a network file system then shows what another machine has written.
    """

    def __init__(self, log: Path):
        self.log, self.epoch = log, []
        self.position = log.stat().st_size if log.is_file() else 0

    def new(self) -> list[str]:
        """What to show since the last call. A carriage return ends a line, too (progress bars)."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as file:
            file.seek(self.position)
            whole, end, _ = file.read().replace(b"\r", b"\n").rpartition(b"\n")
        self.position += len(whole + end)
        shown = [self.shown(line) for line in whole.decode("utf-8", "replace").split("\n")]
        return [line for line in shown if line is not None]

    def shown(self, line: str) -> str | None:
        """The line to show for a line of output, or None. nnU-Net's lines of an epoch become one."""
        line = _TIMESTAMP.sub("", line).strip()
        if re.match(r"Epoch \d", line):
            self.epoch = []
        if _EPOCH.match(line):
            self.epoch.append(re.sub(r"np\.float\d+\((.*?)\)", r"\1", line))
        if line.startswith("Epoch time"):
            return ", ".join(self.epoch)
        return line.rstrip(":") if _SHOWN.match(line) else None


def last_lines(log: Path) -> str:
    """The last lines of the last command in a log, indented for an error."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line[:300] for line in text.rpartition(HEAD)[2].splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:] or ["(none)"])


@dataclass(eq=False)
class Child:
    """One of nnU-Net's commands as a child process.

    It leads a process group, so that its workers end with it. Its output is appended to a log, and we read the log: a pipe
    could fill up, or be kept open by a worker that outlives the child.

    what : it does, for messages
    prelude : Python code that runs first
    prefix : of each line on the terminal
    """

    script: str
    args: list[str]
    what: str
    folder: Path
    environment: dict[str, str]
    log: Path
    prelude: str = ""
    prefix: str = "      "

    def __post_init__(self):
        self.shown = shown_command(self.script, self.args)
        argv = nnunet_command(self.script, self.args, self.prelude)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            output.write(f"{HEAD}{self.shown}\n".encode())
            output.flush()
            self.progress = Progress(self.log)
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(argv, cwd=self.folder, env=self.environment, start_new_session=True, **streams)

    def show(self) -> bool:
        """Prints what is new. True once the child has ended and all is shown."""
        ended = self.process.poll() is not None
        for line in self.progress.new():
            print(f"{self.prefix}{line}", flush=True)
        return ended

    def failure(self) -> str | None:
        """What to tell about a child that has ended. None if it ended well."""
        status = self.process.returncode
        if status == 0:
            return None
        ending = f"exit status {status}" if status > 0 else f"signal {-status}; 9 is often a lack of memory"
        head = f"{self.what} failed ({ending}).\n  command: {self.shown}\n  log: {self.log}"
        return f"{head}\n{last_lines(self.log)}"

    def signal_group(self, number: int) -> None:
        """Sends a signal to the child and to its workers."""
        if os.name == "nt":  # has no signals
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True, check=False)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
            os.killpg(self.process.pid, number)

    def end(self, seconds: float = 0) -> None:
        """Waits for the child, then ends whatever is left of the group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.signal_group(KILL)
        self.process.wait()


def run_nnunet(script: str, args: list[str], what: str, **options) -> None:
    """Runs one of nnU-Net's commands to its end. The parameters are those of `Child`.

    UserError if the command fails: names it, its log and the log's last lines. Interrupted as in `run_children`.
    """
    (child,) = run_children([None], [None], lambda *_: Child(script, args, what, **options))
    if failure := child.failure():
        raise UserError(f"{failure}\n{ADVICE}")


def run_children(jobs: Sequence, places: Sequence, start: Callable) -> list[Child]:
    """Starts a child for each job, as soon as a place is free: `start(job, place)`. Returns the children as they ended.

    Interrupted if a stop signal comes: the children and their workers are ended first.
    """
    waiting, free, running, ended = list(jobs), list(places), {}, []
    with stop_signals() as received:
        try:
            while (waiting or running) and not received:
                while free and waiting:
                    place = free.pop(0)
                    running[start(waiting.pop(0), place)] = place
                time.sleep(POLL)
                for child in [child for child in running if child.show()]:
                    child.end()  # workers can outlive a crashed main process
                    free.append(running.pop(child))
                    ended.append(child)
                    if child.process.returncode != 0:
                        print(f"{child.prefix}failed; see {child.log}", flush=True)
        finally:
            if running:
                print("\n      stopping nnU-Net ...", file=sys.stderr, flush=True)
            for child in running:
                child.signal_group(signal.SIGTERM)
            end = time.monotonic() + GRACE
            for child in running:
                child.end(max(0, end - time.monotonic()))
    if received:
        raise Interrupted
    return ended


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the stop signals that come inside, instead of raising at any line."""
    received: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}  # nohup
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
