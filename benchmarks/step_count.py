"""What a training step takes on plans of real size, counted and not measured: operations, and what the backward keeps.

python benchmarks/step_count.py [--plan malc malc_60 acdc idrid] [-o step_count.json]

Networks run on torch's meta device, so this needs neither a GPU nor minutes. Operations are those of convolutions and matrix
products (torch.utils.flop_counter) in forward and backward of a batch, and in the forward of one patch, as prediction makes
it. Bytes are of distinct tensors that the backward keeps, parameters left out, attention as fused kernels keep it, all in
float32: with AMP the convolutions' halve, and what stays in float32 weighs about twice its share. GLUA is the segmenter with
the target's batch; operations count its translation of 0.7 of the source samples, too. Normalisations, Sinkhorn's iterations
and the optimiser are no matrix products and are not counted: seconds need a GPU.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from fixed_plans import PLANS, Plan, make_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from timing import MIB, conditions, write_json
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_l2g import architectures, trainers
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of

NETWORKS = ("L2GNet", "GRCSF", "GLUA")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["malc", "malc_60", "acdc", "idrid"]
    parser.add_argument("--plan", choices=PLANS, nargs="+", default=default, metavar="PLAN", help="default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    plans = {}
    for name in args.plan:
        rows = plans[name] = count_plan(PLANS[name])
        for network, row in rows.items():
            short = network.removeprefix("nnUNetTrainer")
            print(f"{name:<12}{short:<24}{row['gflop']:>12.1f} GFLOP{row['gflop_ratio']:>8.3f}", end="")
            print(f"{row['memory_mib']:>12.1f} MiB{row['memory_ratio']:>8.3f}", end="")
            print(f"  forward{row['forward_gflop']:>10.1f} GFLOP{row['forward_ratio']:>8.3f}", flush=True)
    write_json(conditions(torch.device("cpu")) | {"plans": plans}, args.output)
    return 0


def count_plan(plan: Plan) -> dict[str, dict]:
    """Operations and bytes by network, the plain one first."""
    configuration = PlansManager(make_plans(plan)).get_configuration("benchmark")
    data = torch.empty(plan.batch, plan.channels, *plan.patch, device="meta")
    made = {"vanilla": architectures.GLUA.from_plans(configuration, plan.channels, plan.classes)}  # without a target: plain
    made |= {name: getattr(architectures, name).from_plans(configuration, plan.channels, plan.classes) for name in NETWORKS}
    rows: dict[str, dict] = {}
    for name, network in made.items():
        network.to("meta").train()
        gflop, kept = count(lambda network=network, name=name: training_loss(network, data, name == "GLUA"), network)
        row = {"gflop": gflop, "memory_mib": round(sum(kept.values()), 1)}
        row["memory_mib_by_part"] = {part: round(size, 1) for part, size in kept.items()}
        if name == "GLUA":
            row["translation_gflop"] = translation(plan, data)
            row["gflop"] += row["translation_gflop"]
        row["forward_gflop"] = count_forward(network, data[:1])
        first = rows.get("vanilla", row)
        ratios = {"gflop": "gflop", "memory": "memory_mib", "forward": "forward_gflop"}
        row |= {f"{key}_ratio": round(row[full] / first[full], 4) for key, full in ratios.items()}
        rows[name] = row
    return rows


def training_loss(network: nn.Module, data: torch.Tensor, with_target: bool) -> torch.Tensor:
    """A forward, and a loss that needs all outputs, squared and softmaxed as Dice and cross-entropy do."""
    if with_target:
        network.unlabelled = torch.empty_like(data)
    loss = sum(output.softmax(1).square().mean() for output in network(data))
    if with_target:
        loss = loss + network.auxiliary_outputs.target_features.square().mean()
    auxiliary = network.auxiliary_loss(torch.empty_like(data[:, :1]))
    return loss if auxiliary is None else loss + auxiliary


def translation(plan: Plan, data: torch.Tensor) -> float:
    """GFLOP of translating the share of the source samples that GLUA translates."""
    translator = Translator(plan.channels, len(plan.patch), halvings=halvings_of(plan.patch)).to("meta").eval()
    styles = torch.empty(plan.batch, translator.target_styles.shape[1], device="meta")
    with FlopCounterMode(display=False) as counter:
        translator.translate(data, styles)
    return round(trainers.nnUNetTrainerGLUA.translated_share * gflop_of(counter), 3)


class Fused(torch.autograd.Function):
    """Attention (B, heads, n, d) that keeps what fused kernels keep: its input and output, no n x n matrix. No numbers."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def count(forward: Callable[[], torch.Tensor], network: nn.Module) -> tuple[float, dict[str, float]]:
    """GFLOP of forward and backward, and MiB kept after the forward, by part of the network ("loss": outside of it)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward().backward()
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: list[weakref.ref[Kept]] = []  # what no graph holds any more is gone from it
    inside: list[str] = []
    for name, module in network.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, part=name.split(".")[0]: inside.append(part))
            module.register_forward_hook(lambda *_: inside.pop() and None)

    def pack(tensor: torch.Tensor) -> Kept:
        saved = Kept(tensor.detach(), inside[-1] if inside else "loss")
        kept.append(weakref.ref(saved))
        return saved

    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: Fused.apply(q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor), attention:
        loss = forward()  # what it needs for its gradient lives as long as the loss
    sizes: dict[int, tuple[str, int]] = {}  # part and bytes, by storage
    for saved in filter(None, (reference() for reference in kept)):
        storage = saved.tensor.untyped_storage()
        if storage._cdata not in parameters:
            sizes.setdefault(storage._cdata, (saved.part, storage.nbytes()))
    parts: dict[str, float] = {}
    for part, size in sizes.values():
        parts[part] = parts.get(part, 0.0) + size / MIB
    del loss
    return gflop_of(counter), parts


@dataclass(eq=False)
class Kept:
    """A tensor that a graph has saved, and the part of the network that saved it."""

    tensor: torch.Tensor
    part: str


def count_forward(network: nn.Module, data: torch.Tensor) -> float:
    """GFLOP of predicting one patch."""
    network.eval().decoder.deep_supervision = False
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(data)
    return gflop_of(counter)


def gflop_of(counter: FlopCounterMode) -> float:
    return round(counter.get_total_flops() / 1e9, 3)


if __name__ == "__main__":
    sys.exit(main())
