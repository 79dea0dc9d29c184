"""nnU-Net's plans, checked for what our commands take out of them: its own reader believes every word of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.untrusted.names import check_plain_name

LONGEST = 1 << 15  # voxels along an axis, the most that a NIfTI header can say


def check_plans(plans: dict, path: Path):
    """nnU-Net's PlansManager of `plans`.

    UserError unless names are plain, numbers are in their range, and each configuration can be resolved; `path` is the file
    that the message names.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for key in ("plans_name", "dataset_name"):
        check_plain_name(plans.get(key), f"{path}: {key}")
    try:
        manager = PlansManager(plans)
        _check(isinstance(plans["image_reader_writer"], str), "image_reader_writer", plans)
        for key in ("transpose_forward", "transpose_backward"):
            _check(sorted(plans[key]) == [0, 1, 2], key, plans)
        for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
            _check(len(plans[key]) == 3 and _positive(plans[key], float("inf")), key, plans)
        names = list(plans["configurations"])
        found = {name: manager.get_configuration(name) for name in names}
        for name in names:
            _check_configuration(found[name], path, name)
    except UserError:
        raise
    except Exception as error:  # wherever nnU-Net's managers stumble over a value of another kind
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: not nnU-Net's plans ({cause}); copy the file again") from error
    return manager


def _check_configuration(found, path: Path, name: str) -> None:
    check_plain_name(name, f"{path}: a configuration")
    check_plain_name(found.data_identifier, f"{path}: data_identifier of {name}")
    values = found.configuration
    dims = len(found.patch_size)
    _check(dims in (2, 3) and _positive(found.patch_size, LONGEST, whole=True), "patch_size", values)
    _check(len(found.spacing) == dims and _positive(found.spacing, float("inf")), "spacing", values)
    _check(_positive([found.batch_size], 1 << 20, whole=True), "batch_size", values)
    _check(isinstance(found.preprocessor_name, str), "preprocessor_name", values)
    _check(_all(found.normalization_schemes, str), "normalization_schemes", values)
    _check(_all(found.use_mask_for_norm, bool), "use_mask_for_norm", values)
    _check(found.previous_stage_name is None or isinstance(found.previous_stage_name, str), "previous_stage", values)


def _positive(values: Sequence, largest: float, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return all(isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < largest for value in values)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check(holds: bool, key: str, values: dict) -> None:
    if not holds:
        raise ValueError(f"{key} is {str(values[key])[:80]}")
