"""Runs child processes with their workers: log files, live progress, and an end to all of them on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nnunet_l2g.errors import UserError

POLL = 0.2  # s
GRACE = (10.0, 5.0)  # s to end by itself after the first SIGINT, then after SIGTERM
LAST_LINES = 15
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DEMO_ADVICE = "Finished steps are kept: mend the cause and run the same demo command again (without --overwrite)."


class Interrupted(Exception):
    """The user, or the system, asked to stop; no child is left running."""


def run_child(
    argv: list[str],
    *,
    what: str,
    shown: str,
    folder: Path,
    environment: dict,
    log: Path,
    progress: Callable[[str], str | None],
    advice: str = DEMO_ADVICE,
) -> None:
    """Runs one `Child` to its end.

    Parameters
    ----------
    advice : last line of the error, if the child fails; the others are those of `Child`

    Raises
    ------
    UserError : the child failed; names the step, the command, the log and its last lines
    Interrupted : a stop signal came; the whole group was ended first
    """
    with stop_signals() as received:
        child = Child(argv, what=what, shown=shown, folder=folder, environment=environment, log=log, progress=progress)
        try:
            while not child.show():
                if received:
                    end_children([child], received)
                    break
                time.sleep(POLL)
        finally:
            child.kill_group()  # workers that outlived a crashed main process
        if received:
            raise Interrupted(what)
    if failure := child.failure():
        raise UserError(f"{failure}\n{advice}")


class Child:
    """One child process, its output appended to a log.

    It leads a process group of its own, so that its workers can be ended with it. The output goes straight to the log,
    which is read from here: no pipe can fill up or keep us waiting for an orphan.

    Parameters
    ----------
    argv, folder, environment : of the child
    what, shown : the step and the command as the user would type it, for messages
    progress : turns a line of output into what the terminal shows, or None
    prefix : of each line that the terminal shows
    ignored : signals that neither the child nor its workers shall notice (POSIX)
    """

    def __init__(
        self,
        argv: list[str],
        *,
        what: str,
        shown: str,
        folder: Path,
        environment: dict,
        log: Path,
        progress: Callable[[str], str | None],
        prefix: str = "      ",
        ignored: tuple[int, ...] = (),
    ):
        self.what, self.shown, self.log, self.progress, self.prefix = what, shown, log, progress, prefix
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"### {shown}\n".encode())
            output.flush()
            self.lines = LogLines(log, output.tell())
            if ignored:  # before exec, which keeps it: no moment in which the signal could end the child
                options = {"preexec_fn": lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored]}
            else:
                options = {}
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                **_own_group(),
                **options,
            )

    def show(self) -> bool:
        """Prints what is new; True once the child has ended and all is shown."""
        ended = self.process.poll() is not None
        for line in self.lines.new(final=ended):
            if (text := self.progress(line)) is not None:
                print(f"{self.prefix}{text}", flush=True)
        return ended

    def failure(self) -> str | None:
        """What to tell about a child that has ended, None if it ended well."""
        status = self.process.returncode
        if status == 0:
            return None
        ending = f"exit status {status}"
        if status < 0:
            ending = f"ended by signal {-status}" + (", perhaps for lack of memory" if status == -9 else "")
        return "\n".join(
            [
                f"{self.what} failed ({ending}).",
                f"  command: {self.shown}",
                f"  log: {self.log}",
                "  its last lines:",
                *(f"    {line}" for line in self.lines.last()),
            ]
        )

    def signal_group(self, number: int) -> None:
        """Sends a signal to the child and its workers (POSIX)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
            os.killpg(self.process.pid, number)

    def kill_group(self) -> None:
        """Ends whatever is left of the group at once."""
        if os.name == "nt":
            pid = str(self.process.pid)
            subprocess.run(["taskkill", "/F", "/T", "/PID", pid], capture_output=True, check=False)
        else:
            self.signal_group(signal.SIGKILL)
        self.process.wait()


class LogLines:
    """Lines that were appended to a file since the last call; a carriage return ends a line too (progress bars)."""

    def __init__(self, path: Path, begin: int = 0):
        self.path, self.begin, self.position, self.rest = path, begin, begin, b""

    def new(self, final: bool = False) -> list[str]:
        """Whole lines; with `final` the unfinished one too. None while there is no such file."""
        *lines, self.rest = (self.rest + self._read(self.position)).replace(b"\r", b"\n").split(b"\n")
        if final:
            lines, self.rest = [*lines, self.rest], b""
        return [line.decode("utf-8", "replace") for line in lines]

    def last(self) -> list[str]:
        """The last ones since `begin` that are not empty."""
        text = self._read(self.begin).decode("utf-8", "replace").replace("\r", "\n")
        return [line[:300] for line in text.split("\n") if line.strip()][-LAST_LINES:] or ["(none)"]

    def _read(self, position: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(position)
                content = file.read()
                self.position = file.tell()
                return content
        except FileNotFoundError:
            return b""


def end_children(children: list[Child], received: list[int]) -> None:
    """SIGINT, then SIGTERM, then SIGKILL to all of them and their workers; a second stop signal skips the waiting."""
    print("\n      stopping nnU-Net ... (again to force)", file=sys.stderr, flush=True)
    if os.name != "nt":
        for number, grace in zip((signal.SIGINT, signal.SIGTERM), GRACE, strict=True):
            left = [child for child in children if child.process.poll() is None]
            for child in left:
                child.signal_group(number)
            end = time.monotonic() + grace
            while time.monotonic() < end and any(child.process.poll() is None for child in left) and len(received) < 2:
                time.sleep(POLL / 4)
            if len(received) > 1:
                break
    for child in children:
        child.kill_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects stop signals instead of raising in the middle of anything; the list grows with each one."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    previous = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}  # nohup stays
    for number in previous:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _own_group() -> dict:
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}
