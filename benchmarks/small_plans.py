"""Writes smaller copies of nnU-Net's plans, with which several trainings take hours on a CPU.

python benchmarks/small_plans.py 4 -c 2d
nnUNetv2_train 4 2d 0 -tr nnUNetTrainerL2GNet_20epochs -p nnUNetPlansSmall -device cpu

Writes nnUNetPlansSmall.json beside the original plans: 16 to 128 features, and first a smaller batch, then a smaller patch, so
that 250 iterations take at most 90 seconds of one core (measured here, with nnU-Net's trainer and loader). For a smaller patch,
nnU-Net's own rule decides how often it is pooled. Everything else is as planned, and the preprocessed data are shared.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import sys
import tempfile
import time

import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.compare.models import dataset_name, nnunet_folder
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import write_json

ITERATIONS = 250  # of an epoch of nnU-Net's
FEATURES, MOST_FEATURES = 16, 128
LEAST_BATCH, LEAST_EDGE, LEAST_STAGES = 2, 4, 3  # nnU-Net's own batch and lowest feature map; its loss is NaN with two stages


def main() -> None:
    args = parse_arguments()
    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in the thread that trains
    torch.set_num_threads(1)
    dataset = dataset_name(args.dataset)
    folder = nnunet_folder("preprocessed") / dataset
    plans, description = (json.loads((folder / f"{name}.json").read_text()) for name in (args.plans, "dataset"))
    small = copy.deepcopy(plans) | {"plans_name": f"{args.plans}Small"}
    found = {}
    for name in args.configurations:
        if name not in plans["configurations"]:
            sys.exit(f"-c {name}: {args.plans} has {', '.join(plans['configurations'])}")
        data = PlansManager(plans).get_configuration(name).data_identifier
        if not (folder / data).is_dir():
            sys.exit(f"-c {name}: {folder / data} is missing; first nnUNetv2_preprocess -d {args.dataset} -c {name}")
        found[name] = shrink(small, name, description, args.seconds)
    small["configurations"] = found
    file = folder / f"{small['plans_name']}.json"
    write_json(file, small)
    first = f"{dataset} {args.configurations[0]} 0 -p {small['plans_name']}"
    print(f"{file}\nnnUNetv2_train {first} -tr nnUNetTrainer_20epochs -device cpu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="planned and preprocessed")
    parser.add_argument("-c", dest="configurations", nargs="+", required=True, metavar="CONFIGURATION")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=90.0, help=f"of {ITERATIONS} iterations on one core; default: 90")
    return parser.parse_args()


def shrink(plans: dict, name: str, description: dict, limit: float) -> dict:
    """The configuration called `name`, made small. Exits with a sentence if even the smallest patch takes too long."""
    configuration = PlansManager(plans).get_configuration(name).configuration  # with what it inherits
    features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [
        min(FEATURES * 2**stage, MOST_FEATURES) for stage in range(len(features))
    ]
    while True:
        seconds = ITERATIONS * seconds_per_iteration(plans, name, configuration, description)
        print(f"{name}: patch {configuration['patch_size']}, batch {configuration['batch_size']}: {seconds:.0f} s", flush=True)
        if seconds <= limit:
            return configuration
        if not make_smaller(configuration, 0.95 * limit / seconds):
            sys.exit(f"{name}: {ITERATIONS} iterations of the smallest patch take {seconds:.0f} s, more than {limit:.0f} s")


def seconds_per_iteration(plans: dict, name: str, configuration: dict, description: dict, count: int = 5) -> float:
    """CPU time of loading, augmenting and training one batch in this thread, which does not depend on other programs."""
    plans = copy.deepcopy(plans) | {"configurations": {name: copy.deepcopy(configuration)}, "continue_training": False}
    with tempfile.TemporaryDirectory() as results, contextlib.redirect_stdout(io.StringIO()):
        os.environ["nnUNet_results"] = results
        trainer = nnUNetTrainer(plans, name, "all", description, torch.device("cpu"))
        trainer.on_train_start()
        for iteration in range(count + 1):
            if iteration == 1:  # the first one allocates
                begin = time.process_time()
            trainer.train_step(next(trainer.dataloader_train))
        return (time.process_time() - begin) / count


def make_smaller(configuration: dict, factor: float) -> bool:
    """Reduces the voxels of a batch by `factor`: fewer images, at least two, then smaller ones. False if it is not possible."""
    batch, patch = configuration["batch_size"], list(configuration["patch_size"])
    if batch > LEAST_BATCH:
        configuration["batch_size"] = max(LEAST_BATCH, int(batch * factor))
        return True
    padded = patch
    while math.prod(padded) >= math.prod(patch):  # nnU-Net's rule pads to what the pooling divides
        wanted = [max(2 * LEAST_EDGE, int(size * factor ** (1 / len(patch)))) for size in patch]
        _, strides, kernels, padded, _ = get_pool_and_conv_props(configuration["spacing"], wanted, LEAST_EDGE, 999999)
        padded, factor = [int(size) for size in padded], 0.9 * factor
        if len(strides) < LEAST_STAGES:
            return False
    configuration["patch_size"] = padded
    network = configuration["architecture"]["arch_kwargs"]
    stages = len(strides)
    network |= {"n_stages": stages, "strides": strides, "kernel_sizes": kernels}
    for key in ("features_per_stage", "n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        if key in network:
            network[key] = network[key][: stages - int(key.endswith("decoder"))]
    return True


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
