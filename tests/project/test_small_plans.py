"""benchmarks/small_plans.py: quick enough by its own measure, nnU-Net's plan in all else, and a network that fits its patch."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_model import make_plans

SPEC = importlib.util.spec_from_file_location("small_plans", Path(__file__).parents[2] / "benchmarks" / "small_plans.py")
small_plans = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small_plans)
PER_VOXEL = 1e-6  # s of an iteration


def planned(patch, batch, stages=6):
    plans = make_plans(patch, (1.0,) * len(patch))
    (configuration,) = plans["configurations"].values()
    configuration["batch_size"] = batch
    network, dims = configuration["architecture"]["arch_kwargs"], len(patch)
    network |= {"n_stages": stages, "features_per_stage": [min(32 * 2**i, 512) for i in range(stages)]}
    network |= {"strides": [[1] * dims, *[[2] * dims] * (stages - 1)], "kernel_sizes": [[3] * dims] * stages}
    network |= {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    return plans


@pytest.fixture
def measured(monkeypatch):
    """What was measured; a batch takes as long as it has voxels."""
    tried = []

    def seconds(plans, name, configuration, description):
        tried.append((configuration["batch_size"], tuple(configuration["patch_size"])))
        return PER_VOXEL * configuration["batch_size"] * math.prod(configuration["patch_size"])

    monkeypatch.setattr(small_plans, "seconds_per_iteration", seconds)
    return tried


@pytest.mark.parametrize(
    ("patch", "batch", "limit"),
    [((256, 256), 49, 1000.0), ((256, 256), 49, 90.0), ((256, 256), 49, 5.0), ((96, 96, 96), 2, 90.0), ((256, 192), 2, 4.0)],
)
def test_fewer_images_then_smaller_ones_in_a_network_that_fits(measured, patch, batch, limit):
    name = "2d" if len(patch) == 2 else "3d_fullres"
    plans = planned(patch, batch)
    small = small_plans.shrink(copy.deepcopy(plans), name, {}, limit)
    assert 250 * PER_VOXEL * small["batch_size"] * math.prod(small["patch_size"]) <= limit
    assert measured == sorted(measured, key=lambda tried: (-tried[0], -math.prod(tried[1])))
    if small["patch_size"] != list(patch):
        assert small["batch_size"] == 2
    before, after = (c["architecture"]["arch_kwargs"] for c in (plans["configurations"][name], small))
    stages = after["n_stages"]
    assert after["features_per_stage"] == [16, 32, 64, 128, 128, 128][:stages] and stages >= 3
    changed = {"n_stages", "features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage", "n_conv_per_stage_decoder"}
    assert all(after[key] == before[key] for key in before if key not in changed)
    kept = set(plans["configurations"][name]) - {"batch_size", "patch_size", "architecture"}
    assert all(small[key] == plans["configurations"][name][key] for key in kept)  # the data_identifier, too
    manager = PlansManager(plans | {"configurations": {name: small}}).get_configuration(name)
    network = get_network_from_plans(
        manager.network_arch_class_name, manager.network_arch_init_kwargs, manager.network_arch_init_kwargs_req_import, 1, 3,
        deep_supervision=False,
    )  # fmt: skip
    with torch.no_grad():
        lowest = network.encoder(torch.zeros(1, 1, *small["patch_size"]))[-1]
    assert min(lowest.shape[2:]) >= 4
    total = [math.prod(axis) for axis in zip(*after["strides"], strict=True)]
    assert all(size % stride == 0 for size, stride in zip(small["patch_size"], total, strict=True))


def test_what_cannot_be_quick_enough_is_said(measured):
    with pytest.raises(SystemExit, match=r"2d: 250 iterations of the smallest patch take \d+ s, more than 0 s"):
        small_plans.shrink(planned((256, 256), 2), "2d", {}, 0.01)
