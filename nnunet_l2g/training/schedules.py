"""Trainer names with a schedule: `<Trainer>_<N>epochs` and `<Trainer>_<N>epochs_<M>iterations`, any N and M."""

from __future__ import annotations

import re

_PATTERN = re.compile(r"(?P<base>\w+?)_(?P<epochs>\d+)epochs?(?:_(?P<iterations>\d+)iterations?)?")


def make_scheduled_trainer(name: str, trainers: dict[str, type], module: str) -> type:
    """The class called ``name``: one of ``trainers`` with other lengths of training.

    Parameters
    ----------
    name : str
        `<Trainer>_<N>epochs` or `<Trainer>_<N>epochs_<M>iterations`.
    trainers : dict
        Classes by name that may be scheduled; they read the class attributes ``epochs`` and ``iterations``.
    module : str
        Where pickle will look the class up; that module's `__getattr__` has to call this function and keep the result.

    Raises
    ------
    AttributeError
        If the name is not a schedule of one of ours: nnU-Net then looks elsewhere.
    ValueError
        If it is ours, but N or M is 0 or is not written plainly (leading zeros, singular): two names would be one schedule.
    """
    match = _PATTERN.fullmatch(name)
    if match is None or match["base"] not in trainers:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    epochs, iterations = int(match["epochs"]), int(match["iterations"]) if match["iterations"] else None
    plain = f"{match['base']}_{epochs}epochs" + ("" if iterations is None else f"_{iterations}iterations")
    if epochs == 0 or iterations == 0:
        raise ValueError(f"trainer {name}: N epochs and M iterations have to be at least 1")
    if name != plain:
        raise ValueError(f"trainer {name}: write it as {plain} (results are kept by this name)")
    base = trainers[match["base"]]
    length = f"{epochs} epochs" + ("" if iterations is None else f" of {iterations} iterations")
    return type(
        name,
        (base,),
        {
            "epochs": epochs,
            "iterations": iterations,
            "__module__": module,
            "__doc__": f"{base.__name__}, {length}.",
        },
    )
