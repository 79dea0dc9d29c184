"""A model folder of nnU-Net, opened without unpickling foreign code: what any trainer's network needs to predict."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import Labels, read_dataset_json, read_labels
from nnunet_l2g.files import DAMAGE, load_safely, read_object
from nnunet_l2g.lookup import explain, find_trainer, quiet
from nnunet_l2g.nnunet_files import check_network_classes, check_plans

NEEDED = ("network_weights", "trainer_name", "init_args")


@dataclass(frozen=True)
class Model:
    """folder, fold, file : nnU-Net's <trainer>__<plans>__<configuration>, `0` or `all`, the checkpoint
    trainer, trainer_class : the name in the checkpoint and what nnU-Net finds under it
    plans, configuration, dataset, manager : nnU-Net's managers, dataset.json's content, nnU-Net's label manager
    labels : what is evaluated
    network : nn.Module with its weights, in eval mode, without deep supervision
    channels : of the input
    checkpoint : its content without the network's weights
    """

    folder: Path
    fold: str
    file: Path
    trainer: str
    trainer_class: type
    plans: object
    configuration: object
    configuration_name: str
    dataset: dict
    manager: object
    labels: Labels
    network: object
    channels: int
    checkpoint: dict

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(self.configuration.patch_size)

    @property
    def mirroring(self) -> tuple[int, ...] | None:
        axes = self.checkpoint.get("inference_allowed_mirroring_axes")
        return None if axes is None else tuple(int(axis) for axis in axes)

    @property
    def method(self) -> str | None:
        """Name of the network of ours, as its weights say; None for all others."""
        settings = getattr(self.network, "settings", None)
        if getattr(self.network, "plain_weights_only", None) is None or settings is None:
            return None
        return json.loads(bytes(settings.tolist()))["network"]

    @property
    def reader(self):
        """nnU-Net's reader for the images the model was trained on."""
        with quiet():
            return self.plans.image_reader_writer_class()


def checkpoint_file(folder: Path, fold: str, name: str) -> Path:
    """fold_<fold>/<name> in a model folder. UserError that says what is there instead."""
    if not folder.is_dir():
        raise UserError(f"-m {folder}: no such folder; expected nnU-Net's <trainer>__<plans>__<configuration>")
    for needed in ("dataset.json", "plans.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"-m {folder}: {folder / needed} is missing; expected nnU-Net's <trainer>__<plans>__<configuration>, the "
                "folder that holds dataset.json, plans.json and fold_<N>"
            )
    path = folder / f"fold_{fold}"
    if not path.is_dir():
        folds = sorted(other.name.removeprefix("fold_") for other in folder.glob("fold_*") if other.is_dir())
        raise UserError(f"-f {fold}: {path} is missing; {folder} has {_named('fold', folds)}")
    if not (path / name).is_file():
        others = sorted(other.name for other in path.glob("checkpoint_*.pth"))
        advice = "train it to its end, or name one with -chk" if others else "train this fold first"
        raise UserError(f"-f {fold}: {path / name} is missing; {path} has {_named('checkpoint', others)}; {advice}")
    return path / name


def _named(kind: str, names: list[str]) -> str:
    return f"{kind}{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else f"no {kind}"


def load_model(folder: Path, fold: str, name: str, plans_of: Callable[[dict, str], dict] | None = None) -> Model:
    """Opens fold `fold` of a model folder.

    Parameters
    ----------
    name : of the checkpoint's file
    plans_of : plans and configuration's name to the plans to use

    Raises
    ------
    UserError : names the file that is missing, damaged, foreign, or does not fit the trainer
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    file = checkpoint_file(folder, fold, name)
    checkpoint = _read_checkpoint(file)
    trainer = _find_trainer(checkpoint["trainer_name"], file)
    configuration_name = checkpoint["init_args"]["configuration"]
    dataset = read_dataset_json(folder / "dataset.json")
    labels = read_labels(folder / "dataset.json")
    plans, configuration = _read_plans(folder / "plans.json", configuration_name, file, plans_of)
    if configuration.previous_stage_name is not None:
        raise UserError(
            f"{folder}: {configuration_name} is the second stage of a cascade, whose input holds a prediction of "
            f"{configuration.previous_stage_name}; inspect the first stage, or a model without cascade"
        )
    try:
        manager = plans.get_label_manager(dataset)
        channels = determine_num_input_channels(plans, configuration, dataset)
    except Exception as error:  # nnU-Net's managers believe both files
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: dataset.json and plans.json do not fit together ({cause}); copy both again") from error
    network = build_network(trainer, plans, configuration, channels, manager.num_segmentation_heads, file)
    _load_weights(network, checkpoint.pop("network_weights"), file)
    return Model(
        folder, fold, file, checkpoint["trainer_name"], trainer, plans, configuration, configuration_name, dataset, manager,
        labels, network.eval(), channels, checkpoint,
    )  # fmt: skip


def _read_checkpoint(file: Path) -> dict:
    try:
        content = load_safely(file)
    except Exception as error:  # zip, pickle, end of file: every kind of damage has its own
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{file}: cannot be read as a checkpoint of nnU-Net ({cause[:200]}); it is damaged, or holds more than tensors and "
            "plain values, which is never unpickled here. Copy it again, or name another with -chk"
        ) from error
    missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
    if not missing and not isinstance(content["trainer_name"], str):
        missing = ["trainer_name"]
    settings = {} if missing else content["init_args"]
    if not isinstance(settings, dict) or not isinstance(settings.get("configuration"), str):
        lacks = ", ".join(missing) or "init_args.configuration"
        raise UserError(f"{file}: no checkpoint of an nnU-Net trainer, it has no {lacks}; expected what nnUNetv2_train writes")
    axes, logging = content.get("inference_allowed_mirroring_axes"), content.get("logging", {})
    if axes is not None and not (isinstance(axes, (list, tuple)) and all(axis in (0, 1, 2) for axis in axes)):
        raise UserError(f"{file}: inference_allowed_mirroring_axes is {str(axes)[:80]}; expected some of the axes 0, 1 and 2")
    if not isinstance(logging, dict) or not all(map(_is_curve, logging.items())):
        raise UserError(f"{file}: its logging is not nnU-Net's, a list of numbers for each name; copy the file again")
    return content


def _is_curve(entry: tuple) -> bool:
    """Whether an entry of the log is one: a name, and a list (of numbers, if it is our gap between domains)."""
    name, values = entry
    if not isinstance(name, str) or not isinstance(values, list):
        return False
    return not name.startswith("gap_") or all(isinstance(value, (int, float, np.number)) for value in values)


def _find_trainer(name: str, file: Path) -> type:
    try:
        trainer = find_trainer(name)
    except Exception as error:  # any module of nnU-Net or of the user's can end the look-up
        raise UserError("\n  ".join([f"{file}: nnU-Net cannot look for its trainer {name}", *explain(error)])) from error
    if trainer is None:
        raise UserError(
            f"{file}: made by the trainer {name}, which nnU-Net does not find here; install what provides it, or set "
            "nnUNet_extTrainer to its folder (`nnunet_l2g doctor` shows what is found)"
        )
    return trainer


def _read_plans(path: Path, configuration_name: str, file: Path, plans_of):
    try:
        content = read_object(path)
        if configuration_name not in content["configurations"]:
            has = ", ".join(content["configurations"])
            raise UserError(f"{file}: of configuration {configuration_name}, but {path} has {has}; they are of two models")
        check_plans(content, path)
        if plans_of is not None:
            content = plans_of(content, configuration_name)
    except DAMAGE as error:
        raise UserError(f"{path}: not nnU-Net's plans ({type(error).__name__}: {error}); copy the file again") from error
    plans = check_plans(content, path)
    configuration = plans.get_configuration(configuration_name)
    check_network_classes(configuration, path)
    return plans, configuration


def build_network(trainer: type, plans, configuration, channels: int, heads: int, file: Path):
    """The network as nnU-Net builds it to predict; trainers of before nnU-Net 2.8 take other arguments."""
    build = trainer.build_network_architecture
    try:
        if "plans_manager" in inspect.signature(build).parameters:
            return build(plans, configuration, channels, heads, enable_deep_supervision=False)
        return build(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            heads,
            enable_deep_supervision=False,
        )
    except Exception as error:  # a trainer's own code
        raise UserError(f"{file}: {trainer.__name__} cannot build its network ({type(error).__name__}: {error})") from error


def _load_weights(network, weights, file: Path) -> None:
    try:
        network.load_state_dict(weights)
    except Exception as error:  # shapes and names, or no state dict at all
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " ".join(lines[:3])[:400] or type(error).__name__
        raise UserError(
            f"{file}: its weights do not fit the network of its trainer and plans ({shown}); take plans.json and checkpoint "
            "from the same training"
        ) from error
