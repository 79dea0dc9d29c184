"""A trained model: nnU-Net's folder of it, opened without unpickling code of others."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunet_l2g import trainers
from nnunet_l2g.architectures.plan_network import PlanNetwork, decode_settings
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import Labels, read_dataset_json, read_labels
from nnunet_l2g.files import DAMAGE, check_plain_name, load_safely, read_object
from nnunet_l2g.lookup import explain, find_trainer, quiet
from nnunet_l2g.nnunet_files import check_network_classes, check_plans
from nnunet_l2g.training.adapted_plans import TARGET_KEY


@dataclass(frozen=True)
class Model:
    """file : the checkpoint
    trainer : the class that nnU-Net finds under the name in the checkpoint
    plans, configuration, manager : nnU-Net's managers of plans, configuration and labels
    dataset, labels : the content of dataset.json; the structures in it, and nnU-Net's reader of the images
    domain : "source" or "target" for adapted plans, else None
    network : nn.Module with its weights, in eval mode, without deep supervision
    channels : of the input
    checkpoint : its content without the weights of the network
    """

    file: Path
    trainer: type
    plans: object
    configuration: object
    manager: object
    dataset: dict
    labels: Labels
    domain: str | None
    network: object
    channels: int
    checkpoint: dict

    @property
    def method(self) -> str | None:
        """The name of the class of a PlanNetwork (L2GNet, GRCSF, GLUA), None for all other networks."""
        return decode_settings(self.network.settings)["network"] if isinstance(self.network, PlanNetwork) else None


def load_model(folder: Path, fold: str, name: str, domain: str | None = None) -> Model:
    """Opens one fold (a number or all) of a model folder.

    Parameters
    ----------
    name : of the checkpoint's file
    domain : which domain the image is of, for plans of `nnunet_l2g adapt`, which normalise as the target needs it

    Raises
    ------
    UserError : a file is missing, damaged, of other origin, or does not fit the trainer; a domain for plans without one
    """
    file = checkpoint_file(folder, fold, name)
    checkpoint = read_checkpoint(file)
    trainer = _find_trainer(checkpoint["trainer_name"], file)
    configuration_name = checkpoint["init_args"]["configuration"]
    plans, domain = read_plans(folder / "plans.json", configuration_name, domain)
    configuration = plans.get_configuration(configuration_name)
    dataset = read_dataset_json(folder / "dataset.json")
    with quiet():
        labels = replace(read_labels(folder / "dataset.json"), reader=plans.image_reader_writer_class)
    if configuration.previous_stage_name is not None:
        raise UserError(
            f"{folder}: {configuration_name} is the second stage of a cascade, whose input holds a prediction of "
            f"{configuration.previous_stage_name}; inspect the first stage, or a model without cascade"
        )
    try:
        manager = plans.get_label_manager(dataset)
        channels = determine_num_input_channels(plans, configuration, dataset)
    except Exception as error:  # nnU-Net's managers do not check the two files
        raise UserError(f"{folder}: dataset.json and plans.json do not fit together ({error!r}); copy both again") from error
    network = build_network(trainer, plans, configuration, channels, manager.num_segmentation_heads, file)
    try:
        network.load_state_dict(checkpoint.pop("network_weights"))
    except Exception as error:  # names and shapes that do not fit, or no state dict at all
        cause = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(
            f"{file}: its weights do not fit the network of its trainer and plans ({cause}); take plans.json and checkpoint "
            "from the same training"
        ) from error
    network.eval()
    return Model(file, trainer, plans, configuration, manager, dataset, labels, domain, network, channels, checkpoint)


def checkpoint_file(folder: Path, fold: str, name: str) -> Path:
    """fold_<fold>/<name> in a model folder. UserError that says what is there instead."""
    for needed in ("dataset.json", "plans.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"-m {folder}: {needed} is missing; expected nnU-Net's folder <trainer>__<plans>__<configuration>, which holds "
                "dataset.json, plans.json and fold_<N>"
            )
    file = folder / f"fold_{fold}" / name
    if not file.is_file():
        found = ", ".join(sorted(str(other.relative_to(folder)) for other in folder.glob("fold_*/checkpoint_*.pth")))
        raise UserError(f"{file} is missing; {folder} has {found or 'no checkpoint'}; name one with -f and -chk, or train it")
    return file


def read_checkpoint(file: Path) -> dict:
    """The content of a checkpoint of nnU-Net. UserError if it is damaged, or holds more than tensors and plain values."""
    try:
        content = load_safely(file)
        names = content["trainer_name"], content["init_args"]["configuration"]
        mirrored = content.get("inference_allowed_mirroring_axes")
        if not all(isinstance(name, str) for name in names) or not set(mirrored or ()) <= {0, 1, 2}:
            raise ValueError("trainer_name, init_args or inference_allowed_mirroring_axes are not as nnU-Net writes them")
        _ = content["network_weights"]
    except Exception as error:  # each kind of damage has its own
        cause = next(iter(str(error).strip().splitlines()), "")[:200]
        raise UserError(
            f"{file}: cannot be read as a checkpoint of nnU-Net ({type(error).__name__}: {cause}); it is damaged, of another "
            "program, or holds more than tensors and plain values, which is never unpickled; copy it again"
        ) from error
    return content


def _find_trainer(name: str, file: Path) -> type:
    """The class of this name: ours, also where nnU-Net has not been told of them, or what nnU-Net finds."""
    try:
        ours = getattr(trainers, name, None)
        trainer = ours if isinstance(ours, type) else find_trainer(name)
    except Exception as error:  # any module of nnU-Net or of the user's can end the look-up
        raise UserError("\n  ".join([f"{file}: nnU-Net cannot look for its trainer {name}", *explain(error)])) from error
    if trainer is None:
        raise UserError(
            f"{file}: made by the trainer {name}, which nnU-Net does not find here; install what provides it, or set "
            "nnUNet_extTrainer to its folder (`nnunet_l2g doctor` shows what is found)"
        )
    return trainer


def read_plans(path: Path, configuration: str, domain: str | None):
    """nnU-Net's manager of the plans that normalise an image of `domain`, and that domain. UserError as in `load_model`."""
    try:
        content = read_object(path)
        if configuration not in content["configurations"]:
            has = ", ".join(content["configurations"])
            raise UserError(f"{path}: has {has}, but the checkpoint is of {configuration}; take both from one training")
        check_plans(content, path)
        content, domain = plans_for_domain(content, configuration, domain)
    except DAMAGE as error:
        raise UserError(f"{path}: not nnU-Net's plans ({type(error).__name__}: {error}); copy the file again") from error
    plans = check_plans(content, path)
    check_network_classes(plans.get_configuration(configuration), path)
    return plans, domain


def plans_for_domain(plans: dict, configuration: str, domain: str | None) -> tuple[dict, str | None]:
    """Adapted plans with the normalisation of `domain` (None: source), and that domain. Other plans as they are, and None."""
    if TARGET_KEY not in plans:
        if domain is not None:
            raise UserError(f"--domain {domain}: the plans {plans.get('plans_name')} name no target domain; leave it out")
        return plans, None
    if domain == "target":
        return plans, domain
    target, plans = plans[TARGET_KEY], copy.deepcopy(plans)
    entry = target["configurations"][configuration]
    plans["configurations"][configuration] |= {
        "normalization_schemes": entry["source_normalization_schemes"],
        "use_mask_for_norm": entry["source_use_mask_for_norm"],
    }
    if "CTNormalization" in entry["source_normalization_schemes"]:  # the only scheme that uses intensities of the plans
        name = check_plain_name(target["source_plans_name"], "source_plans_name in the adapted plans")
        path = Path(os.environ.get("nnUNet_preprocessed", ""), plans["dataset_name"], f"{name}.json")
        key = "foreground_intensity_properties_per_channel"
        try:
            plans[key] = read_object(path)[key]
        except DAMAGE as error:
            raise UserError(
                f"{path}: cannot be read ({type(error).__name__}); it holds the intensities that normalise the source. Set "
                "nnUNet_preprocessed to where the model was trained, or inspect an image of the target with --domain target"
            ) from error
    return plans, "source"


def build_network(trainer: type, plans, configuration, channels: int, heads: int, file: Path):
    """The network as nnU-Net builds it to predict. Trainers from before nnU-Net 2.8 take other arguments."""
    build = trainer.build_network_architecture
    described = (plans, configuration)
    if "plans_manager" not in inspect.signature(build).parameters:
        described = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    try:
        return build(*described, channels, heads, enable_deep_supervision=False)
    except Exception as error:  # code of a trainer
        raise UserError(f"{file}: {trainer.__name__} cannot build its network ({type(error).__name__}: {error})") from error
