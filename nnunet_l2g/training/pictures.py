"""Pictures that a training draws for its user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def not_worth_a_training(log: Callable[[str], None]) -> Iterator[None]:
    """While inside, a picture that the disk does not take is a warning in the log: a training is worth more."""
    try:
        yield
    except OSError as error:
        log(f"WARNING: a picture was not written: {error}. Training goes on.")
