"""Adapted plans: the source's, which name the target and normalise as the target wants; and their check before training.

nnU-Net keeps results by trainer, plans and configuration, so every target has plans of its own, `<source plans>_to<ID>`. Its
commands carry unknown keys along; what is ours stands under one key, `TARGET_KEY`.
"""

from __future__ import annotations

from copy import deepcopy

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.adapt.datasets import Source, Target, is_cascade
from nnunet_l2g.adapt.digests import digest_json
from nnunet_l2g.adapt.preprocessing import settings_of
from nnunet_l2g.training.adapted_plans import FORMAT


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
