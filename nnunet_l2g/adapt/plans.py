"""Adapted plans: the source's, which name the target and normalise as the target wants; and their check before training.

nnU-Net keeps results by trainer, plans and configuration, so every target has plans of its own, `<source plans>_to<ID>`. Its
commands carry unknown keys along; what is ours stands under one key, `TARGET_KEY`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.adapt.datasets import TARGET_KEY, Source, Target, is_cascade
from nnunet_l2g.adapt.digests import digest_json
from nnunet_l2g.adapt.preprocessing import manifest_path, read_manifest, settings_of
from nnunet_l2g.adapt.source_data import data_digest
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name, is_plain_name, read_object

FORMAT = 1


@dataclass(frozen=True)
class AdaptedTarget:
    """What a trainer needs to know about the target of its plans."""

    dataset_name: str
    folder: Path  # preprocessed images of the configuration, for nnUNetDatasetBlosc2
    identifiers: list[str]
    source_normalization_schemes: list[str]  # per channel, of the data trained on; the plans' own are the target's
    source_use_mask_for_norm: list[bool]


def adapted_name(source: Source, target: Target) -> str:
    """nnUNetPlans_to302."""
    return f"{source.plans_name}_to{target.id}"


def target_folder(source: Source, target_name: str) -> str:
    """Where all that is made of the target's images for this source lies, relative to nnUNet_preprocessed."""
    return f"{target_name}/from_{source.id}_{source.plans_name}"


def normalised_plans(source: Source, target: Target, schemes: list[str], masks: list[bool], intensities: dict) -> dict:
    """The source's plans with the target's normalisation, without cascades and without `TARGET_KEY` as yet.

    A cascade would train its second stage on first-stage predictions of the source alone.
    """
    plans = deepcopy(source.plans)
    plans["plans_name"] = adapted_name(source, target)
    plans["foreground_intensity_properties_per_channel"] = deepcopy(intensities)
    cascades = [c for c in plans["configurations"] if is_cascade(source.manager, c)]
    for name in cascades:
        del plans["configurations"][name]
    for configuration in plans["configurations"].values():
        configuration.pop("next_stage", None)
        if "normalization_schemes" in configuration:  # the others inherit theirs
            configuration["normalization_schemes"] = list(schemes)
        if "use_mask_for_norm" in configuration:
            configuration["use_mask_for_norm"] = list(masks)
    return plans


def configuration_entry(source: Source, plans: dict, configuration: str, target_name: str, source_data: str) -> dict:
    """What adapted plans note about one configuration; `source_data` is the digest of the source's preprocessed data."""
    resolved = source.manager.get_configuration(configuration)
    return {
        "data": f"{target_folder(source, target_name)}/{resolved.data_identifier}",
        "settings": digest_json(settings_of(plans, configuration)),
        "source_data": source_data,
        "source_plans": configuration_digest(source.plans, configuration),
        "source_normalization_schemes": list(resolved.normalization_schemes),
        "source_use_mask_for_norm": list(resolved.use_mask_for_norm),
    }


def configuration_digest(plans: dict, configuration: str) -> str:
    """Identifies a configuration, inheritance resolved, and what the plans say for all of them."""
    manager = PlansManager(plans)
    shared = {key: plans.get(key) for key in ("image_reader_writer", "transpose_forward", "label_manager")}
    return digest_json(
        [manager.get_configuration(configuration).configuration, shared, manager.foreground_intensity_properties_per_channel]
    )


def target_entry(source: Source, target_name: str, configurations: dict[str, dict]) -> dict:
    """The value of `TARGET_KEY`."""
    return {
        "format": FORMAT,
        "dataset_name": target_name,
        "source_plans_name": source.plans_name,
        "folder": target_folder(source, target_name),
        "configurations": configurations,
    }


def check_adapted_plans(plans: dict, configuration: str, preprocessed: str | Path | None = None) -> AdaptedTarget:
    """What the target of `plans` is, if everything adapt promised for `configuration` still holds; else UserError.

    For trainers, before they compute anything; not for prediction, which needs neither data set. Takes about a second per
    thousand cases, as it reads some of every preprocessed file of the source.

    Parameters
    ----------
    plans : as in <plans>.json; nnUNetTrainer has them as `self.plans_manager.plans`
    configuration : that is trained, such as "2d"
    preprocessed : nnU-Net's folder; default: its variable

    Raises
    ------
    UserError : plans that name no target; a configuration that was not adapted; preprocessed target images missing, incomplete
        or made with other settings; the source planned or preprocessed otherwise since
    """
    base = Path(str(nnUNet_preprocessed) if preprocessed is None else preprocessed)
    name = check_plain_name(plans.get("plans_name"), "plans_name of the plans")
    source_name = check_plain_name(plans.get("dataset_name"), f"dataset_name of the plans {name}")
    if not isinstance(plans.get(TARGET_KEY), dict):
        raise UserError(
            f"the plans {name} of {source_name} name no target; make some with `nnunet_l2g adapt -s "
            f"{source_name[7:10]} -t TARGET -p {name}` and train with -p {name}_to<target's ID>"
        )
    target = plans[TARGET_KEY]
    original = check_plain_name(target.get("source_plans_name", "nnUNetPlans"), f"source_plans_name of the plans {name}")
    target_name = check_plain_name(target.get("dataset_name", "Dataset000"), f"the target of the plans {name}")
    again = f"run `nnunet_l2g adapt -s {source_name[7:10]} -t {target_name[7:10]} -c {configuration} -p {original}`"
    if target.get("format") != FORMAT:
        raise UserError(
            f"the plans {name} have target format {target.get('format')}, expected {FORMAT}: another version of "
            f"nnunet_l2g wrote them; {again} with this one"
        )
    if not isinstance(target.get("configurations"), dict):
        raise UserError(f"the plans {name} do not say for which configurations they were adapted; {again}")
    entry = target["configurations"].get(configuration)
    if entry is None:
        raise UserError(
            f"the plans {name} were adapted for {', '.join(target['configurations'])}, not for {configuration}; {again}"
        )
    if not _is_entry(entry):
        raise UserError(f"the plans {name} do not say what they were adapted from as adapt does; {again}")
    folder = base / entry["data"]
    identifiers = _check_target_data(folder, target_name, entry, again)
    _check_source(base / source_name, plans, configuration, original, entry, again)
    return AdaptedTarget(
        target_name, folder, identifiers, entry["source_normalization_schemes"], entry["source_use_mask_for_norm"]
    )


def _is_entry(entry: object) -> bool:
    """Whether it has the form that `configuration_entry` gives it; the data lie below nnUNet_preprocessed."""
    if not isinstance(entry, dict):
        return False
    texts = [entry.get(key) for key in ("data", "settings", "source_data", "source_plans")]
    lists = [entry.get(f"source_{key}") for key in ("normalization_schemes", "use_mask_for_norm")]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(values, list) for values in lists):
        return False
    return all(map(is_plain_name, entry["data"].split("/")))


def _check_target_data(folder: Path, target_name: str, entry: dict, again: str) -> list[str]:
    """The target's cases."""
    manifest, images = read_manifest(folder), f"the preprocessed images of the target {target_name}"
    if not manifest or not folder.is_dir():
        missing = manifest_path(folder) if folder.is_dir() else folder
        raise UserError(f"{images} are gone ({missing} is missing); {again}")
    if not manifest.get("complete"):
        raise UserError(f"{images} in {folder} are not complete: adapt was interrupted or is still running; {again}")
    if manifest["settings"] != entry["settings"]:
        raise UserError(f"{images} in {folder} were made with other settings than these plans name; {again}")
    for record in manifest["cases"].values():
        for file, expected in record["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != expected["size"]:
                raise UserError(f"{images} are damaged: {path} is missing or has another size; {again}")
    return sorted(manifest["cases"])


def _check_source(folder: Path, plans: dict, configuration: str, original: str, entry: dict, again: str) -> None:
    """That the source's data are those the plans were adapted for: not overwritten, not made anew."""
    identifier = PlansManager(plans).get_configuration(configuration).data_identifier
    data = folder / check_plain_name(identifier, f"data_identifier of the plans {plans['plans_name']}")
    restore = f"`nnUNetv2_preprocess -d {folder.name[7:10]} -plans_name {original} -c {configuration}`"
    if not data.is_dir():
        raise UserError(f"the preprocessed data of the source {folder.name} are missing: expected {data}; run {restore}")
    if data_digest(data) != entry["source_data"]:
        raise UserError(
            f"the preprocessed data of the source in {data} are not those that {plans['plans_name']} was adapted for. "
            "If nnUNetv2_preprocess was run with adapted plans, it put the target's normalisation on them: run "
            f"{restore}; if the source was changed on purpose, {again}"
        )
    own = folder / f"{original}.json"
    if own.is_file():  # without them, adapted plans are enough to train
        try:
            current = read_object(own)
            same = configuration in current["configurations"] and (
                configuration_digest(current, configuration) == entry["source_plans"]
            )
        except (*DAMAGE, RuntimeError):  # RuntimeError: inheritance in a circle
            same = False
        if not same:
            raise UserError(f"the source's plans {own} have changed since {plans['plans_name']} was adapted from them; {again}")
