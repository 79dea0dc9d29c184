"""Preprocesses the target's images for one configuration, so that a kill at any time costs at most the cases under way.

A case is written under `.partial`, flushed, and moved; then its record is written there. The manifest beside the folder says
which cases are in it and of what they were made; it is marked incomplete before anything changes and complete at the very end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.adapt.digests import digest_json, digest_samples
from nnunet_l2g.adapt.workers import run_parallel
from nnunet_l2g.files import is_plain_name, read_object
from nnunet_l2g.training.adapted_plans import complete_marker
from nnunet_l2g.training.checkpoints import write_atomically

FORMAT = 1
_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")  # of a case in nnUNetDatasetBlosc2
# schemes that look at nothing but the image itself; for all others the statistics of the data set are part of the settings
_PER_IMAGE = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")


class LabelFree:
    """Mixed into nnU-Net's preprocessor: no segmentation is read, and the properties say that no class is anywhere.

    The stored segmentation is then nnU-Net's nonzero mask: 0 inside, -1 outside. Loaders want the file, and the transform
    behind use_mask_for_norm wants the mask.
    """

    def run_case(self, image_files, seg_file, plans_manager, configuration_manager, dataset_json):
        data, seg, properties = super().run_case(image_files, None, plans_manager, configuration_manager, dataset_json)
        properties["class_locations"] = {}
        return data, seg, properties


@dataclass(frozen=True)
class CaseJob:
    """One case to preprocess."""

    case: str
    files: list[str]
    inputs: str  # digest of what was read
    plans: dict  # adapted
    configuration: str
    settings: str  # digest of `settings_of`
    folder: Path


def settings_of(plans: dict, configuration: str) -> dict:
    """All in the plans on which a preprocessed case depends."""
    manager = PlansManager(plans)
    resolved = manager.get_configuration(configuration)
    keys = (
        "preprocessor_name",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "resampling_fn_seg",
        "resampling_fn_seg_kwargs",
    )
    settings = {key: resolved.configuration.get(key) for key in keys}
    settings |= {
        "format": FORMAT,
        "transpose_forward": manager.transpose_forward,
        "image_reader_writer": plans["image_reader_writer"],
    }
    if any(scheme not in _PER_IMAGE for scheme in resolved.normalization_schemes):
        settings["intensities"] = manager.foreground_intensity_properties_per_channel
    return settings


def manifest_path(folder: Path) -> Path:
    """Beside the folder: nnU-Net takes every file in it for data."""
    return folder.with_name(f"{folder.name}.json")


def read_manifest(folder: Path) -> dict:
    """The manifest, {} if there is none that can be read, or not one of ours."""
    try:
        manifest = read_object(manifest_path(folder))
    except (OSError, ValueError):
        return {}
    cases = manifest.get("cases")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("settings"), str) or not isinstance(cases, dict):
        return {}
    return manifest if all(_is_record(*item) for item in cases.items()) else {}


def _is_record(case: str, record: object) -> bool:
    """Whether it has the form that `_preprocess_case` gives it; its files are the case's own."""
    if not is_plain_name(case) or not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return False
    if not all(isinstance(record.get(key), str) for key in ("inputs", "settings")):
        return False
    if set(record["files"]) != {f"{case}{suffix}" for suffix in _SUFFIXES}:
        return False
    return all(isinstance(file, dict) and {"size", "digest"} <= file.keys() for file in record["files"].values())


def preprocess_target(
    plans: dict, configuration: str, folder: Path, cases: dict[str, list[str]], inputs: dict[str, str], processes: int
) -> int:
    """Brings `folder` to the state that adapted `plans` and the images ask for. Returns how many cases had to be made.

    Parameters
    ----------
    cases : case -> image files
    inputs : case -> digest of what was read of its files
    """
    settings = settings_of(plans, configuration)
    wanted = digest_json(settings)
    manifest, partial = read_manifest(folder), _partial(folder)
    known = manifest.get("cases", {}) | _records(partial)
    kept = {
        case: known[case]
        for case in sorted(cases)
        if case in known
        and known[case]["inputs"] == inputs[case]
        and known[case]["settings"] == wanted
        and _intact(folder, known[case])
    }
    missing = [case for case in sorted(cases) if case not in kept]
    if not missing and manifest.get("complete") and set(manifest["cases"]) == set(cases) and not _strangers(folder, kept):
        return 0

    head = {
        "format": FORMAT,
        "configuration": configuration,
        "settings": wanted,
        "settings_in_words": settings,
        "nnunetv2": version("nnunetv2"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    complete_marker(folder).unlink(missing_ok=True)
    _write_json(manifest_path(folder), head | {"complete": False, "cases": kept})
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in _strangers(folder, kept):
        file.unlink()
    jobs = [CaseJob(case, cases[case], inputs[case], plans, configuration, wanted, folder) for case in missing]
    made = dict(run_parallel(_preprocess_case, jobs, processes, f"Preprocessing {configuration}"))
    _write_json(manifest_path(folder), head | {"complete": True, "cases": dict(sorted((kept | made).items()))})
    shutil.rmtree(partial)
    _write_json(complete_marker(folder), {"settings": wanted, "cases": sorted(cases)})
    return len(missing)


def _preprocess_case(job: CaseJob) -> tuple[str, dict]:
    """Makes one case and its record."""
    manager = PlansManager(job.plans)
    configuration = manager.get_configuration(job.configuration)
    preprocessor = type("LabelFreePreprocessor", (LabelFree, configuration.preprocessor_class), {})(verbose=False)
    work = _partial(job.folder) / f"{os.getpid()}.work"
    work.mkdir(exist_ok=True)
    preprocessor.run_case_save(str(work / job.case), job.files, None, manager, configuration, {})
    files = {}
    for suffix in _SUFFIXES:
        made = work / f"{job.case}{suffix}"
        files[made.name] = {"size": made.stat().st_size, "digest": digest_samples(made)}
        with open(made, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(made, job.folder / made.name)
    record = {"inputs": job.inputs, "settings": job.settings, "files": files}
    _write_json(_partial(job.folder) / f"{job.case}.json", record)
    return job.case, record


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _records(partial: Path) -> dict[str, dict]:
    """What an interrupted run finished; a record that cannot be read is as good as none."""
    records = {}
    for path in partial.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            records[path.name[: -len(".json")]] = read_object(path)
    return {case: record for case, record in records.items() if _is_record(case, record)}


def _intact(folder: Path, record: dict) -> bool:
    """Whether the case's files are there as they were written."""
    return all(
        (folder / name).is_file() and digest_samples(folder / name) == entry["digest"]
        for name, entry in record["files"].items()
    )


def _strangers(folder: Path, cases: dict[str, dict]) -> list[Path]:
    """Files in the folder that belong to none of the cases: nnU-Net's loader would take them for cases."""
    names = {name for record in cases.values() for name in record["files"]}
    return sorted(path for path in folder.iterdir() if path.name not in names) if folder.is_dir() else []


def _write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(text.encode(), str(path))
