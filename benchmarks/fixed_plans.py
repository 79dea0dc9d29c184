"""What the scripts that run whole networks share: plans as data, trainers made from them, one fixed batch, a stage's step."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_l2g import trainers
from nnunet_l2g.trainers.base import PluginTrainer
from nnunet_l2g.training.adapted_plans import AdaptedTarget

DATASET = "Dataset999_Benchmark"


class Plan(NamedTuple):
    """As nnU-Net 2.8 plans it. `strides` and `kernels` by stage; None: halved on every axis, and 3 everywhere."""

    patch: tuple[int, ...]
    batch: int
    classes: int  # with background
    features: list[int]
    channels: int = 1
    spacing: tuple[float, ...] | None = None  # None: 1 mm
    strides: tuple[tuple[int, ...], ...] | None = None
    kernels: tuple[tuple[int, ...], ...] | None = None

    @property
    def all_strides(self) -> list[list[int]]:
        dims = len(self.patch)
        halved = [[1] * dims] + [[2] * dims] * (len(self.features) - 1)
        return halved if self.strides is None else [list(stride) for stride in self.strides]

    @property
    def tokens(self) -> int:
        """Voxels at the bottleneck."""
        total = [math.prod(axis) for axis in zip(*self.all_strides, strict=True)]
        return math.prod(-(-size // stride) for size, stride in zip(self.patch, total, strict=True))


FLAT, CUBE = (1, 2, 2), (2, 2, 2)
PLANS = {
    "malc": Plan((96, 112, 112), 2, 15, [32, 64, 128, 256, 320]),  # 6 x 7 x 7 = 294 bottleneck voxels
    "hippocampus": Plan((40, 56, 40), 9, 3, [32, 64, 128, 256]),  # 5 x 7 x 5 = 175
    "acdc": Plan(
        (20, 256, 224), 4, 4, [32, 64, 128, 256, 320, 320], spacing=(5.0, 1.5625, 1.5625),
        strides=((1, 1, 1), FLAT, CUBE, CUBE, FLAT, FLAT), kernels=((1, 3, 3), *[(3, 3, 3)] * 5),
    ),  # 5 x 8 x 7 = 280
    "idrid": Plan((768, 1152), 2, 5, [32, 64, 128, 256, 512, 512, 512, 512], 3),  # 6 x 9 = 54
    "reduced": Plan((32, 32, 32), 2, 3, [16, 32, 64, 128]),  # 64; wide enough for constant costs to matter less
    "small_2d": Plan((56, 40), 16, 3, [16, 32, 64, 128]),  # as small_plans.py makes them
    "tiny": Plan((16, 16, 24), 2, 3, [8, 16, 32]),  # 4 x 4 x 6 = 96; the tiny ones are for a look at the scripts on a CPU
    "tiny_2d": Plan((64, 96), 2, 3, [8, 16, 32], 3),
    "tiny_anisotropic": Plan(
        (8, 32, 32), 2, 3, [8, 16, 32], spacing=(5.0, 1.0, 1.0), strides=((1, 1, 1), FLAT, CUBE),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    ),
}  # fmt: skip
PLANS["malc_60"] = PLANS["malc"]._replace(classes=61)  # as many structures as whole-body or whole-brain labels have


def prepare_folders(folder: Path) -> None:
    """What a trainer asks of nnU-Net's folders, in a temporary place: a results folder, and a hint at the data's format."""
    os.environ |= {f"nnUNet_{kind}": str(folder / kind) for kind in ("raw", "preprocessed", "results")}
    os.environ.pop("nnUNet_wandb_enabled", None)
    data = folder / "preprocessed" / DATASET / "data"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()


def make_plans(plan: Plan) -> dict:
    """The part of an nnU-Net plans file that a trainer reads without data."""
    stages, dims = len(plan.features), len(plan.patch)
    network = {
        "n_stages": stages,
        "features_per_stage": plan.features,
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * stages if plan.kernels is None else [list(kernel) for kernel in plan.kernels],
        "strides": plan.all_strides,
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "data",
        "batch_size": plan.batch,
        "patch_size": list(plan.patch),
        "spacing": list(plan.spacing or [1.0] * dims),
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"benchmark": configuration},
        "continue_training": False,
    }


def make_batch(plan: Plan, device: torch.device) -> dict:
    """Noise, another domain's noise, and random labels in half of the patch, of the shapes nnU-Net's loader gives: targets for
    each output, the largest first."""
    generator = torch.Generator().manual_seed(0)
    data, unlabelled = (torch.randn(plan.batch, plan.channels, *plan.patch, generator=generator) for _ in range(2))
    target = torch.randint(0, plan.classes, (plan.batch, 1, *plan.patch), generator=generator).float()
    target[..., plan.patch[-1] // 2 :] = 0  # GRCSF's autoencoder learns where nothing is labelled
    targets, total = [], [1] * len(plan.patch)
    for stride in plan.all_strides[:-1]:
        total = [t * s for t, s in zip(total, stride, strict=True)]
        targets.append(target[(..., *[slice(None, None, step) for step in total])].contiguous().to(device))
    return {"data": data.to(device), "unlabelled": (2 * unlabelled + 1).to(device), "target": targets}


def make_trainer(trainer_class: type, plan: Plan, device: torch.device, compiled: bool = False) -> nnUNetTrainer:
    """An initialised trainer, as in its last epoch: GLUA's alignment and self-training have their full weight."""
    labels = {f"class{number}" if number else "background": number for number in range(plan.classes)}
    channels = {str(number): "MRI" for number in range(plan.channels)}
    dataset = {"channel_names": channels, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(make_plans(plan), "benchmark", 0, dataset, device)
        trainer._do_i_compile = lambda: compiled  # nnU-Net itself asks the environment, and never compiles on the CPU
        trainer.initialize()
    trainer.network.train()
    trainer.current_epoch = trainer.num_epochs - 1
    if getattr(trainer, "alignment_of_features", None) is not None:
        trainer.alignment_of_features.weight = trainer.alignment_weights[1]
    if getattr(trainer, "inversion_only", False):
        trainer.inverted = torch.ones(plan.channels, dtype=torch.bool, device=device)  # else measured on cases
    return trainer


def stage_step(trainer: nnUNetTrainer, batch: dict) -> tuple[str, Callable[[], object]] | None:
    """Name and step of the trainer's stage before the segmenter, begun; None if it has none."""
    if not isinstance(trainer, PluginTrainer):
        return None
    if isinstance(trainer, trainers.nnUNetTrainerGLUA):  # in the place of what `nnunet_l2g adapt` writes
        trainer.target = AdaptedTarget("Dataset998_Target", Path(), [], [], [])
    stages = trainer.stages()
    if not stages:
        return None
    stages[0].begin()
    stages[0].module.train()
    return stages[0].name, lambda: stages[0].train_step(batch)
