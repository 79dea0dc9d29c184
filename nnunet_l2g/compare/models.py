"""The models to compare: which ones the options name, where nnU-Net keeps them, and what their checkpoints say."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.compare.curves import Curves
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import load_safely
from nnunet_l2g.training.names import has_run, run_name


@dataclass(frozen=True)
class Model:
    """One run of one trainer with its plans and configuration.

    name : in tables and plots: what tells the method apart, and the run if it is not the first
    folder : nnU-Net's DatasetXXX/Trainer__Plans__Configuration
    run : 1, 2, ...
    """

    name: str
    trainer: str
    plans: str
    configuration: str
    folder: Path
    run: int = 1

    def fold(self, fold: str) -> Path:
        return self.folder / f"fold_{fold}"


def nnunet_folder(kind: str) -> Path:
    """nnUNet_raw, nnUNet_preprocessed or nnUNet_results. UserError if the variable is not set or names no folder."""
    name = f"nnUNet_{kind}"
    value = os.environ.get(name)
    if not value:
        raise UserError(f"the variable {name} is not set; set it to nnU-Net's folder (`export {name}=...`)")
    if not Path(value).is_dir():
        raise UserError(f"{name}={value}: no such folder; set it to nnU-Net's folder")
    return Path(value)


def dataset_name(dataset: str) -> str:
    """The folder's name for `27`, `027` or `Dataset027_Name`, looked up in all of nnU-Net's folders.

    UserError if there is no such dataset, or more than one.
    """
    folders = [Path(value) for kind in ("raw", "preprocessed", "results") if (value := os.environ.get(f"nnUNet_{kind}"))]
    names = sorted({path.name for folder in folders for path in folder.glob("Dataset*_*") if path.is_dir()})
    found = [name for name in names if name == dataset]
    if re.fullmatch("[0-9]{1,9}", dataset):
        found = [name for name in names if name.startswith(f"Dataset{int(dataset):03d}_")]
    if len(found) != 1:
        why = "several datasets have this number; name one in full" if found else "no such dataset"
        raise UserError(f"-d {dataset}: {why}; nnU-Net's folders hold {', '.join(found or names) or 'none'}")
    return found[0]


def choose_models(
    dataset: str, trainers: list[str], plans: list[str], configurations: list[str], runs: Sequence[int] = (1,)
) -> list[list[Model]]:
    """The models of each method, run 1 to R. There is a method for each position of the lists; a list of one serves all.

    UserError if the lengths do not fit, if fewer than two methods are named, if one is named twice, or for runs of a run.
    """
    options = {"-tr": trainers, "-p": plans, "-c": configurations, "--runs": runs}
    count = max(len(trainers), len(plans), len(configurations))
    for option, values in options.items():
        if len(values) not in (1, count):
            shown = " ".join(map(str, values))
            raise UserError(f"{option} {shown}: {count} methods are compared; give one value for all, or one for each")
    if count < 2:
        raise UserError(f"-tr {trainers[0]}: nothing to compare it with; name two trainers or more, the baseline first")
    columns = [list(values) * count if len(values) == 1 else values for values in options.values()]
    varies = [len(set(column)) > 1 for column in columns[:3]]
    folder = nnunet_folder("results") / dataset
    methods, seen = [], []
    for trainer, *others, number in zip(*columns, strict=True):
        names = [trainer, *others]
        if names in seen:
            raise UserError(f"{' '.join(names)} is named twice; name each model once")
        if number > 1 and has_run(trainer):
            raise UserError(f"-tr {trainer} --runs {number}: the name says a run; name the trainer without it")
        seen.append(names)
        shown = " ".join(name for name, differs in zip(names, varies, strict=True) if differs)
        models = []
        for run in range(1, number + 1):
            of_run = [run_name(trainer, run), *others]
            models.append(Model(shown if run == 1 else f"{shown} run {run}", *of_run, folder / "__".join(of_run), run))
        methods.append(models)
    return methods


@dataclass(frozen=True)
class Checkpoint:
    """What a finished checkpoint says.

    epochs : finished epochs
    parameters : floating-point numbers in the network's state, shared tensors once (buffers included)
    curves : the log it carries
    mirroring : axes that prediction mirrors; None for none
    """

    epochs: int
    parameters: int
    curves: Curves
    mirroring: tuple[int, ...] | None = None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """None if `load_safely` cannot read the file: it is damaged, or its trainer stores objects of other classes."""
    try:
        content = load_safely(path)
        mirroring = content.get("inference_allowed_mirroring_axes")
        return Checkpoint(
            int(content["current_epoch"]),
            _count_parameters(content["network_weights"]),
            Curves.from_logging(content["logging"]),
            None if mirroring is None else tuple(int(axis) for axis in mirroring),
        )
    except Exception:  # each kind of damage raises its own; the caller reads the text log instead
        return None


def _count_parameters(weights: dict) -> int:
    """nnU-Net's decoder holds its encoder again, so tensors are told apart by where they lie in memory."""
    unique = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)): tensor.numel()
        for tensor in weights.values()
        if tensor.is_floating_point()
    }
    return sum(unique.values())
