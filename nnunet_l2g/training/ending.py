"""Ends the worker processes of a training, however the training ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

PR_SET_PDEATHSIG = 1  # of prctl(2)
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_followed: tuple[int, int] | None = None  # process and thread whose forked children have to end with it


@contextmanager
def ending_cleanly(end_loaders: Callable[[], None]) -> Iterator[None]:
    """A context that ends worker processes if its body fails: it calls `end_loaders`, then kills children started inside.

    Inside, SIGTERM raises SystemExit(143), so that it counts as a failure. On Linux the kernel kills each process that this
    thread forks when the thread's process dies, even by SIGKILL; otherwise nnU-Net's workers would wait for it for ever.
    Nothing is done about signals if another handler for SIGTERM is set, in other threads, for which Python allows no handler,
    and under DDP, where the parent process ends its ranks.
    """
    global _followed
    main = threading.current_thread() is threading.main_thread()
    distributed = dist.is_available() and dist.is_initialized()
    handled = main and not distributed and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if handled:
        signal.signal(signal.SIGTERM, _end)
    others = set(multiprocessing.active_children())
    before, _followed = _followed, (os.getpid(), threading.get_ident())
    try:
        yield
    except BaseException:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt this
        try:
            end_loaders()
        finally:
            for child in set(multiprocessing.active_children()) - others:  # of loaders that were not yet complete
                child.kill()
                child.join(5)
        raise
    finally:
        _followed = before
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _follow_parent() -> None:
    """Runs in each forked child, but not in the children of such a child."""
    global _followed
    followed, _followed = _followed, None
    if followed is None:
        return
    if signal.getsignal(signal.SIGTERM) is _end:  # in C code, Python's handler would never run
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent, thread = followed
    if _libc is None or thread != threading.get_ident():  # the kernel sends its signal when the forking thread ends
        return
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call of prctl
        os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_follow_parent)
