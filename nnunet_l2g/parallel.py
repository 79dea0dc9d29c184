"""Runs one function on many items in parallel processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from nnunet_l2g.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_parallel(function: Callable[[Item], Result], items: Sequence[Item], processes: int, title: str) -> Iterator[Result]:
    """Yields function(item) for each item, in any order. With one process it works in this process.

    Function and items have to be picklable. An exception of the function is raised here, and no further item is started.
    UserError if a worker process is killed.
    """
    if processes <= 1 or len(items) <= 1:
        yield from map(function, tqdm(items, desc=title))
        return
    context = multiprocessing.get_context("spawn")  # a forked process may hang on a lock that a thread of its parent holds
    pool = ProcessPoolExecutor(min(processes, len(items)), context, initializer=_end_with_parent)
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in tqdm(as_completed(futures), total=len(futures), desc=title):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{title}: a worker process was killed, usually because memory ran out; run the command again with fewer processes "
            f"than -np {processes}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed. Without this, it would wait for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
