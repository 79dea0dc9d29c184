"""The good files that the fuzz targets spoil: a planned source, a target, plans adapted to it, a model; a second to make."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK
from tiny_model import make_plans

FOLDER = Path(tempfile.mkdtemp(prefix="nnunet_l2g_fuzz_"))
SOURCE, TARGET = "Dataset990_Tiny", "Dataset991_Other"
CASES = [f"case_{number}" for number in range(3)]
DATASET_JSON = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "organ": 1, "lesion": [1, 2]},
    "regions_class_order": [1, 2],
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
FIELDS = ("TP", "FP", "FN", "Dice", "IoU")
SUMMARY = {
    "metric_per_case": [
        {"prediction_file": f"/x/{case}.nii.gz", "metrics": {label: dict.fromkeys(FIELDS, 1.0) for label in ("1", "(1, 2)")}}
        for case in CASES
    ]
}


def place(*parts: str) -> Path:
    """A file below FOLDER, whose folder exists."""
    path = FOLDER.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@functools.cache
def planned() -> Path:
    """nnU-Net's folders with a source that is preprocessed by name and a raw target; its variables are set."""
    plans = make_plans()
    plans["plans_name"] = "nnUNetPlans"
    source, raw = place("preprocessed", SOURCE, "x").parent, place("raw", TARGET, "x").parent
    for name, content in (("nnUNetPlans", plans), ("dataset", DATASET_JSON), ("dataset_fingerprint", {})):
        write(source / f"{name}.json", json.dumps(content).encode())
    for case in CASES:
        for part in (".b2nd", "_seg.b2nd", ".pkl"):
            write(source / "tiny" / f"{case}{part}", b"voxels")
        write(source / "gt_segmentations" / f"{case}.nii.gz", b"")
        write(raw / "imagesTr" / f"{case}_0000.nii.gz", b"")
    write(raw / "dataset.json", json.dumps(DATASET_JSON).encode())
    for kind in ("raw", "preprocessed", "results"):
        place(kind, "x")
        os.environ[f"nnUNet_{kind}"] = str(FOLDER / kind)
    return FOLDER


@functools.cache
def adapted() -> tuple[dict, dict]:
    """Adapted plans, with a manifest of the target's preprocessed images."""
    from nnunet_l2g.adapt import datasets, plans
    from nnunet_l2g.adapt.preprocessing import _SUFFIXES, FORMAT, manifest_path
    from nnunet_l2g.adapt.source_data import data_digest

    planned()
    source = datasets.find_source("990", "nnUNetPlans", None)
    target = datasets.find_target("991", source)
    value = plans.normalised_plans(source, target, ["ZScoreNormalization"], [False], {"0": {}})
    entry = plans.configuration_entry(source, value, "3d_fullres", target.name, data_digest(source.data("3d_fullres")))
    value[datasets.TARGET_KEY] = plans.target_entry(source, target.name, {"3d_fullres": entry})
    folder = FOLDER / "preprocessed" / entry["data"]
    record = {"inputs": "", "settings": entry["settings"]}
    cases = {}
    for case in CASES:
        files = {}
        for suffix in _SUFFIXES:
            write(folder / f"{case}{suffix}", b"voxels")
            files[f"{case}{suffix}"] = {"size": 6, "digest": ""}
        cases[case] = record | {"files": files}
    manifest = {
        "format": FORMAT,
        "configuration": "3d_fullres",
        "settings": entry["settings"],
        "complete": True,
        "cases": cases,
    }
    write(manifest_path(folder), json.dumps(manifest).encode())
    plans.check_adapted_plans(value, "3d_fullres")
    return value, manifest


@functools.cache
def image() -> bytes:
    """A NIfTI file, not compressed: a fuzzer can reach its header."""
    path = place("image.nii")
    picture = SimpleITK.GetImageFromArray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 3)
    SimpleITK.WriteImage(picture, str(path))
    return path.read_bytes()
