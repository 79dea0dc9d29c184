"""Runs one child process with its workers: log file, live progress, and an end to all of them on Ctrl-C."""

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


class Interrupted(Exception):
    """The user, or the system, asked to stop; no child is left running."""


def run_child(
    argv: list[str], *, what: str, shown: str, folder: Path, environment: dict, log: Path,
    progress: Callable[[str], str | None],
) -> None:
    """Runs `argv` to its end in `folder`, its output appended to `log`.

    The child leads a process group of its own, so that its workers can be ended with it. The output goes straight to
    the log, which is read from here: no pipe can fill up or keep us waiting for an orphan.

    Parameters
    ----------
    argv, environment : of the child
    what, shown : the step and the command as the user would type it, for messages
    progress : turns a line of output into what the terminal shows, or None

    Raises
    ------
    UserError : the child failed; names the step, the command, the log and its last lines
    Interrupted : a stop signal came; the whole group was ended first
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _stop_signals() as received:
        output.write(f"### {shown}\n".encode())
        output.flush()
        begin = output.tell()
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment,
            **_own_group(),
        )
        with log.open("rb") as reader:
            reader.seek(begin)
            lines = _LineReader(reader)
            while True:
                ended = child.poll() is not None
                for line in lines.new(final=ended):
                    if (text := progress(line)) is not None:
                        print(f"      {text}", flush=True)
                if ended:
                    break
                if received:
                    _end_group(child, received)
                    raise Interrupted(what)
                time.sleep(POLL)
        _kill_group(child)  # workers that outlived a crashed main process
        if received:
            raise Interrupted(what)
    if child.returncode != 0:
        raise UserError(_failure(what, shown, child.returncode, log, begin))


class _LineReader:
    """Lines that were appended to a file since the last call; a carriage return ends a line too (progress bars)."""

    def __init__(self, file):
        self.file, self.rest = file, b""

    def new(self, final: bool) -> list[str]:
        *lines, self.rest = (self.rest + self.file.read()).replace(b"\r", b"\n").split(b"\n")
        if final:
            lines, self.rest = [*lines, self.rest], b""
        return [line.decode("utf-8", "replace") for line in lines]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
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


def _end_group(child: subprocess.Popen, received: list[int]) -> None:
    """SIGINT, then SIGTERM, then SIGKILL to the child and its workers; a second stop signal skips the waiting."""
    print("\n      stopping nnU-Net ... (again to force)", file=sys.stderr, flush=True)
    if os.name != "nt":
        for number, grace in zip((signal.SIGINT, signal.SIGTERM), GRACE, strict=True):
            _signal_group(child, number)
            end = time.monotonic() + grace
            while time.monotonic() < end and child.poll() is None and len(received) < 2:
                time.sleep(POLL / 4)
            if child.poll() is not None or len(received) > 1:
                break
    _kill_group(child)
    child.wait()


def _signal_group(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
        os.killpg(child.pid, number)


def _kill_group(child: subprocess.Popen) -> None:
    """Ends whatever is left of the group at once, and waits a moment until it is gone."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
        return
    _signal_group(child, signal.SIGKILL)


def _failure(what: str, shown: str, status: int, log: Path, begin: int) -> str:
    ending = f"exit status {status}"
    if status < 0:
        ending = f"ended by signal {-status}" + (", perhaps for lack of memory" if status == -9 else "")
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", "replace").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip()][-LAST_LINES:]
    return "\n".join([
        f"{what} failed ({ending}).", f"  command: {shown}", f"  log: {log}", "  its last lines:",
        *(f"    {line[:300]}" for line in lines or ["(none)"]),
        "Finished steps are kept: mend the cause and run the same demo command again (without --overwrite).",
    ])
