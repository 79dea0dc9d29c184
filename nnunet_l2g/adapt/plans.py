"""From two datasets to adapted plans: the source's plans, which name the target and normalise as the target needs.

nnU-Net keeps results by trainer, plans and configuration. Therefore each target has plans of its own, <source plans>_to<ID>,
and several targets of one source can be used side by side.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_l2g.adapt.datasets import Source, Target, find_source, find_target
from nnunet_l2g.adapt.fingerprint import Fingerprint, read_fingerprint
from nnunet_l2g.adapt.preprocessing import preprocess_target, settings_digest
from nnunet_l2g.files import DAMAGE, read_object, write_text
from nnunet_l2g.training.adapted_plans import FORMAT, TARGET_KEY, check_source_data, source_data_digest


@dataclass(frozen=True)
class AdaptedPlans:
    """The result of `adapt`."""

    path: Path
    source_id: str
    configurations: tuple[str, ...]
    changed: bool  # False: everything was there already


def adapt(source_id: str, target_id: str, configurations: list[str] | None, plans_name: str, processes: int) -> AdaptedPlans:
    """Checks both datasets, preprocesses the target and writes the adapted plans last. Prints what it does.

    Labels of the target are neither listed nor opened. The command can be interrupted and repeated. Configurations that were
    adapted earlier are brought up to date as well, because all configurations of a plans file share the intensity statistics.

    The parameters are the options -s, -t, -c, -p and -np. UserError if the user can correct something in the two datasets;
    nothing has been preprocessed then.
    """
    source = find_source(source_id, plans_name, configurations)
    target = find_target(target_id, source)
    path = source.folder / f"{source.plans_name}_to{target.name[7:10]}.json"
    earlier = _earlier_source_data(path)
    known = source.plans["configurations"]
    wanted = {*source.configurations, *(c for c in earlier if c in known and source.data(c).is_dir())}
    source = replace(source, configurations=tuple(c for c in known if c in wanted))
    print(
        f"Source {source.name}, target {target.name}: {len(target.cases)} images without labels, "
        f"configurations {', '.join(source.configurations)}",
        flush=True,
    )
    for configuration in wanted & earlier.keys():
        again = f"{source.preprocess_command(configuration)}, and adapt again"
        check_source_data(source.data(configuration), path, earlier[configuration], again)

    fingerprint = read_fingerprint(source, target, processes)
    plans = adapted_plans(source, target, fingerprint, path.stem)
    changed = False
    for configuration, entry in plans[TARGET_KEY]["configurations"].items():
        folder = Path(str(nnUNet_preprocessed), entry["data"])
        changed |= preprocess_target(plans, configuration, folder, target.cases, entry["settings"], processes)
    text = json.dumps(plans, indent=4) + "\n"
    if changed or not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
        changed = True
    return AdaptedPlans(path, source.id, source.configurations, changed)


def adapted_plans(source: Source, target: Target, fingerprint: Fingerprint, plans_name: str) -> dict:
    """The source's plans with the target's normalisation, without cascades, and with an entry under TARGET_KEY.

    Cascades are left out because their second stage would be trained on predictions of the source alone.
    """
    plans = deepcopy(source.plans)
    plans["plans_name"] = plans_name
    plans["foreground_intensity_properties_per_channel"] = fingerprint.intensities
    for name in source.plans["configurations"]:
        if source.manager.get_configuration(name).previous_stage_name is not None:
            del plans["configurations"][name]
    for configuration in plans["configurations"].values():
        configuration.pop("next_stage", None)
        if "normalization_schemes" in configuration:  # the others inherit theirs
            configuration["normalization_schemes"] = fingerprint.schemes
        if "use_mask_for_norm" in configuration:
            configuration["use_mask_for_norm"] = fingerprint.masks
    entries = {}
    for name in source.configurations:
        resolved = source.manager.get_configuration(name)
        entries[name] = {
            "data": f"{target.name}/from_{source.id}_{source.plans_name}/{resolved.data_identifier}",
            "settings": settings_digest(plans, name, fingerprint.digest),
            "source_data": source_data_digest(source.data(name)),
            "source_normalization_schemes": resolved.normalization_schemes,
            "source_use_mask_for_norm": resolved.use_mask_for_norm,
        }
    plans[TARGET_KEY] = {
        "format": FORMAT,
        "dataset_name": target.name,
        "source_plans_name": source.plans_name,
        "configurations": entries,
    }
    return plans


def _earlier_source_data(path: Path) -> dict[str, str]:
    """configuration -> hash of the source's data in adapted plans of an earlier run; empty if there are none."""
    try:
        entries = read_object(path)[TARGET_KEY]["configurations"]
        return {name: str(entry["source_data"]) for name, entry in entries.items()}
    except DAMAGE:
        return {}
