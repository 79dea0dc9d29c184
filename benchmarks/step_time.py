"""What do an optimiser step and a prediction cost beside vanilla nnU-Net: seconds, memory, parameters?

python benchmarks/step_time.py --plan malc --compile [-tr TRAINER ...] [-o step_time.json]

Every network trains in its own trainer by nnU-Net's `train_step`: forward, loss with deep supervision and auxiliary losses,
backward, clipping at 12, SGD and the update of the codebook, with AMP and gradient scaling on CUDA. GLUA translates,
encodes the batch of the target and aligns it with full weight. The step of a pretraining stage has its own row:
"nnUNetTrainerGLUA, translation", "nnUNetTrainerGRCSF, autoencoder". Its ratio is to vanilla's step, too. The batch is one
fixed random batch on the device, so data loading does not count. Real epochs can be bound by augmentation on the CPU and
then differ less.

The networks take turns: each round times every network and starts with another one, so that a change of the machine's speed
affects all. The table has the median of a network's steps in seconds and its ratio to vanilla, the median over rounds of
the ratio of the round's medians. Memory in MiB is on CUDA the peak that torch allocated for this network and its batch
after the warm-up, and on the CPU what the backward keeps (unless compiled). A prediction is one forward of one patch in
eval mode without deep supervision, not compiled, as in nnU-Net's sliding window.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fixed_plans import PLANS, Plan, make_batch, make_trainer, prepare_folders, stage_step
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import MIB, choose_device, conditions, peak_bytes, positive, ratios, seconds, take_turns, write_json

from nnunet_l2g import trainers

METHODS = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
VANILLA = nnUNetTrainer.__name__


class Timed(NamedTuple):
    """A trainer, the step of it that is timed, and the bytes of one step (None: not measured)."""

    trainer: nnUNetTrainer
    step: Callable[[], object]
    memory: int | None


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train
    plan = PLANS[args.plan]
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        batch = make_batch(plan, device)
        timed: dict[str, Timed] = {}
        for trainer_class in (nnUNetTrainer, *(getattr(trainers, name) for name in args.trainers)):
            for stage in (False, True):
                print(f"{trainer_class.__name__}: building, {args.warmup} steps of warm-up", file=sys.stderr)
                timed |= build_and_warm_up(trainer_class, plan, batch, device, compiled, args.warmup, stage)
        times = take_turns({name: one.step for name, one in timed.items()}, device, args.rounds, args.steps)
        networks = {name: one.trainer for name, one in timed.items() if ", " not in name}
        for trainer in networks.values():
            trainer.network.eval()
            trainer.set_deep_supervision_enabled(False)
        calls = {name: lambda trainer=trainer: predict(trainer, batch["data"][:1]) for name, trainer in networks.items()}
        for call in calls.values():
            seconds(call, device)  # warms up
        predictions = take_turns(calls, device, args.rounds, args.steps)
    result = conditions(device) | {
        "plan": args.plan,
        "patch": list(plan.patch),
        "batch": plan.batch,
        "classes": plan.classes,
        "channels": plan.channels,
        "features": plan.features,
        "tokens": plan.tokens,
        "compile": compiled,
        "amp": device.type == "cuda",
        "memory": "peak allocated" if device.type == "cuda" else "kept for the backward",
        "warmup_steps": args.warmup,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "networks": {name: summarise(name, timed, times, predictions) for name in timed},
    }
    print(format_table(result))
    write_json(result, args.output)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="hippocampus", help="default: %(default)s")
    parser.add_argument(
        "-tr", dest="trainers", nargs="+", choices=trainers.__all__, metavar="TRAINER", default=METHODS,
        help="default: L2GNet, GRCSF and GLUA",
    )  # fmt: skip
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


def build_and_warm_up(
    trainer_class: type, plan: Plan, batch: dict, device: torch.device, compiled: bool, warmup: int, stage: bool
) -> dict[str, Timed]:
    """The trainer, ready to time, by its name; its stage's step instead with `stage`, nothing if it has none."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    trainer = make_trainer(trainer_class, plan, device, compiled)
    name, step = trainer_class.__name__, lambda: trainer.train_step(batch)
    if stage:
        found = stage_step(trainer, batch)
        if found is None:
            return {}
        name, step = f"{name}, {found[0]}", found[1]
    for _ in range(warmup):
        step()
    if device.type != "cuda" and compiled:
        return {name: Timed(trainer, step, None)}
    modules = [trainer.network, getattr(trainer, "translator", None)]
    memory = peak_bytes(step, device, [p for module in modules if module is not None for p in module.parameters()])
    if device.type == "cuda":
        tensors = [batch["data"], *batch["target"]]
        memory += sum(x.numel() * x.element_size() for x in tensors) - before
    return {name: Timed(trainer, step, memory)}


@torch.no_grad()
def predict(trainer: nnUNetTrainer, x: torch.Tensor) -> torch.Tensor:
    """One patch through the uncompiled network."""
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    with torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
        return network(x)


def summarise(name: str, timed: dict[str, Timed], times: dict, predictions: dict) -> dict:
    memory, vanilla = timed[name].memory, timed[VANILLA].memory
    return {
        **ratios(name, times, VANILLA),
        "prediction": ratios(name, predictions, VANILLA) if name in predictions else None,
        "memory_mib": None if memory is None else round(memory / MIB, 2),
        "memory_ratio": None if memory is None else round(memory / vanilla, 4),
        "parameters": sum(parameter.numel() for parameter in timed[name].trainer.network.parameters()),
    }


def format_table(result: dict) -> str:
    shape = "x".join(map(str, result["patch"]))
    lines = [
        f"{result['plan']}: patch {shape}, batch {result['batch']}, {result['tokens']} tokens, "
        f"compile {'on' if result['compile'] else 'off'}, AMP {'on' if result['amp'] else 'off'}, {result['device']}; "
        f"memory: {result['memory']}",
        f"{'trainer':<34}{'s/step':>10}{'ratio':>8}{'range':>16}{'MiB':>10}{'ratio':>8}{'parameters':>12}{'predict':>9}{'ratio':>8}",
    ]
    for name, network in result["networks"].items():
        low, high = network["ratio_range"]
        memory = "n/a" if network["memory_mib"] is None else f"{network['memory_mib']:.1f}"
        ratio = "n/a" if network["memory_ratio"] is None else f"{network['memory_ratio']:.3f}"
        prediction = network["prediction"]
        predicted = f"{prediction['median_seconds']:>9.4f}{prediction['ratio_to_vanilla']:>8.3f}" if prediction else ""
        lines.append(
            f"{name:<34}{network['median_seconds']:>10.4f}{network['ratio_to_vanilla']:>8.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{memory:>10}{ratio:>8}{network['parameters']:>12,}{predicted}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
