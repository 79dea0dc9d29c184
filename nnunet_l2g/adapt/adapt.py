"""The way from two datasets to adapted plans: checks, fingerprint, preprocessing, plans, in this order."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_l2g.adapt import plans as adapted
from nnunet_l2g.adapt.datasets import Source, Target, check_preprocessed, find_source, find_target
from nnunet_l2g.adapt.fingerprint import (
    case_jobs,
    extract_fingerprint,
    geometries,
    normalization,
    read_case,
)
from nnunet_l2g.adapt.geometry import check_geometry
from nnunet_l2g.adapt.preprocessing import preprocess_target
from nnunet_l2g.adapt.source_data import check_normalisation, restore
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, read_json, read_object
from nnunet_l2g.training.adapted_plans import TARGET_KEY, check_adapted_plans, source_data_digest
from nnunet_l2g.training.checkpoints import write_atomically

_PROBED = 5  # images that are read before all are, so that a dataset that does not fit is refused at once


@dataclass(frozen=True)
class Adapted:
    """The result."""

    source: Source
    target: Target
    plans_file: Path
    changed: bool  # False: everything was there already

    @property
    def plans_name(self) -> str:
        return self.plans_file.name[: -len(".json")]


def adapt(source_id: str, target_id: str, configurations: list[str] | None, plans_name: str, processes: int) -> Adapted:
    """Adapts the source's plans to the target and prints what it does. Labels of the target are neither listed nor opened.

    Safe to interrupt and to repeat: only what is missing or changed is made. Configurations that were adapted earlier are
    brought up to date too, since all of a plans file share one normalisation.

    Parameters
    ----------
    source_id, target_id : ID or DatasetXXX_Name
    configurations : default (None or empty): all that are preprocessed, cascades excepted
    plans_name : the source's own plans
    processes : workers; 1 works in this process

    Raises
    ------
    UserError : anything about the two datasets that the user can mend, before the long work begins wherever possible
    """
    source = find_source(source_id, plans_name, configurations)
    target = find_target(target_id, source)
    base = Path(str(nnUNet_preprocessed))
    plans_file = source.folder / f"{adapted.adapted_name(source, target)}.json"
    earlier = _earlier_entries(plans_file, target)
    source = _with_earlier(source, earlier)
    print(
        f"Source {source.name}, target {target.name}: {len(target.cases)} images without labels, "
        f"configurations {', '.join(source.configurations)}",
        flush=True,
    )

    fingerprint_file = base / adapted.target_folder(source, target.name) / "fingerprint.json"
    check_geometry(source, target.name, _probe(source, target))
    source_data = {c: _checked_source_data(source, c, earlier.get(c)) for c in source.configurations}
    fingerprint = extract_fingerprint(source, target, processes)  # all images are read: only so is a change found
    for warning in check_geometry(source, target.name, geometries(fingerprint)):
        print(f"Warning: {warning}", flush=True)
    fingerprint_file.parent.mkdir(parents=True, exist_ok=True)
    new_fingerprint = _write_if_changed(fingerprint_file, fingerprint)

    schemes, masks = normalization(source, target, fingerprint)
    plans = adapted.normalised_plans(source, target, schemes, masks, fingerprint["foreground_intensity_properties_per_channel"])
    entries = {c: adapted.configuration_entry(source, plans, c, target.name, source_data[c]) for c in source.configurations}
    made = _preprocess(plans, entries, target, fingerprint, base, processes)
    plans[TARGET_KEY] = adapted.target_entry(source, target.name, entries)
    for configuration in source.configurations:
        check_adapted_plans(plans, configuration)
    written = _write_if_changed(plans_file, plans)
    return Adapted(source, target, plans_file, new_fingerprint or written or made > 0)


def _earlier_entries(plans_file: Path, target: Target) -> dict[str, dict]:
    """What an earlier run noted for each configuration; empty if there was none, or its plans cannot be read."""
    try:
        entry = read_object(plans_file)[TARGET_KEY]
        earlier = entry["configurations"] if entry["dataset_name"] == target.name else {}
        return {name: {"source_data": str(noted["source_data"])} for name, noted in earlier.items()}
    except DAMAGE:
        return {}


def _with_earlier(source: Source, earlier: dict[str, dict]) -> Source:
    """The source, with the configurations adapted earlier as well, in the order of its plans."""
    wanted = set(source.configurations)
    for configuration in set(earlier) - wanted:
        try:
            check_preprocessed(source, configuration)
            wanted.add(configuration)
        except (UserError, RuntimeError):  # RuntimeError: no longer in the source's plans
            print(f"{configuration} was adapted earlier, but the source's data for it are gone: left out of the plans")
    return replace(source, configurations=tuple(c for c in source.plans["configurations"] if c in wanted))


def _probe(source: Source, target: Target):
    """How a few target cases lie in space, spread over the list."""
    jobs = case_jobs(source, target)
    chosen = sorted({round(i) for i in np.linspace(0, len(jobs) - 1, min(len(jobs), _PROBED))})
    return [read_case(jobs[i])[1] for i in chosen]


def _checked_source_data(source: Source, configuration: str, earlier: dict | None) -> str:
    """Digest of the source's preprocessed data, which are those of the last run, or agree with the source's plans."""
    digest = source_data_digest(source.data(configuration))
    if earlier is not None and earlier["source_data"] == digest:
        return digest
    if check_normalisation(source, configuration):
        return digest
    if earlier is not None:
        raise UserError(
            f"the preprocessed data of {source.name} in {source.data(configuration)} have changed since the last "
            f"adapt, and its raw images, to check them with, are gone. {restore(source, configuration)}; or delete "
            "the adapted plans to take the data as they are"
        )
    print(f"{source.name}, {configuration}: the raw images are gone, so the preprocessed data are taken as they are")
    return digest


def _preprocess(plans: dict, entries: dict[str, dict], target: Target, fingerprint: dict, base: Path, processes: int) -> int:
    """Preprocesses for each configuration; those with the same data share it. Returns how many cases had to be made."""
    inputs = {case: entry["digest"] for case, entry in fingerprint["cases"].items()}
    done: dict[str, str] = {}  # folder -> settings
    made = 0
    for configuration, entry in entries.items():
        if entry["data"] not in done:
            made += preprocess_target(plans, configuration, base / entry["data"], target.cases, inputs, processes)
        elif done[entry["data"]] != entry["settings"]:
            raise UserError(
                f"configuration {configuration} shares its data_identifier with another one but differs in spacing "
                "or resampling; give it a data_identifier of its own in the source's plans"
            )
        done[entry["data"]] = entry["settings"]
    return made


def _write(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=4) + "\n"
    write_atomically(text.encode(), str(path))


def _write_if_changed(path: Path, value: dict) -> bool:
    """Whether it had to be written."""
    try:
        if read_json(path) == value:
            return False
    except (OSError, ValueError):
        pass
    _write(path, value)
    return True
