"""A source that is preprocessed by its file names alone, and a raw target: enough for checks that read no image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tiny_model import make_plans

CASES = ["case_0", "case_1", "case_2"]
DATASET_JSON = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "organ": 1, "lesion": [1, 2]},
    "regions_class_order": [1, 2],
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


class SmallSource(NamedTuple):
    """source : nnUNet_preprocessed/Dataset990_Tiny, planned and preprocessed for 3d_fullres
    target : nnUNet_raw/Dataset991_Other
    """

    source: Path
    target: Path

    @property
    def plans(self) -> Path:
        return self.source / "nnUNetPlans.json"

    @property
    def images(self) -> Path:
        return self.target / "imagesTr"


def write_small_source(folder: Path) -> SmallSource:
    """Writes both below a folder that holds nnU-Net's `raw`, `preprocessed` and `results`."""
    files = SmallSource(folder / "preprocessed" / "Dataset990_Tiny", folder / "raw" / "Dataset991_Other")
    for path in (files.source / "tiny", files.source / "gt_segmentations", files.images, folder / "results"):
        path.mkdir(parents=True)
    files.plans.write_text(json.dumps(make_plans() | {"plans_name": "nnUNetPlans"}))
    for path in (files.source, files.target):
        (path / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for case in CASES:
        for part in (".b2nd", "_seg.b2nd", ".pkl"):
            (files.source / "tiny" / f"{case}{part}").write_bytes(b"x")
        (files.source / "gt_segmentations" / f"{case}.nii.gz").touch()
        (files.images / f"{case}_0000.nii.gz").touch()
    return files


def edit_json(path: Path, change) -> None:
    """Applies a function to what a JSON file holds, and writes it back."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
