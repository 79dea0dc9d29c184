"""Adapted plans normalise as the target wants; an image of the source needs the source's normalisation."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name, read_object
from nnunet_l2g.training.adapted_plans import TARGET_KEY

NEEDS_INTENSITIES = "CTNormalization"  # the one scheme of nnU-Net that looks at the data set's fingerprint


def plans_for_domain(plans: dict, configuration: str, domain: str | None) -> tuple[dict, str | None]:
    """The plans to preprocess an image of `domain` with, and that domain; plans that are not adapted have none.

    Raises
    ------
    UserError : a domain for plans without one; the source is normalised with its own fingerprint and its plans are gone
    """
    if TARGET_KEY not in plans:
        if domain is not None:
            raise UserError(f"--domain {domain}: the plans {plans.get('plans_name')} name no target domain; leave it out")
        return plans, None
    if domain == "target":
        return plans, domain
    target = plans[TARGET_KEY]
    entry = target["configurations"][configuration]
    plans = copy.deepcopy(plans)
    plans["configurations"][configuration] |= {
        "normalization_schemes": entry["source_normalization_schemes"],
        "use_mask_for_norm": entry["source_use_mask_for_norm"],
    }
    if NEEDS_INTENSITIES in entry["source_normalization_schemes"]:
        plans["foreground_intensity_properties_per_channel"] = _source_intensities(plans["dataset_name"], target)
    return plans, "source"


def _source_intensities(dataset: str, target: dict) -> dict:
    name = check_plain_name(target["source_plans_name"], "source_plans_name in the adapted plans")
    path = Path(os.environ.get("nnUNet_preprocessed", ""), dataset, f"{name}.json")
    try:
        return read_object(path)["foreground_intensity_properties_per_channel"]
    except DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}); images of the source are normalised with its fingerprint, which "
            "the adapted plans do not hold. Set nnUNet_preprocessed to where it was trained, or inspect with --domain target"
        ) from error
