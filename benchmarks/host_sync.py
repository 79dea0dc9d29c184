"""How often does a training step make the CPU wait for the GPU? Steps of trainers and of their stages, and plain nnU-Net's.

python benchmarks/host_sync.py [--device cuda] [-tr TRAINER ...] [-o host_sync.json]

On CUDA it counts every call that waits, as `torch.cuda.set_sync_debug_mode` reports it. On the CPU it counts operations that
would wait if their tensors were on a GPU: reading a number (item, float, bool), sizes that depend on values (nonzero, boolean
indices), copies to the CPU (cpu, tolist). `only_here` are those whose tensors are on the CPU with CUDA too (lines with a text
of ON_CPU: random choices, Adam's counter of steps, checks for NaN). `may_wait` are blocking `.to(device)`, which do not wait if
the tensor is there already. It counts after a warm-up, without the k-means after step 1.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from fixed_plans import PLANS, make_batch, make_trainer, prepare_folders, stage_step
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import choose_device, conditions, positive, write_json
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_l2g import trainers

ROOT = Path(__file__).resolve().parents[1]
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select", "aten::bincount"}
KINDS = ("waits", "may_wait", "only_here")
COPIES = {torch.Tensor.cpu, torch.Tensor.tolist}
ON_CPU = (
    "chosen.any()", "chosen.nonzero()", "torch.rand(", "torch.randint(", "optimizer.step()", 'f.device.type == "cpu"',
    'torch.isfinite(batch["unlabelled"])',
)  # fmt: skip


class CountReads(TorchDispatchMode):
    """Operations whose result the CPU has to know, with the place in Python that asked."""

    def __init__(self, found: collections.Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        boolean = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or boolean:
            self.found[f"{name.removeprefix('aten::')} at {place()}"] += 1
        return function(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    """Copies to the CPU, which on the CPU are no operations."""

    def __init__(self, found: collections.Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        moved = function is torch.Tensor.to and any(isinstance(arg, torch.device) for arg in args)
        if function in COPIES or (moved and not (kwargs or {}).get("non_blocking") and asked_by_ours()):
            self.found[f"{function.__name__} at {place()}"] += 1
        return function(*args, **(kwargs or {}))


def place() -> str:
    """The innermost line of ours or of nnU-Net's on the stack, and its text."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if is_ours(path):
            return f"{path.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
        if "nnunetv2" in path.parts:
            return f"{'/'.join(path.parts[path.parts.index('nnunetv2') :])}:{frame.lineno}: {frame.line}"
    return "torch"


def asked_by_ours() -> bool:
    """Whether a line of ours calls, not torch on its behalf (the optimiser moves dozens of tensors to where they are)."""
    outside = (frame.filename for frame in reversed(traceback.extract_stack()) if frame.filename != __file__)
    caller = Path(next(name for name in outside if not name.endswith("torch/overrides.py")))
    return is_ours(caller)


def is_ours(path: Path) -> bool:
    """Whether a file is the project's; an environment may lie in its folder."""
    return path.is_relative_to(ROOT) and not {"benchmarks", "site-packages"} & set(path.parts)


def kind_of(key: str) -> str:
    if key.startswith("waits at"):  # CUDA says so itself
        return "waits"
    if any(text in key for text in ON_CPU):
        return "only_here"
    return "may_wait" if key.startswith("to at") else "waits"


def count(step: Callable[[], object], device: torch.device) -> collections.Counter:
    """What waits in one call, by operation and place."""
    found: collections.Counter = collections.Counter()
    if device.type != "cuda":
        with CountCopies(found), CountReads(found):
            step()
        return found
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            found[f"waits at {one.filename}:{one.lineno}"] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="tiny", help="default: %(default)s")
    parser.add_argument(
        "-tr", dest="trainers", nargs="+", choices=trainers.__all__, metavar="TRAINER", default=trainers.__all__,
        help="default: all of ours",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--warmup", type=positive, default=3, metavar="N", help="steps before; default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, rows = choose_device(args.device), {}
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        for trainer_class in (nnUNetTrainer, *(getattr(trainers, name) for name in args.trainers)):
            for name, found in of_trainer(trainer_class, args.plan, device, args.warmup).items():
                kinds = {key: kind_of(key) for key in found}
                rows[name] = {kind: sum(found[key] for key in found if kinds[key] == kind) for kind in KINDS}
                rows[name]["places"] = dict(found)
                print(f"{name:<46}" + "".join(f"{kind} {rows[name][kind]:<6}" for kind in KINDS), flush=True)
                for key, number in found.items():
                    print(f"    {number} x {key}")
    write_json(conditions(device) | {"plan": args.plan, "trainers": rows}, args.output)
    return 0


def of_trainer(trainer_class: type, plan: str, device: torch.device, warmup: int) -> dict[str, collections.Counter]:
    """By name of the trainer, and of its stage."""
    batch, found = make_batch(PLANS[plan], device), {}
    trainer = make_trainer(trainer_class, PLANS[plan], device)
    steps = {trainer_class.__name__: lambda: trainer.train_step(batch)}
    stage = stage_step(make_trainer(trainer_class, PLANS[plan], device), batch)
    if stage is not None:
        steps[f"{trainer_class.__name__}, {stage[0]}"] = stage[1]
    for name, step in steps.items():
        for _ in range(warmup):
            step()
        found[name] = count(step, device)
    return found


if __name__ == "__main__":
    sys.exit(main())
