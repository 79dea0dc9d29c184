"""Pretraining stages: what a trainer trains before the segmenter, inside the same nnUNetv2_train, with its own checkpoint."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nnunet_l2g.errors import UserError
from nnunet_l2g.training.checkpoints import check_finite, get_random_state, serialised, set_random_state, write_atomically
from nnunet_l2g.training.distributed import mean_over_ranks, world_size
from nnunet_l2g.training.figure import draw_diagnostics, warn_if_not_written


class Stage(ABC):
    """A pretraining stage: a name, a length, a step, and what its checkpoint holds.

    Parameters
    ----------
    epochs, iterations, validation_iterations : int
        Length of the stage, and steps in each epoch.
    settings : mapping
        JSON values. A checkpoint with other settings belongs to another training and is refused.

    Attributes
    ----------
    name : str
        Name of the stage. Its files are stage_<name>.pth and progress_<name>.png.
    module : nn.Module
        What is trained: a part of the trainer's network, or a module beside it.
    keys : tuple of str
        Names of the numbers that a training and a validation step return, for log and figure.
    nothing_to_learn : str
        Why all batches of an epoch may have had nothing to learn from, and what to do.
    """

    name: str
    module: nn.Module
    keys: tuple[str, ...]
    nothing_to_learn = "look at the data."

    def __init__(self, epochs: int, iterations: int, validation_iterations: int, settings: Mapping):
        self.epochs, self.iterations, self.validation_iterations = epochs, iterations, validation_iterations
        self.settings = {**settings, "epochs": epochs, "iterations": iterations}

    @abstractmethod
    def begin(self) -> None:
        """Called before the first step and before a stage is resumed: thaws `module` and makes the optimisers."""

    @abstractmethod
    def train_step(self, batch: dict) -> dict[str, float]:
        """One optimiser step on a batch of nnU-Net's training loader. Returns this process's numbers by key, or {} if the
        batch had nothing to learn from."""

    @abstractmethod
    def validation_step(self, batch: dict) -> dict[str, float]:
        """The same numbers for a batch of the validation loader, without gradient, or {}."""

    @abstractmethod
    def end(self) -> None:
        """Called after the last epoch, and when a finished stage was loaded: freezes `module`."""

    def end_epoch(self, epoch: int, values: Mapping[str, float], log: Callable[[str], None]) -> None:  # noqa: B027
        """Called on rank 0 after each epoch (0, 1, ...) with its mean numbers, `train_<key>` and `validation_<key>`."""

    def state_dict(self) -> dict:
        """Optimisers and the like, as tensors and plain Python. `module` is saved beside it."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027
        """The inverse, after `begin`."""


def run_stage(
    stage: Stage,
    network: nn.Module,
    training: Callable[[], dict],
    validation: Callable[[], dict],
    folder: str,
    log: Callable[[str], None],
    owner: str = "",
    resume: bool = False,
    save: bool = True,
    save_every: int = 1,
    rank: int = 0,
    extra_state: Callable[[], dict] = dict,
    load_extra_state: Callable[[dict], None] = lambda state: None,
) -> None:
    """Runs a stage to its end, or from where its checkpoint stopped.

    Parameters
    ----------
    network : nn.Module
        The whole network. It is saved too, because nnU-Net does not accept -pretrained_weights again with --c.
    training, validation
        Return the next batch.
    folder, log
        Folder of checkpoint and figure; log is called with one line an epoch.
    owner : str
        Name of the trainer.
    resume : bool
        Whether a checkpoint in `folder` is continued (--c). If another trainer wrote it with the same settings, only the
        stage's module is taken from it, so that ablations can share a stage.
    save, save_every, rank
        Whether checkpoints are written, after how many epochs, and the rank of this process; rank 0 writes.
    extra_state, load_extra_state
        Of the trainer: what it has drawn at random, as tensors and plain Python; and the inverse.

    Raises
    ------
    UserError
        If the checkpoint cannot be read or has other settings, or an epoch had nothing to learn from.
    FloatingPointError
        If a loss or a weight is not finite. The checkpoint is from before.
    """
    file = Path(folder, f"stage_{stage.name}.pth")
    history: dict[str, list[float]] = {key: [] for part in ("train", "validation") for key in _named(stage.keys, part)}
    start, device = 0, next(stage.module.parameters()).device
    stage.begin()
    if resume and file.is_file():
        checkpoint = load_stage(file, stage)
        start, history = checkpoint["epoch"], checkpoint["history"]
        if checkpoint["owner"] == owner:
            network.load_state_dict(checkpoint["network"])
            load_extra_state(checkpoint["extra"])
            if world_size() == 1:  # it is the state of rank 0, and the others must not draw the same
                set_random_state(checkpoint["random_state"], device)
        stage.module.load_state_dict(checkpoint["module"])
        if start < stage.epochs:
            stage.load_state_dict(checkpoint["stage"])
        log(f"stage {stage.name}: {start} of {stage.epochs} epochs are in {file}")
    elif resume:
        log(f"stage {stage.name}: no checkpoint {file}, it starts from the beginning")
    if start == 0 and save and rank == 0:  # so that a kill from now on does not lose -pretrained_weights
        _save(file, stage, network, owner, 0, history, extra_state())
    for epoch in range(start, stage.epochs):
        began = time.time()
        values = _epoch(stage, epoch, training, validation, log, rank)
        for key, value in values.items():
            history[key].append(value)
        line = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        log(f"stage {stage.name}, epoch {epoch + 1} of {stage.epochs}: {line} ({time.time() - began:.1f} s)")
        if rank:
            continue
        stage.end_epoch(epoch, values, log)
        if save and ((epoch + 1) % save_every == 0 or epoch + 1 == stage.epochs):
            _save(file, stage, network, owner, epoch + 1, history, extra_state())
        with warn_if_not_written(log):
            draw_diagnostics(history, list(history), f"{folder}/progress_{stage.name}.png")
    stage.end()


def _save(file: Path, stage: Stage, network: nn.Module, owner: str, epoch: int, history: dict, extra: dict) -> None:
    contents = {
        "format": 2,
        "name": stage.name,
        "settings": stage.settings,
        "owner": owner,
        "epoch": epoch,
        "history": history,
        "module": stage.module.state_dict(),
        "network": network.state_dict(),
        "stage": stage.state_dict(),
        "extra": extra,
        "random_state": get_random_state(next(stage.module.parameters()).device),
    }
    check_finite(contents)
    write_atomically(serialised(contents), str(file))


def _named(keys: tuple[str, ...], part: str) -> list[str]:
    return [f"{part}_{key}" for key in keys]


def _epoch(stage: Stage, epoch: int, training, validation, log, rank: int) -> dict[str, float]:
    """Means over an epoch's steps and over processes."""
    stage.module.train()
    bar = tqdm(range(stage.iterations), f"{stage.name} {epoch + 1}/{stage.epochs}", leave=False, disable=rank > 0 or None)
    steps = [_finite_step(stage, epoch, training(), log) for _ in bar]
    values = _means(stage, epoch, "train", steps, log)
    stage.module.eval()
    with torch.no_grad():
        steps = [stage.validation_step(validation()) for _ in range(stage.validation_iterations)]
    return values | _means(stage, epoch, "validation", steps, log)


def _finite_step(stage: Stage, epoch: int, batch: dict, log) -> dict[str, float]:
    step = stage.train_step(batch)
    if not all(np.isfinite(value) for value in step.values()):
        _stop(f"stage {stage.name}: {step} in epoch {epoch + 1} (cases {cases_of(batch)})", log)
    return step


def _stop(what: str, log) -> None:
    advice = "Look for NaN or Inf in the images, and continue with --c."
    message = f"{what}. Training stops; the stage's checkpoint is from before. {advice}"
    log(message)
    raise FloatingPointError(message)


def cases_of(batch: dict) -> list[str]:
    """Names of the cases in a batch of nnU-Net's loader, including those of an unlabelled target."""
    return [*batch.get("keys", []), *batch.get("unlabelled_keys", [])]


def _means(stage: Stage, epoch: int, part: str, steps: list[dict[str, float]], log) -> dict[str, float]:
    """Means over the steps of all processes that returned numbers; NaN if no step did.

    All processes get the same means, so all of them raise, or none.
    """
    steps = [step for step in steps if step]
    sums = [float(np.sum([step[key] for step in steps])) for key in stage.keys]
    *sums, count = mean_over_ranks([*sums, float(len(steps))])
    if part == "train" and count == 0:
        raise UserError(
            f"stage {stage.name}: no batch of epoch {epoch + 1} had anything to learn from: {stage.nothing_to_learn}"
        )
    if not np.isfinite(sums).all():
        _stop(f"stage {stage.name}: {part} numbers {sums} of epoch {epoch + 1} are not finite", log)
    return {name: total / count if count else float("nan") for name, total in zip(_named(stage.keys, part), sums, strict=True)}


def load_stage(file: Path, stage: Stage) -> dict:
    """The checkpoint of a stage. UserError if it is damaged or of another training. No code in the file is run."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(
            f"{file} cannot be read: damaged, or not a checkpoint of a stage ({type(error).__name__}). Remove it and continue "
            f"with --c: the stage {stage.name} is then trained again."
        ) from error
    wanted = {"owner": str, "epoch": int}
    wanted |= dict.fromkeys(("settings", "history", "module", "network", "stage", "extra", "random_state"), dict)
    complete = isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(key), kind) for key, kind in wanted.items())
    if not complete or checkpoint.get("name") != stage.name:
        raise UserError(f"{file} is not a checkpoint of the stage {stage.name}. Remove it and continue with --c.")
    theirs = checkpoint["settings"]
    differences = [
        f"{key}: there {theirs.get(key, 'none')!r}, here {stage.settings.get(key, 'none')!r}"
        for key in sorted(theirs.keys() | stage.settings.keys(), key=str)
        if theirs.get(key) != stage.settings.get(key)
    ]
    if differences:
        raise UserError(
            f"{file} belongs to another training ({'; '.join(differences)}). Remove it and continue with --c, or start "
            "without --c."
        )
    return checkpoint
