"""Writes docs/performance.md from the JSON files in this folder; what was measured on a GPU appears with its file.

python benchmarks/performance_page.py [--check]

With --check nothing is written; exit status 1 if the page says anything else than the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "performance.md"
PLANS = ("malc", "acdc", "idrid")
ON_GPU = {  # file: the command that makes it
    **{
        f"step_time_{plan}_cuda{suffix}.json": f"step_time.py --plan {plan} {option} --rounds 7 --steps 30"
        for plan in PLANS
        for suffix, option in (("", "--compile"), ("_eager", "--no-compile"))
    },
    **{f"inference_time_{plan}_cuda.json": f"inference_time.py --plan {plan}" for plan in PLANS},
    "host_sync_cuda.json": "host_sync.py",
}
L2GNET, GRCSF, GLUA = (f"nnUNetTrainer{name}" for name in ("L2GNet", "GRCSF", "GLUA"))
TARGETS = [  # what, network, file, value in its row, the most it may be
    ("L2GNet, training step", L2GNET, "step_time", "ratio_to_vanilla", 1.05),
    ("L2GNet, memory of a step", L2GNET, "step_time", "memory_ratio", 1.05),
    ("L2GNet, prediction of a case", L2GNET, "inference_time", "ratio_to_vanilla", 1.02),
    ("GRCSF, training step", GRCSF, "step_time", "ratio_to_vanilla", 1.35),
    ("GRCSF, memory of a step", GRCSF, "step_time", "memory_ratio", 1.35),
    ("GRCSF, prediction of a case", GRCSF, "inference_time", "ratio_to_vanilla", 1.35),
    ("GLUA, training step of the second stage", GLUA, "step_time", "ratio_to_vanilla", 2.2),
    ("GLUA, prediction of a case", GLUA, "inference_time", "ratio_to_vanilla", 1.0),
]
COUNTED = {  # value in a row of step_count.json that stands for a target
    ("step_time", "ratio_to_vanilla"): "gflop_ratio",
    ("step_time", "memory_ratio"): "memory_ratio",
    ("inference_time", "ratio_to_vanilla"): "forward_ratio",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    args = parser.parse_args()
    page = make_page()
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        print("the page is what the files say" if same else f"{PAGE} differs: run python benchmarks/performance_page.py")
        return 0 if same else 1
    PAGE.write_text(page, encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


def make_page() -> str:
    parts = [
        "# Performance",
        "Time and memory beside plain nnU-Net. Written by `python benchmarks/performance_page.py` from the JSON files in "
        "[benchmarks](../benchmarks/README.md); a test holds it to them. Ratios are to vanilla in the same round, networks "
        "taking turns: median, and in brackets the range over rounds. Where the load average is above the number of CPUs, "
        "other work ran beside it: believe ratios, not seconds, and where their range is wide, neither.",
        *targets(),
        *counted(),
        *[part for file in found("step_time") for part in step_time(file)],
        *[part for file in found("inference_time") for part in inference_time(file)],
        *[part for file in found("host_sync") for part in host_sync(file)],
        *commands(),
        *missing(),
    ]
    return "\n\n".join(parts) + "\n"


def found(script: str) -> list[Path]:
    return sorted(FOLDER.glob(f"{script}_*.json"))


def read(name: str | Path) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source(file: str | Path, result: dict) -> str:
    """Where a table comes from."""
    threads = f", {result['torch_threads']} thread(s)" if result["cuda"] is None else f", CUDA {result['cuda']}"
    if result["cuda"] is None and "cpu_capability" in result:
        threads = f" ({result['cpu_capability']}){threads}"
    load = f"load average {result['load_average']} on {result['cpus']} CPUs"
    return (
        f"{result['device']}{threads}, torch {result['torch']}; {load}. "
        f"`{result['command']}` ([JSON](../benchmarks/{Path(file).name}))"
    )


def ratio(row: dict) -> str:
    low, high = row["ratio_range"]
    return f"{row['ratio_to_vanilla']:.2f} ({low:.2f} to {high:.2f})"


def targets() -> list[str]:
    rows = []
    for what, network, script, key, most in TARGETS:
        values = []
        for plan in PLANS:
            file = FOLDER / f"{script}_{plan}_cuda.json"
            if file.exists():
                values.append(f"{plan} {read(file)['networks'][network][key]:.2f}")
        plain = network.removeprefix("nnUNetTrainer")
        counts = [read("step_count.json")["plans"][plan][plain][COUNTED[script, key]] for plan in PLANS]
        rows.append([what, f"{most:.2f}", ", ".join(values) or "not yet", ", ".join(f"{count:.2f}" for count in counts)])
    return [
        "## Targets",
        "On one H200, as multiples of vanilla. These are aims, not results. The last column is what the operations, or the "
        "bytes kept for the backward, would say alone on MALC, ACDC and IDRiD: no time, but where it is above the aim, the aim "
        "is already in doubt.",
        table(["what", "at most", "measured on a GPU", "counted (MALC, ACDC, IDRiD)"], rows),
    ]


def counted() -> list[str]:
    result = read("step_count.json")
    rows = [
        [plan, network, f"{row['gflop']:,.0f}", f"{row['gflop_ratio']:.3f}", f"{row['memory_mib']:,.0f}",
         f"{row['memory_ratio']:.3f}", f"{row['forward_gflop']:,.0f}", f"{row['forward_ratio']:.3f}"]
        for plan, networks in result["plans"].items() for network, row in networks.items()
    ]  # fmt: skip
    header = ["plan", "network", "GFLOP of a step", "ratio", "MiB kept", "ratio", "GFLOP of a patch predicted", "ratio"]
    return [
        "## Counted: a step on plans of real size",
        "Convolutions and matrix products of a step, and what its backward keeps, in float32 without parameters; nothing was "
        "run. GLUA is its second stage.",
        table(header, rows),
        *(f"MiB that GRCSF keeps on {plan}: {kept_by_part(result['plans'][plan])}." for plan in result["plans"]),
        f"`{result['command']}` ([JSON](../benchmarks/step_count.json))",
    ]


def kept_by_part(networks: dict) -> str:
    parts = sorted(networks["GRCSF"]["memory_mib_by_part"].items(), key=lambda item: -item[1])
    plain = networks["vanilla"]["memory_mib_by_part"]
    return ", ".join(f"{part} {size:,.0f} (vanilla {plain.get(part, 0):,.0f})" for part, size in parts if size >= 1)


def step_time(file: Path) -> list[str]:
    result = read(file)
    rows = []
    for name, row in result["networks"].items():
        memory = "n/a" if row["memory_mib"] is None else f"{row['memory_mib']:,.1f}"
        times = "n/a" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        predicted = "" if row["prediction"] is None else ratio(row["prediction"])
        rows.append([name, f"{1000 * row['median_seconds']:.1f}", ratio(row), memory, times, predicted])
    flags = f"compile {'on' if result['compile'] else 'off'}, AMP {'on' if result['amp'] else 'off'}"
    shape = "x".join(map(str, result["patch"]))
    return [
        f"## A training step: {result['plan']} ({flags})",
        f"Patch {shape}, batch {result['batch']}, features {result['features']}; memory is {result['memory']}.",
        table(["trainer", "ms", "ratio", "MiB", "ratio", "one patch predicted, ratio"], rows),
        source(file, result),
    ]


def inference_time(file: Path) -> list[str]:
    result = read(file)
    rows = [[name, f"{1000 * row['median_seconds']:.0f}", ratio(row)] for name, row in result["networks"].items()]
    sizes = ("x".join(map(str, result[key])) for key in ("case", "patch"))
    return [
        f"## Sliding-window prediction of a case: {result['plan']}",
        "Case {}, patch {}, mirroring {}.".format(*sizes, "on" if result["mirroring"] else "off"),
        table(["trainer", "ms", "ratio"], rows),
        source(file, result),
    ]


def host_sync(file: Path) -> list[str]:
    result = read(file)
    rows = [[name, row["waits"], row["may_wait"], row["only_here"]] for name, row in result["trainers"].items()]
    where = "As CUDA reports them." if result["cuda"] else "Operations that would wait on CUDA, counted on a CPU."
    return [
        "## How often a step waits for the device",
        f"{where} Blocking moves to the device wait only if the tensor is elsewhere; the last column stays on the CPU with "
        "CUDA, too (random choices, Adam's counters, the check for NaN on CPUs). Vanilla's one is reading the loss, a "
        "translation step's its numbers for the log.",
        table(["step", "waits", "may wait", "waits for nothing on CUDA"], rows),
        source(file, result),
    ]


def commands() -> list[str]:
    start, times, compare = read("startup.json"), read("command_time_cpu.json"), read("compare_time_cpu.json")
    rows = [
        ["start-up file, on each Python start", f"{start['median_difference_ms']:.2f}", "above a start without it"],
        *[
            [f"`{name}`", f"{row['median_ms']:.0f}", f"{row['above_reference_ms']:+.0f} to `python -c pass`"]
            for name, row in times["results"].items()
            if name.startswith("nnunet_l2g")
        ],
        *[
            [
                f"nnU-Net's look-up of a trainer: {name}",
                f"{row['median_ms']:.0f}",
                f"{row['above_reference_ms']:+.0f} to nobody's",
            ]
            for name, row in times["results"].items()
            if not name.startswith(("nnunet_l2g", "python"))
        ],
    ]
    size = "x".join(map(str, compare["size"]))
    total = f"{compare['cases']} cases, {compare['runs']} run(s) of 2 methods: {compare['total_s']:.1f} s"
    rows.append([f"`nnunet_l2g compare`: scoring a prediction of {size} voxels", f"{1000 * compare['each_s']:.0f}",
                 total])  # fmt: skip
    return [
        "## Commands and look-up",
        table(["what", "ms", ""], rows),
        "`--help`, `env` and `register` import no torch (a test sees to it).",
        source("command_time_cpu.json", times),
        source("compare_time_cpu.json", compare),
    ]


def missing() -> list[str]:
    """What has no file yet, with the command for it."""
    lines = [f"python benchmarks/{command} --device cuda -o benchmarks/{file}" for file, command in ON_GPU.items()
             if not (FOLDER / file).exists()]  # fmt: skip
    if not lines:
        return ["## Not measured yet", "Nothing that is on the list."]
    block = "\n".join([*lines, "python benchmarks/performance_page.py"])
    return [
        "## Not measured yet: needs a GPU",
        "One GPU that nobody else uses; each command takes minutes. GLUA and GRCSF have a row for each stage.",
        f"```bash\n{block}\n```",
        "Seconds per epoch with nnU-Net's loaders, on real data: [benchmarks/README.md](../benchmarks/README.md).",
    ]


if __name__ == "__main__":
    sys.exit(main())
