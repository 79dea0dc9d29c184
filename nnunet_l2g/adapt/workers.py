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
    """Yields function(item) as each is ready, in any order. One process: in this one, without starting another.

    Function and items have to be picklable. What function raises is raised, and no further item is begun. UserError if a
    worker dies, as it does when memory runs out.
    """
    if processes <= 1 or len(items) <= 1:
        yield from map(function, tqdm(items, desc=title))
        return
    context = multiprocessing.get_context("spawn")  # nnU-Net's choice: no lock or thread of the parent is inherited
    pool = ProcessPoolExecutor(min(processes, len(items)), context, initializer=_end_with_parent)
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in tqdm(as_completed(futures), total=len(futures), desc=title):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{title}: a worker process was ended from outside, usually because memory ran out; "
            f"run the same command again with fewer processes than -np {processes}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A killed parent leaves no worker behind."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
