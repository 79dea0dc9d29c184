"""However a training ends, its worker processes end with it."""

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
_followed: tuple[int, int] | None = None  # process and thread whose forked children are to end with it


@contextmanager
def ending_cleanly(end_loaders: Callable[[], None]) -> Iterator[None]:
    """Ends the worker processes if what is done inside fails: `end_loaders` first, then whatever child was started inside.

    While inside, SIGTERM raises SystemExit(143), so that it counts as a failure; and on Linux each process that this thread
    forks is killed by the kernel when the thread's process dies, even by SIGKILL: nnU-Net's workers would wait for it for ever.
    A handler that somebody else has set is left alone; so are threads, where Python allows none, and DDP, whose parent process
    ends its ranks.
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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not leave half of them
        try:
            end_loaders()
        finally:
            for child in set(multiprocessing.active_children()) - others:  # loaders that were still being made
                child.kill()  # has nothing to put in order
                child.join(5)
        raise
    finally:
        _followed = before
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _follow_parent() -> None:
    """In each forked child. Its own children are none of our business."""
    global _followed
    followed, _followed = _followed, None
    if followed is None:
        return
    if signal.getsignal(signal.SIGTERM) is _end:  # a child that is stuck in C code would never see it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent, thread = followed
    if _libc is None or thread != threading.get_ident():  # the kernel's signal comes when the forking thread ends
        return
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_follow_parent)
