"""However a training ends, its worker processes end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of prctl(2)
_workers_follow: int | None = None  # id of the process whose forked children are to end with it
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """While inside: SIGTERM raises SystemExit(143), so that `finally` and `except` run; and on Linux each process forked here
    is killed by the kernel when this one dies, even by SIGKILL (nnU-Net's workers would wait for it for ever).

    A handler that somebody else has set is left alone; so are threads, where Python allows none.
    """
    global _workers_follow
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _end)
    before, _workers_follow = _workers_follow, os.getpid()
    try:
        yield
    finally:
        _workers_follow = before
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame) -> None:
    if os.getpid() != _workers_follow:  # a worker has inherited the handler: it has nothing to put in order
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def _follow_parent() -> None:
    """In each forked child."""
    if _workers_follow is None or _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _workers_follow:  # it died before the kernel knew
        os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_follow_parent)
