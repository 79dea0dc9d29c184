"""The settings of the list of plans: datasets without files, planned by nnU-Net's own planners, then made small."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.paths import nnUNet_preprocessed

DATASET = "Dataset001_Fabricated"
FEATURES = (2, 8)  # of the first stage, and at most; nnU-Net's are 32, and 320 (3D) or 512 (2D)
PLANNED_PATCH = "planned_patch_size"  # in a configuration, beside the patch that is run
RESENC = {"M": nnUNetPlannerResEncM, "L": nnUNetPlannerResEncL, "XL": nnUNetPlannerResEncXL}

ORGANS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}


@dataclass(frozen=True)
class Setting:
    """A dataset with one planner and one configuration of its plans."""

    name: str
    shape: tuple[int, int, int]  # (z, y, x), voxels, of all images
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # (z, y, x), mm
    configuration: str = "3d_fullres"
    channels: int = 1
    labels: dict = field(default_factory=lambda: ORGANS)  # as in dataset.json; regions if a value is a list
    batch: int = 2  # put into the plans, because nnU-Net's planner plans at least 2
    planner: type = ExperimentPlanner
    shrink: bool = False  # runs a patch of two voxels at the bottleneck; the planned one would take minutes

    @property
    def dataset_json(self) -> dict:
        content = {
            "channel_names": {str(i): f"channel{i}" for i in range(self.channels)},
            "labels": self.labels,
            "numTraining": 5,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
        }
        if any(isinstance(value, list) for value in self.labels.values()):
            content["regions_class_order"] = [1, 2]
        return content


def _settings() -> list[Setting]:
    flat, cube = (4, 32, 32), (16, 16, 16)
    many = {"background": 0} | {f"structure{i}": i for i in range(1, 60)}
    large = dict(shape=(96, 512, 512), spacing=(3.0, 0.8, 0.8), batch=1, shrink=True)  # three sizes, three topologies
    return [
        Setting("2D", flat, configuration="2d"),
        Setting("3D", cube),
        Setting("3D, anisotropic", (8, 32, 32), (4.0, 1.0, 1.0)),
        Setting("4 channels, 2D", flat, configuration="2d", channels=4),
        Setting("4 channels, 3D", cube, channels=4),
        Setting("regions", cube, labels=REGIONS),
        Setting("ignore label", cube, labels={**ORGANS, "ignore": 3}),
        Setting("regions and ignore label", cube, labels={**REGIONS, "ignore": 3}),
        Setting("2 classes", cube, labels={"background": 0, "organ": 1}),
        Setting("60 classes", cube, labels=many),
        Setting("batch of 1", cube, batch=1),
        Setting("cascade", cube, configuration="3d_cascade_fullres"),
        Setting("ResEnc M, 2D", configuration="2d", planner=RESENC["M"], **large),
        *(Setting(f"ResEnc {size}, 3D", planner=planner, **large) for size, planner in RESENC.items()),
        Setting("3 stages, 2D", (4, 16, 16), configuration="2d"),
        Setting("3 stages, 2D, 3 voxels wide", (4, 3, 24), configuration="2d"),
        Setting("3 stages, 3D, 2 slices", (2, 16, 16), (8.0, 1.0, 1.0)),
        Setting("2 stages, 2D", (4, 8, 8), configuration="2d"),
        Setting("2 stages, 3D", (8, 8, 8)),
        Setting("1 stage, 3D", (4, 4, 4)),
    ]


SETTINGS = {setting.name: setting for setting in _settings()}


def configuration_of(plans: dict, setting: Setting) -> dict:
    """The setting's configuration in the plans; a cascade's inherits all that is asked for here."""
    configuration = plans["configurations"][setting.configuration]
    return plans["configurations"][configuration.get("inherits_from", setting.configuration)]


def prepare(setting: Setting, folder: Path) -> dict:
    """Makes the dataset in nnU-Net's folders below `folder`, without images, and plans it; the plans.

    The variables nnUNet_raw and nnUNet_preprocessed have to name these folders already.
    """
    raw, preprocessed = folder / "nnUNet_raw" / DATASET, folder / "nnUNet_preprocessed" / DATASET
    for path in (raw, preprocessed):
        path.mkdir(parents=True)
    cases = {f"case{i}": {"images": [f"case{i}.nii.gz"] * setting.channels, "label": f"case{i}.nii.gz"} for i in range(5)}
    (raw / "dataset.json").write_text(json.dumps(setting.dataset_json | {"dataset": cases}))  # no such file is opened
    intensities = {"mean": 100.0, "median": 100.0, "std": 50.0, "min": 0.0, "max": 300.0, "percentile_00_5": 1.0,
                   "percentile_99_5": 250.0}  # fmt: skip
    fingerprint = {
        "spacings": [list(setting.spacing)] * 5,
        "shapes_after_crop": [list(setting.shape)] * 5,
        "foreground_intensity_properties_per_channel": {str(i): intensities for i in range(setting.channels)},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    plans = _plan(setting)
    data = preprocessed / configuration_of(plans, setting)["data_identifier"]
    data.mkdir()
    (data / "case0.b2nd").touch()  # nnU-Net asks for the kind of the files alone
    return plans


def _plan(setting: Setting) -> dict:
    """nnU-Net's plans, with few features."""
    with torch.device("meta"):  # the planner builds networks of full size to estimate their memory
        planner = setting.planner(DATASET)
        planner.lowres_creation_threshold = 0  # no search for a 3d_lowres, which is a 3d_fullres of another spacing
        planner.plan_experiment()
    plans = json.loads(Path(nnUNet_preprocessed, DATASET, f"{planner.plans_identifier}.json").read_text())
    configurations = plans["configurations"]
    for configuration in configurations.values():
        arguments = configuration["architecture"]["arch_kwargs"]
        first, most = FEATURES
        arguments["features_per_stage"] = [min(most, first * 2**stage) for stage in range(arguments["n_stages"])]
        configuration["batch_size"] = setting.batch
        configuration[PLANNED_PATCH] = configuration["patch_size"]
        if setting.shrink:
            configuration["patch_size"] = _smallest_patch(arguments["strides"])
    if setting.configuration == "3d_cascade_fullres":  # as the planner writes them
        configurations["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return plans


def _smallest_patch(strides) -> list[int]:
    """One voxel at the bottleneck, two on the axis with the smallest stride in all: instance norm needs more than one."""
    patch = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch[int(np.argmin(patch))] *= 2
    return patch
