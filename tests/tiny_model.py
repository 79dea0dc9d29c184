"""Model folders as nnU-Net writes them, with small untrained networks. No nnU-Net command is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.inspect.model import load_model
from nnunet_l2g.lookup import find_trainer

INTENSITIES = {"mean": 200.0, "std": 50.0, "percentile_00_5": 50.0, "percentile_99_5": 350.0}
# a rotation with no axis in a coordinate plane
OBLIQUE = (0.36, 0.48, -0.8, -0.8, 0.6, 0.0, 0.48, 0.64, 0.6)


def make_plans(
    patch=(8, 32, 32), spacing=(4.0, 2.0, 2.0), transpose=(0, 1, 2), channels=1, reader="SimpleITKIO",
    schemes=("ZScoreNormalization",),
) -> dict:  # fmt: skip
    """Plans of one configuration, `2d` or `3d_fullres` by the patch: three stages, 8 to 32 features."""
    dims, stages = len(patch), 3
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": list(schemes) * (channels if len(schemes) == 1 else 1),
        "use_mask_for_norm": [False] * channels,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [8, 16, 32],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * stages,
                "strides": [[1] * dims, [2] * dims, [2] * dims],
                "n_conv_per_stage": [1] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    for kind, settings in (("data", {}), ("seg", {"is_seg": True}), ("probabilities", {})):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = resampling | settings
    return {
        "dataset_name": "Dataset990_Tiny",
        "plans_name": "tinyPlans",
        "original_median_spacing_after_transp": list(spacing) if dims == 3 else [4.0, *spacing],
        "original_median_shape_after_transp": list(patch) if dims == 3 else [8, *patch],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose)],
        "configurations": {"2d" if dims == 2 else "3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): INTENSITIES for i in range(channels)},
    }


def write_model(
    folder: Path, trainer: str = "nnUNetTrainer", plans: dict | None = None, labels: dict | None = None, names=("image",),
    ending: str = ".nii.gz", regions_class_order=None, **checkpoint,
) -> Path:  # fmt: skip
    """A model folder with fold_0/checkpoint_final.pth. `checkpoint` are entries that are added to it or replaced in it."""
    torch.manual_seed(0)
    plans = plans or make_plans()
    labels = labels or {"background": 0, "organ": 1, "lesion": 2}
    dataset = {"channel_names": {str(i): name for i, name in enumerate(names)}, "labels": labels, "numTraining": 5,
               "file_ending": ending}  # fmt: skip
    if regions_class_order:
        dataset["regions_class_order"] = regions_class_order
    (name,) = plans["configurations"]
    model = folder / f"{trainer}__{plans['plans_name']}__{name}"
    (model / "fold_0").mkdir(parents=True)
    (model / "dataset.json").write_text(json.dumps(dataset))
    (model / "plans.json").write_text(json.dumps(plans))
    manager = PlansManager(plans)
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    with pytest.MonkeyPatch.context() as patch:  # an editable install may not be registered
        patch.setenv(VARIABLE, with_trainers(""))
        build = find_trainer(trainer).build_network_architecture
    network = build(manager, manager.get_configuration(name), len(names), heads, False)
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"train_losses": [np.float64(-0.5)], "mean_fg_dice": [np.float32(0.5)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {"configuration": name, "fold": 0},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": (0,),
    }
    torch.save(content | checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model


def open_model(folder: Path, **options):
    """A model folder as `inspect` opens it."""
    return load_model(folder, "0", "checkpoint_final.pth", **options)


def write_case(
    folder: Path, shape=(12, 40, 36), spacing=(4.0, 1.5, 2.5), channels=1, direction=OBLIQUE, origin=(-10.0, 5.0, 77.0)
) -> tuple[Path, Path]:  # fmt: skip
    """An image with air (0) around a block, and its labels: an organ off the centre with a bright lesion at one end.

    shape and spacing are (z, y, x). Returns the first channel's file and the label's.
    """
    rng = np.random.default_rng(0)
    z, y, x = np.indices(shape)
    block = (z >= 2) & (y >= 5) & (y < shape[1] - 9) & (x >= 7)
    organ = block & (np.abs(z - 7) <= 3) & (np.abs(y - 17) <= 8) & (np.abs(x - 24) <= 9)
    lesion = organ & (z >= 8) & (y < 15) & (x < 22)
    labels = organ.astype(np.uint8) + lesion
    folder.mkdir(parents=True, exist_ok=True)
    for channel in range(channels):
        image = np.where(block, 100 + 60 * organ + 140 * lesion + rng.normal(0, 4, shape), 0).astype(np.float32)
        _write(image, folder / f"case_{channel:04d}.nii.gz", spacing, direction, origin)
    _write(labels, folder / "label.nii.gz", spacing, direction, origin)
    return folder / "case_0000.nii.gz", folder / "label.nii.gz"


def _write(array, path: Path, spacing, direction, origin) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetDirection(direction)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))
