"""Trainer names with lengths and a run: `<Trainer>[_<N>epochs[_<M>iterations]][_run<K>]`, made on request.

Results are kept by this name, so that lengths and runs never mix. Run 1 is the name without `_run`. A run has no seed:
nnU-Net's training is not seeded either, and two runs of one trainer differ as two of nnU-Net's trainings do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

_NAME = re.compile(r"(?P<base>\w+?)(?:_(?P<epochs>\d+)epochs?(?:_(?P<iterations>\d+)iterations?)?)?(?:_run(?P<run>\d+))?")
_searched: set[str] = set()  # names that nnU-Net's look-up is asked for by us: it asks us again, and we are to decline


def run_name(trainer: str, run: int) -> str:
    """The trainer that trains run 1, 2, ... of ``trainer``."""
    return trainer if run == 1 else f"{trainer}_run{run}"


def has_run(trainer: str) -> bool:
    """Whether the name has a run: `nnUNetTrainer_5epochs_run2`."""
    match = _NAME.fullmatch(trainer)
    return match is not None and match["run"] is not None


def make_trainer(name: str, ours: Mapping[str, type], module: str) -> type:
    """The class called ``name``: a trainer with other lengths of training, or one more run of it, and nothing else changed.

    The trainer is one of ``ours``, or any other that nnU-Net's own look-up finds: nnU-Net's, its variants, those of other
    people in `nnUNet_extTrainer`. Only names of this form start that look-up.

    Parameters
    ----------
    name : str
        `<Trainer>[_<N>epochs[_<M>iterations]][_run<K>]`, with lengths or a run.
    ours : mapping
        Classes by name that read the class attributes ``epochs`` and ``iterations``.
    module : str
        Where pickle will look the class up; that module's `__getattr__` has to call this function and keep the result.

    Raises
    ------
    AttributeError
        If the name is not of this form, nobody has such a trainer, or somebody else has a class of exactly this name.
    ValueError
        If there is such a trainer, but N or M is 0, K is below 2, or a number is not written plainly (leading zeros,
        singular): two names would mean the same training.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["epochs"] is None and match["run"] is None) or _has_suffix(match["base"]):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    base = ours.get(match["base"]) or _theirs(name, match)
    if base is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}: no trainer is called {match['base']}")
    epochs, iterations, run = (match[key] and int(match[key]) for key in ("epochs", "iterations", "run"))
    _check_plain(name, match["base"], epochs, iterations, run)
    attributes = {"__module__": module, "__doc__": f"{base.__name__} as {name}: other lengths, or one more run."}
    if match["base"] in ours:
        attributes |= {"epochs": epochs, "iterations": iterations}
    elif run is None:  # a run's base has its lengths
        attributes["__init__"] = _init_with_lengths(base, epochs, iterations)
    return type(name, (base,), attributes)


def set_lengths(trainer, epochs: int | None, iterations: int | None) -> None:
    """Sets a trainer's lengths after nnU-Net's `__init__`; None leaves nnU-Net's. Validation iterations stay in proportion.

    nnU-Net saves `checkpoint_latest.pth` every 50 epochs; here it is at least every tenth of the training, so that `--c` loses
    little of a short one.
    """
    if epochs is not None:
        trainer.num_epochs = epochs
    if iterations is not None:
        proportion = trainer.num_val_iterations_per_epoch / trainer.num_iterations_per_epoch
        trainer.num_iterations_per_epoch = iterations
        trainer.num_val_iterations_per_epoch = max(1, round(iterations * proportion))
    trainer.save_every = max(1, min(trainer.save_every, trainer.num_epochs // 10))


def _init_with_lengths(base: type, epochs: int, iterations: int | None):
    @functools.wraps(base.__init__)  # nnU-Net reads its signature, to note what a trainer was made with
    def __init__(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        set_lengths(self, epochs, iterations)

    return __init__


def _has_suffix(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match["base"] != name


def _theirs(name: str, match: re.Match) -> type | None:
    """The trainer of others that ``name`` is made of: for a run, the name without it. None if there is none.

    None also if ``name`` itself is somebody's class: nnU-Net asks folders in turn, and theirs may come after ours.
    """
    from nnunet_l2g.lookup import find_trainer

    if name in _searched:
        return None
    _searched.add(name)
    try:
        if find_trainer(name) is not None:
            return None
    finally:
        _searched.remove(name)
    return find_trainer(match["base"] if match["run"] is None else name.rpartition("_run")[0])


def _check_plain(name: str, base: str, epochs: int | None, iterations: int | None, run: int | None) -> None:
    if epochs == 0 or iterations == 0:
        raise ValueError(f"trainer {name}: N epochs and M iterations have to be at least 1")
    plain = base + (f"_{epochs}epochs" if epochs else "") + (f"_{iterations}iterations" if iterations else "")
    if run is not None and run < 2:
        raise ValueError(f"trainer {name}: runs are counted from 2 on; run 1 is {plain}")
    plain = run_name(plain, run or 1)
    if name != plain:
        raise ValueError(f"trainer {name}: write it as {plain} (results are kept by this name)")
