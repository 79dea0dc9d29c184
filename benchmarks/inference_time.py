"""What does the prediction of a whole case cost beside vanilla nnU-Net: seconds and memory of the sliding window?

python benchmarks/inference_time.py --plan malc [-tr TRAINER ...] [-o inference_time.json]

One synthetic case, by default 1.5 times the patch on each axis (2D plans: one slice), through nnUNetPredictor's sliding window
as nnUNetv2_predict runs it: overlap of one half, Gaussian weights, mirroring on all axes unless --no-mirroring, AMP on CUDA,
not compiled. Reading, resampling and writing do not count. Networks take turns; the ratio is the median over rounds of the
ratio to vanilla in the same round. Memory is measured on CUDA only: the peak above what was allocated before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from fixed_plans import PLANS, Plan, make_trainer, prepare_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import MIB, choose_device, conditions, peak_bytes, positive, ratios, seconds, take_turns, write_json

from nnunet_l2g import trainers

METHODS = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
VANILLA = nnUNetTrainer.__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="malc", help="default: %(default)s")
    parser.add_argument(
        "-tr", dest="trainers", nargs="+", choices=trainers.__all__, metavar="TRAINER", default=METHODS,
        help="default: L2GNet, GRCSF and GLUA",
    )  # fmt: skip
    parser.add_argument("--size", type=positive, nargs="+", metavar="VOXELS", help="of the case (default: 1.5 patches)")
    parser.add_argument("--mirroring", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, plan = choose_device(args.device), PLANS[args.plan]
    size = args.size or [3 * voxels // 2 for voxels in plan.patch]
    if len(size) != len(plan.patch):
        parser.error(f"--size has {len(size)} numbers, expected {len(plan.patch)} for the plan {args.plan}")
    shape = [plan.channels, *[1] * (3 - len(size)), *size]
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        classes = (nnUNetTrainer, *(getattr(trainers, name) for name in args.trainers))
        calls = {kind.__name__: make_prediction(kind, plan, image, device, args.mirroring) for kind in classes}
        memory = {name: measure_memory(call, device) for name, call in calls.items()}
        times = take_turns(calls, device, args.rounds)
    rows = {
        name: ratios(name, times, VANILLA)
        | {"memory_mib": memory[name], "memory_ratio": memory[name] and round(memory[name] / memory[VANILLA], 4)}
        for name in calls
    }
    for name, row in rows.items():
        low, high = row["ratio_range"]
        print(f"{name:<34}{row['median_seconds']:>9.4f} s{row['ratio_to_vanilla']:>8.3f} ({low:.3f} to {high:.3f})")
    settings = {"plan": args.plan, "patch": list(plan.patch), "case": size, "mirroring": args.mirroring, "rounds": args.rounds}
    write_json(conditions(device) | settings | {"networks": rows}, args.output)
    return 0


def make_prediction(kind: type, plan: Plan, image: torch.Tensor, device: torch.device, mirroring: bool) -> Callable:
    """A call that predicts the case's logits."""
    trainer = make_trainer(kind, plan, device)
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(use_mirroring=mirroring, perform_everything_on_device=device.type == "cuda", device=device,
                                allow_tqdm=False)  # fmt: skip
    axes = tuple(range(len(plan.patch)))
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, kind.__name__, axes
    )

    def call() -> torch.Tensor:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            return predictor.predict_sliding_window_return_logits(image)

    return call


def measure_memory(call: Callable, device: torch.device) -> float | None:
    """MiB of one call after a first one that warms up."""
    seconds(call, device)
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    return round((peak_bytes(call, device) - before) / MIB, 1)


if __name__ == "__main__":
    sys.exit(main())
