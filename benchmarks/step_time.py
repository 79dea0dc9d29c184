"""What an optimiser step and a prediction cost with our trainers beside vanilla nnU-Net's: seconds, peak memory, parameters.

python benchmarks/step_time.py --plan malc --compile [-tr TRAINER ...] [-o step_time.json]

Every network trains under its own trainer, by nnU-Net's `train_step`: forward, its loss with deep supervision and auxiliary
losses, backward, clipping at 12, SGD with the codebook's update after it, under AMP with gradient scaling
on CUDA. The batch is one fixed random batch, already on the device, so no data loading is in the numbers: real epochs can
be bound by augmentation on the CPU and then show less of a difference.

The networks take turns: each round times every network, starting with another one each time, so that a drift of the machine
meets all. Reported: the median of a network's steps in seconds, and its ratio to vanilla, the median over rounds of the
ratio of the round's medians. Peak memory (CUDA only) is what torch allocated for this network alone, its batch included,
after the warm-up, in MiB. A prediction is one forward of one patch in eval mode without deep supervision and not compiled,
as nnU-Net's sliding window makes it. The k-means that places codes and references (after steps 1 and 50) falls out of the
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import choose_device, conditions, seconds, write_json

from nnunet_l2g import trainers


class Plan(NamedTuple):
    """As nnU-Net 2.8 plans it."""

    patch: tuple[int, ...]
    batch: int
    classes: int  # with background
    features: list[int]
    channels: int = 1
    trainers: tuple[str, ...] = tuple(name for name in trainers.__all__ if "L2GNet" in name)  # timed unless -tr says others


GRCSF = tuple(name for name in trainers.__all__ if "GRCSF" in name or name == "nnUNetTrainerDiceFocal")
PLANS = {
    "malc": Plan((96, 112, 112), 2, 15, [32, 64, 128, 256, 320]),  # 6 x 7 x 7 = 294 bottleneck voxels
    "hippocampus": Plan((40, 56, 40), 9, 3, [32, 64, 128, 256]),  # 5 x 7 x 5 = 175
    "idrid": Plan((768, 1152), 2, 5, [32, 64, 128, 256, 512, 512, 512, 512], 3, GRCSF),
    "tiny": Plan((16, 16, 24), 2, 3, [8, 16, 32]),  # 4 x 4 x 6 = 96; the tiny ones are for a look at the script itself
    "tiny_2d": Plan((64, 96), 2, 3, [8, 16, 32], 3, GRCSF),
}
VANILLA = nnUNetTrainer
MIB = 2**20


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train
    plan = PLANS[args.plan]
    networks = (VANILLA, *(getattr(trainers, name) for name in args.trainers or plan.trainers))
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        batch = make_batch(plan, device)
        made, memory = {}, {}
        for trainer_class in networks:
            name = trainer_class.__name__
            print(f"{name}: building, {args.warmup} steps of warm-up", file=sys.stderr)
            made[name], memory[name] = build_and_warm_up(trainer_class, args.plan, batch, device, compiled, args.warmup)
        times = measure(made, lambda trainer: trainer.train_step(batch), device, args.rounds, args.steps)
        for trainer in made.values():
            trainer.network.eval()
            trainer.set_deep_supervision_enabled(False)
        predictions = measure(made, lambda trainer: predict(trainer, batch["data"][:1]), device, args.rounds, args.steps)
    result = conditions(device) | {
        "plan": args.plan,
        "patch": list(plan.patch),
        "batch": plan.batch,
        "classes": plan.classes,
        "channels": plan.channels,
        "features": plan.features,
        "tokens": math.prod(bottleneck(plan.patch, plan.features)),
        "compile": compiled,
        "amp": device.type == "cuda",
        "warmup_steps": args.warmup,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "networks": {name: summarise(name, trainer, times, predictions, memory) for name, trainer in made.items()},
    }
    print(format_table(result))
    write_json(result, args.output)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="hippocampus", help="default: %(default)s")
    parser.add_argument("-tr", dest="trainers", nargs="+", choices=trainers.__all__, metavar="TRAINER", help="default: by plan")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile for network and Dice, as nnU-Net does (default: on for cuda, off on the CPU)",
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="per round and network; default: %(default)s")
    parser.add_argument("--warmup", type=positive, default=5, metavar="N", help="steps before; default: %(default)s")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's own; 1 where others use the CPU)"
    )
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 on")
    return int(text)


def prepare_folders(folder: Path) -> None:
    """What a trainer asks of nnU-Net's folders, in a temporary place: a results folder, and a hint at the data's format."""
    os.environ |= {f"nnUNet_{kind}": str(folder / kind) for kind in ("raw", "preprocessed", "results")}
    os.environ.pop("nnUNet_wandb_enabled", None)
    for plan in PLANS:
        data = folder / "preprocessed" / dataset_name(plan) / "data"
        data.mkdir(parents=True)
        (data / "case.b2nd").touch()


def dataset_name(plan: str) -> str:
    return f"Dataset999_{plan}"


def bottleneck(patch: tuple[int, ...], features: list[int]) -> list[int]:
    """Spatial shape after the plan's halvings."""
    return [-(-size // 2 ** (len(features) - 1)) for size in patch]


def make_plans(plan: str) -> dict:
    """The part of an nnU-Net plans file that a trainer reads without data."""
    patch, batch_size, _, features, *_ = PLANS[plan]
    stages, dims = len(features), len(patch)
    network = {
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * stages,
        "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
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
        "batch_size": batch_size,
        "patch_size": list(patch),
        "spacing": [1.0] * dims,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": dataset_name(plan),
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"benchmark": configuration},
        "continue_training": False,
    }


def make_batch(plan: Plan, device: torch.device) -> dict:
    """Noise and random labels, of the shapes nnU-Net's loader gives: targets for each output, the largest first."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(plan.batch, plan.channels, *plan.patch, generator=generator)
    target = torch.randint(0, plan.classes, (plan.batch, 1, *plan.patch), generator=generator).float()
    every = [
        (slice(None), slice(None), *[slice(None, None, 2**scale)] * len(plan.patch)) for scale in range(len(plan.features) - 1)
    ]
    targets = [target[scale].contiguous() for scale in every]
    return {"data": data.to(device), "target": [one.to(device) for one in targets]}


def build_and_warm_up(
    trainer_class: type, plan: str, batch: dict, device: torch.device, compiled: bool, warmup: int
) -> tuple[nnUNetTrainer, int | None]:
    """The trainer, ready to time, and on CUDA the peak bytes of one more step, less what stood there before it was built."""
    labels = {f"class{number}" if number else "background": number for number in range(PLANS[plan].classes)}
    channels = {str(number): "MRI" for number in range(PLANS[plan].channels)}
    dataset = {"channel_names": channels, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(make_plans(plan), "benchmark", 0, dataset, device)
        trainer._do_i_compile = lambda: compiled  # nnU-Net itself asks the environment, and never compiles on the CPU
        trainer.initialize()
    trainer.network.train()
    for _ in range(warmup):
        trainer.train_step(batch)
    if device.type != "cuda":
        return trainer, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(batch)
    torch.cuda.synchronize()
    tensors = [batch["data"], *batch["target"]]
    return trainer, torch.cuda.max_memory_allocated() - before + sum(x.numel() * x.element_size() for x in tensors)


def measure(
    made: dict[str, nnUNetTrainer], call: Callable, device: torch.device, rounds: int, steps: int
) -> dict[str, list[list[float]]]:
    """Seconds of each call(trainer), by network and round."""
    times = {name: [] for name in made}
    names = list(made)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append([seconds(lambda name=name: call(made[name]), device) for _ in range(steps)])
    return times


@torch.no_grad()
def predict(trainer: nnUNetTrainer, x: torch.Tensor) -> torch.Tensor:
    """One patch through the uncompiled network."""
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    with torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
        return network(x)


def summarise(name: str, trainer: nnUNetTrainer, times: dict, predictions: dict, memory: dict[str, int | None]) -> dict:
    peak = memory[name]
    return {
        **ratios(name, times),
        "prediction": ratios(name, predictions),
        "peak_memory_mib": None if peak is None else round(peak / MIB, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
    }


def ratios(name: str, times: dict[str, list[list[float]]]) -> dict:
    """Median seconds, and the ratio to vanilla by round."""
    medians = {key: [statistics.median(steps) for steps in times[key]] for key in (name, VANILLA.__name__)}
    ratios = [ours / vanilla for ours, vanilla in zip(medians[name], medians[VANILLA.__name__], strict=True)]
    return {
        "median_seconds": round(statistics.median(step for steps in times[name] for step in steps), 6),
        "round_medians_seconds": [round(median, 6) for median in medians[name]],
        "ratio_to_vanilla": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def format_table(result: dict) -> str:
    shape = "x".join(map(str, result["patch"]))
    lines = [
        f"{result['plan']}: patch {shape}, batch {result['batch']}, {result['tokens']} tokens, "
        f"compile {'on' if result['compile'] else 'off'}, AMP {'on' if result['amp'] else 'off'}, {result['device']}",
        f"{'trainer':<34}{'s/step':>10}{'ratio':>8}{'range':>16}{'peak MiB':>10}{'parameters':>12}{'predict':>9}{'ratio':>8}",
    ]
    for name, network in result["networks"].items():
        low, high = network["ratio_range"]
        peak = "n/a" if network["peak_memory_mib"] is None else f"{network['peak_memory_mib']:.0f}"
        lines.append(
            f"{name:<34}{network['median_seconds']:>10.4f}{network['ratio_to_vanilla']:>8.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{peak:>10}{network['parameters']:>12,}{network['prediction']['median_seconds']:>9.4f}"
            f"{network['prediction']['ratio_to_vanilla']:>8.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
