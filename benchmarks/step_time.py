"""What an optimiser step of L2GNet costs beside vanilla nnU-Net's: seconds, peak memory, parameters.

python benchmarks/step_time.py --plan malc --compile [-o step_time.json]

Every network trains under its own trainer, by nnU-Net's `train_step`: forward, Dice and cross-entropy with deep supervision
(and our commitment loss), backward, clipping at 12, SGD with the codebook's update after it, under AMP with gradient scaling
on CUDA. The batch is one fixed random batch, already on the device, so no data loading is in the numbers: real epochs can
be bound by augmentation on the CPU and then show less of a difference.

The networks take turns: each round times every network, starting with another one each time, so that a drift of the machine
meets all. Reported: the median of a network's steps in seconds, and its ratio to vanilla, the median over rounds of the
ratio of the round's medians. Peak memory (CUDA only) is what torch allocated for this network alone, its batch included,
after the warm-up, in MiB. The k-means that places codes and references (after steps 1 and 50 of a training) falls out of the
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
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import choose_device, conditions, seconds, write_json

from nnunet_l2g import trainers

# As nnU-Net 2.8 plans them (tiny: for a look at the script itself): patch, batch, classes with background, features
PLANS = {
    "malc": ((96, 112, 112), 2, 15, [32, 64, 128, 256, 320]),  # 6 x 7 x 7 = 294 tokens
    "hippocampus": ((40, 56, 40), 9, 3, [32, 64, 128, 256]),  # 5 x 7 x 5 = 175 tokens
    "tiny": ((16, 16, 24), 2, 3, [8, 16, 32]),  # 4 x 4 x 6 = 96 tokens
}
VANILLA = nnUNetTrainer
NETWORKS = (VANILLA, *(getattr(trainers, name) for name in trainers.__all__))
MIB = 2**20


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train
    patch, batch_size, classes, features = PLANS[args.plan]
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        batch = make_batch(patch, batch_size, classes, len(features) - 1, device)
        made, memory = {}, {}
        for trainer_class in NETWORKS:
            name = trainer_class.__name__
            print(f"{name}: building, {args.warmup} steps of warm-up", file=sys.stderr)
            made[name], memory[name] = build_and_warm_up(trainer_class, args.plan, batch, device, compiled, args.warmup)
        times = measure(made, batch, device, args.rounds, args.steps)
    result = conditions(device) | {
        "plan": args.plan,
        "patch": list(patch),
        "batch": batch_size,
        "classes": classes,
        "features": features,
        "tokens": math.prod(bottleneck(patch, features)),
        "compile": compiled,
        "amp": device.type == "cuda",
        "warmup_steps": args.warmup,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "networks": {name: summarise(trainer, times, memory) for name, trainer in made.items()},
    }
    print(format_table(result))
    write_json(result, args.output)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="hippocampus", help="default: %(default)s")
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
    patch, batch_size, _, features = PLANS[plan]
    stages = len(features)
    network = {
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
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
        "configurations": {"3d_fullres": configuration},
        "continue_training": False,
    }


def make_batch(patch: tuple[int, ...], size: int, classes: int, scales: int, device: torch.device) -> dict:
    """Noise and random labels, of the shapes nnU-Net's loader gives: targets for each output, the largest first."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(size, 1, *patch, generator=generator)
    target = torch.randint(0, classes, (size, 1, *patch), generator=generator).float()
    targets = [target[:, :, :: 2**scale, :: 2**scale, :: 2**scale].contiguous() for scale in range(scales)]
    return {"data": data.to(device), "target": [one.to(device) for one in targets]}


def build_and_warm_up(
    trainer_class: type, plan: str, batch: dict, device: torch.device, compiled: bool, warmup: int
) -> tuple[nnUNetTrainer, int | None]:
    """The trainer, ready to time, and on CUDA the peak bytes of one more step, less what stood there before it was built."""
    labels = {f"class{number}" if number else "background": number for number in range(PLANS[plan][2])}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(make_plans(plan), "3d_fullres", 0, dataset, device)
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
    made: dict[str, nnUNetTrainer], batch: dict, device: torch.device, rounds: int, steps: int
) -> dict[str, list[list[float]]]:
    """Seconds of each step, by network and round."""
    times = {name: [] for name in made}
    names = list(made)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append([seconds(lambda name=name: made[name].train_step(batch), device) for _ in range(steps)])
    return times


def summarise(trainer: nnUNetTrainer, times: dict[str, list[list[float]]], memory: dict[str, int | None]) -> dict:
    name = type(trainer).__name__
    medians = {key: [statistics.median(steps) for steps in times[key]] for key in (name, VANILLA.__name__)}
    ratios = [ours / vanilla for ours, vanilla in zip(medians[name], medians[VANILLA.__name__], strict=True)]
    peak = memory[name]
    return {
        "median_seconds": round(statistics.median(step for steps in times[name] for step in steps), 6),
        "round_medians_seconds": [round(median, 6) for median in medians[name]],
        "ratio_to_vanilla": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "peak_memory_mib": None if peak is None else round(peak / MIB, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
    }


def format_table(result: dict) -> str:
    shape = "x".join(map(str, result["patch"]))
    lines = [
        f"{result['plan']}: patch {shape}, batch {result['batch']}, {result['tokens']} tokens, "
        f"compile {'on' if result['compile'] else 'off'}, AMP {'on' if result['amp'] else 'off'}, {result['device']}",
        f"{'trainer':<34}{'s/step':>10}{'ratio':>8}{'range':>16}{'peak MiB':>10}{'parameters':>12}",
    ]
    for name, network in result["networks"].items():
        low, high = network["ratio_range"]
        peak = "n/a" if network["peak_memory_mib"] is None else f"{network['peak_memory_mib']:.0f}"
        lines.append(
            f"{name:<34}{network['median_seconds']:>10.4f}{network['ratio_to_vanilla']:>8.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{peak:>10}{network['parameters']:>12,}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
