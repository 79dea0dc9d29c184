"""What a training step costs: vanilla nnU-Net, L2GNet and its twins on the same fixed input, in turn.

python benchmarks/step_time.py --plan malc [--device cuda] [--no-compile] [--rounds 20] [-o step_time.json]

A step is forward, nnU-Net's loss with deep supervision, backward, clipping, SGD and, for ours, the codebook's update; on a GPU
with AMP and gradient scaling. Data are on the device already. The networks take turns, a round has one step of each; reported
are the median step [s], the median of the ratios to vanilla within a round, peak allocated memory [MiB, GPU only] and
parameters.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_l2g import trainers
from nnunet_l2g.architectures import L2GNet
from nnunet_l2g.training.auxiliary import LossWithAuxiliary

# as nnU-Net 2.8.1 plans them: patch, batch, features, classes; strides 1, 2, 2, ...
PLANS = {
    "malc": ((96, 112, 112), 2, (32, 64, 128, 256, 320), 15),
    "hippocampus": ((40, 56, 40), 9, (32, 64, 128, 256), 3),
    "tiny": ((16, 16, 16), 2, (8, 16, 32), 3),
}
NETWORKS = ["vanilla", *trainers.__all__]


def make_network(name: str, plan: str) -> nn.Module:
    """vanilla or one of our trainers' networks, for a plan; same seed, same backbone."""
    _, _, features, classes = PLANS[plan]
    stages = len(features)
    torch.manual_seed(0)
    backbone = PlainConvUNet(
        1, stages, features, nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, classes, 2, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    backbone.apply(backbone.initialize)
    return backbone if name == "vanilla" else L2GNet(backbone, **getattr(trainers, name).network_settings)


class Step:
    """One network with its optimiser and loss; calling it makes a training step and returns its seconds."""

    def __init__(self, name: str, plan: str, device: torch.device, compiled: bool):
        patch, batch, features, classes = PLANS[plan]
        network = make_network(name, plan).to(device).train()
        self.name, self.device = name, device
        self.parameters = sum(p.numel() for p in network.parameters())
        self.after_step = getattr(network, "after_step", lambda: None)
        self.forward = torch.compile(network) if compiled else network
        self.weights = list(network.parameters())
        self.optimizer = torch.optim.SGD(self.weights, 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
        self.scaler = torch.amp.GradScaler("cuda", enabled=device.type == "cuda")
        loss = DC_and_CE_loss(
            {"batch_dice": False, "smooth": 1e-5, "do_bg": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
        )
        if compiled:
            loss.dc = torch.compile(loss.dc)
        scales = len(features) - 1
        factors = np.array([0.5**i for i in range(scales)])
        factors[-1] = 0  # nnU-Net gives the lowest scale no weight
        self.loss = DeepSupervisionWrapper(loss, factors / factors.sum())
        if name != "vanilla":
            self.loss = LossWithAuxiliary(self.loss, network)
        generator = torch.Generator().manual_seed(1)
        self.data = torch.randn(batch, 1, *patch, generator=generator).to(device)
        full = torch.randint(0, classes, (batch, 1, *patch), generator=generator).float()
        self.target = [full[(..., *[slice(None, None, 2**i)] * 3)].to(device) for i in range(scales)]

    def __call__(self) -> float:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if cuda else nullcontext():
            loss = self.loss(self.forward(self.data), self.target)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, 12)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after_step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def peak_memory(name: str, plan: str, device: torch.device, compiled: bool) -> float | None:
    """MiB allocated at most during three steps of this network alone; None on the CPU."""
    if device.type != "cuda":
        return None
    step = Step(name, plan, device, compiled)
    step()  # compiles, allocates workspaces
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() / 2**20
    del step
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    return peak


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="malc")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on the GPU only, as nnU-Net")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    names = ["vanilla", *(name for name in args.networks if name != "vanilla")]
    memory = {name: peak_memory(name, args.plan, device, compiled) for name in names}
    steps = {name: Step(name, args.plan, device, compiled) for name in names}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(args.rounds)]
    rows = {
        name: {
            "step_s": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r["vanilla"] for r in rounds),
            "peak_MiB": memory[name],
            "memory_ratio": memory[name] / memory["vanilla"] if memory[name] else None,
            "parameters": steps[name].parameters,
        }
        for name in names
    }
    report = {
        "command": "python benchmarks/step_time.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "plan": args.plan,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "compile": compiled,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "networks": rows,
    }
    print(f"{'network':32} {'step [s]':>9} {'ratio':>7} {'MiB':>9} {'ratio':>7} {'parameters':>12}")
    for name, row in rows.items():
        mib = "n/a" if row["peak_MiB"] is None else f"{row['peak_MiB']:.0f}"
        ratio = "n/a" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
        print(f"{name:32} {row['step_s']:9.4f} {row['ratio']:7.3f} {mib:>9} {ratio:>7} {row['parameters']:12,}")
    if args.output:
        with open(args.output, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
    return report


if __name__ == "__main__":
    main()
