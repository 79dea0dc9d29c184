"""How step time and memory grow: with the voxels of a patch for vanilla, L2GNet, GRCSF and GLUA; with p and K for L2GNet.

python benchmarks/growth.py [--device cuda] [-o growth.json] [--figure docs/images/growth.png]

One training step on a fixed random batch; memory as in step_time.py. The patch has 1, 2, 4 and 8 times the voxels of the base,
axis after axis doubled; p references and K codes vary one at a time on the base patch. Networks take turns; `ratio_to_vanilla`
is the median over rounds of the ratio in the same round. The base is small on the CPU, where constant costs weigh more than on
real plans, and 64x64x64 with nnU-Net's own widths on CUDA.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from fixed_plans import Plan, make_batch, make_trainer, prepare_folders
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timing import MIB, choose_device, conditions, peak_bytes, positive, ratios, take_turns, write_json

from nnunet_l2g import trainers

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

BASES = {
    "cpu": Plan((16, 16, 16), 2, 3, [8, 16, 32]),  # 4 x 4 x 4 = 64 bottleneck voxels
    "cuda": Plan((64, 64, 64), 2, 4, [32, 64, 128, 256, 320]),
}
FACTORS, REFERENCES, CODES = (1, 2, 4, 8), (16, 64, 256), (64, 256, 1024)
VANILLA = "vanilla"
METHODS = {
    VANILLA: nnUNetTrainer,
    "L2GNet": trainers.nnUNetTrainerL2GNet,
    "GRCSF": trainers.nnUNetTrainerGRCSF,
    "GLUA": trainers.nnUNetTrainerGLUA,
}
COLOURS = dict(zip(METHODS, ("black", "#0072b2", "#d55e00", "#009e73"), strict=True))  # apart for the colour-blind, too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--factors", type=int, nargs="+", choices=FACTORS, default=FACTORS, help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="per round and network; default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    base = BASES[device.type]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare_folders(Path(folder))
        for factor in args.factors:
            plan = base._replace(patch=scaled(base.patch, factor))
            rows += measure("voxels", {(name, factor): kind for name, kind in METHODS.items()}, plan, device, args)
        for series, setting, values in (("p", "num_references", REFERENCES), ("K", "num_codes", CODES)):
            kinds = {("L2GNet", value): with_setting(setting, value) for value in values}
            rows += measure(series, {(VANILLA, 0): nnUNetTrainer, **kinds}, base, device, args)
    result = conditions(device) | {
        "base_patch": list(base.patch),
        "batch": base.batch,
        "features": base.features,
        "memory": "peak allocated" if device.type == "cuda" else "kept for the backward",
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "results": rows,
    }
    write_json(result, args.output)
    if args.figure:
        draw(result, args.figure)
    return 0


def scaled(patch: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """The patch with `factor` (a power of two) times the voxels: the last axis doubled first."""
    doublings = factor.bit_length() - 1
    return tuple(size * 2 ** ((doublings + axis) // len(patch)) for axis, size in enumerate(patch))


def with_setting(name: str, value: int) -> type:
    return type(f"L2GNet_{name}_{value}", (trainers.nnUNetTrainerL2GNet,), {"network_settings": {name: value}})


def measure(series: str, kinds: dict[tuple[str, int], type], plan: Plan, device: torch.device, args) -> list[dict]:
    """A row for each network: seconds and memory of its step."""
    batch, calls, memory = make_batch(plan, device), {}, {}
    for key, kind in kinds.items():
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        trainer = make_trainer(kind, plan, device)
        calls[key] = lambda trainer=trainer: trainer.train_step(batch)
        for _ in range(3):  # warms up
            calls[key]()
        memory[key] = peak_bytes(calls[key], device, trainer.network.parameters()) - before
    times = take_turns(calls, device, args.rounds, args.steps)
    vanilla = next(key for key in kinds if key[0] == VANILLA)
    rows = []
    for key in kinds:
        name, value = key
        found = {
            "series": series,
            "network": name,
            "value": value,
            **ratios(key, times, vanilla),
            "memory_mib": round(memory[key] / MIB, 3),
            "memory_ratio": round(memory[key] / memory[vanilla], 4),
        }
        rows.append(found)
        print(
            f"{series} {value:>5} {name:<8}{1000 * found['median_seconds']:>10.1f} ms {found['ratio_to_vanilla']:>7.3f}"
            f"{found['memory_mib']:>10.1f} MiB {found['memory_ratio']:>7.3f}",
            flush=True,
        )
    return rows


def draw(result: dict, file: Path) -> None:
    """Seconds and memory over voxels; ratios to vanilla over p and K."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    rows = result["results"]
    for ax, key, scale, label in (
        (axes[0, 0], "median_seconds", 1000, "ms per training step"),
        (axes[0, 1], "memory_mib", 1, f"MiB ({result['memory']})"),
    ):
        for name, colour in COLOURS.items():
            line = [(row["value"], scale * row[key]) for row in rows if row["series"] == "voxels" and row["network"] == name]
            ax.plot(*zip(*line, strict=True), "o-", color=colour, label=name)
        factors = sorted({row["value"] for row in rows if row["series"] == "voxels"})
        ax.set(xscale="log", yscale="log", ylabel=label)
        ax.set_xlabel(f"voxels of a patch, in multiples of {'x'.join(map(str, result['base_patch']))}")
        ax.set_xticks(factors, [f"{factor}x" for factor in factors], minor=False)
    for ax, key, label in (
        (axes[1, 0], "ratio_to_vanilla", "step time of L2GNet / vanilla"),
        (axes[1, 1], "memory_ratio", "memory of L2GNet / vanilla"),
    ):
        for series, style, meaning in (("p", "o-", "p references, K = 64"), ("K", "s--", "K codes, p = 64")):
            line = [(row["value"], row[key]) for row in rows if row["series"] == series and row["network"] != VANILLA]
            ax.plot(*zip(*line, strict=True), style, color={"p": COLOURS["L2GNet"], "K": "#cc79a7"}[series], label=meaning)
        values = sorted({row["value"] for row in rows if row["series"] in ("p", "K") and row["value"]})
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", xlabel="p or K", ylabel=label, ylim=(0.9, None))
        ax.set_xticks(values, [str(value) for value in values])
    for ax in axes.flat:
        if ax.get_yscale() == "log":
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.suptitle(
        f"{result['device']}, {result['torch_threads']} thread(s), batch {result['batch']}, features {result['features']}"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
