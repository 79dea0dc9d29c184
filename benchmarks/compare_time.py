"""How long `nnunet_l2g compare` takes over many cases: some runs of two methods against one set of references.

python benchmarks/compare_time.py [--cases 200] [--runs 3] [--size 128 128 32] [-o compare_time.json]

Phantom hearts, shifted by a voxel or two as predictions, so that Dice and surface distances have work to do. Reported: wall
seconds of the command over all cases and over two of them, and their difference for each further case and prediction: what
scoring it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from timing import conditions, write_json

SPACING = (1.4, 1.4, 8.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, metavar="N", help="at least 3; default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, metavar="R", help="of each method; default: %(default)s")
    parser.add_argument(
        "--size", type=int, nargs=3, default=[128, 128, 32], metavar="VOXELS", help="x y z; default: %(default)s"
    )
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for cases in (args.cases, 2):
            part = Path(folder) / f"{cases}_cases"
            part.mkdir()
            write_cases(part, cases, args.runs, args.size)
            seconds.append(run(part, args.runs))
    each = (seconds[0] - seconds[1]) / (2 * args.runs * (args.cases - 2))
    print(
        f"{args.cases} cases, {args.runs} runs of 2 methods: {seconds[0]:.1f} s, {each:.3f} s each; 2 cases {seconds[1]:.1f} s"
    )
    result = {
        "cases": args.cases,
        "runs": args.runs,
        "size": args.size,
        "total_s": seconds[0],
        "two_cases_s": seconds[1],
        "each_s": each,
    }
    write_json(conditions(torch.device("cpu")) | {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()},
               args.output)  # fmt: skip
    return 0


def write_cases(folder: Path, cases: int, runs: int, size: list[int]) -> None:
    """references/, a1/, ... and b1/, ... with one label map a case; dataset.json beside the references."""
    from nnunet_l2g.phantom import write_dataset

    dataset = write_dataset(folder, 5, 0, dataset_id=999, name="Hearts", size=tuple(size), spacing=SPACING)
    labels = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted((dataset / "labelsTr").iterdir())]
    sides = [f"{method}{run}" for method in "ab" for run in range(1, runs + 1)]
    for name in ("references", *sides):
        (folder / name).mkdir()
    (folder / "references" / "dataset.json").write_text((dataset / "dataset.json").read_text())
    for case in range(cases):
        label = np.roll(labels[case % len(labels)], case % 7, 1)
        shifts = {side: 1 + (case + int(side[1:])) % 3 - (side[0] == "b") for side in sides}
        for name, shift in {"references": 0, **shifts}.items():
            image = sitk.GetImageFromArray(np.roll(label, shift, 2))
            image.SetSpacing(SPACING)
            sitk.WriteImage(image, str(folder / name / f"case{case:04}.nii.gz"), True)


def run(folder: Path, runs: int) -> float:
    """Wall seconds of the command."""
    named = [f"{method.upper()}={folder / f'{method}{run}'}" for method in "ab" for run in range(1, runs + 1)]
    command = [sys.executable, "-m", "nnunet_l2g.cli", "compare", "--predictions", *named]
    command += ["--reference", folder / "references", "-o", folder / "report"]
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    if done.returncode:
        sys.exit(json.dumps(done.stderr[-2000:]))
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
