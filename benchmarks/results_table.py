"""A Markdown table of finished nnU-Net trainings: Dice, recall, seconds an epoch, and what our logs say of codes and plan.

python benchmarks/results_table.py -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainer_20epochs nnUNetTrainerL2GNet_20epochs \
    [-p nnUNetPlans] [--results ROOT ...] [-o table.json]

Reads validation/summary.json and training_log_*.txt of each fold under each results root (default: $nnUNet_results; several
roots are repeats of the same trainings). Dice and recall = TP / (TP + FN) are means over validation cases; a case without the
class in reference and prediction counts for neither, as in nnU-Net. Seconds an epoch: median of all but the first, which
compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

import numpy as np

DIAGNOSTICS = ("perplexity", "codes_used", "kept_variance", "tokens_per_reference", "duplicate_references", "reference_drift")


def read_fold(folder: Path) -> dict:
    """Dice and recall by class, epoch seconds and last diagnostics of one finished fold.

    FileNotFoundError or ValueError that name the file, if the fold is not finished or the file is not nnU-Net's.
    """
    summary_file = folder / "validation" / "summary.json"
    if not summary_file.exists():
        raise FileNotFoundError(f"{summary_file} is missing: train this fold to its end, validation included")
    try:
        cases = json.loads(summary_file.read_text())["metric_per_case"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{summary_file} is not a summary of nnU-Net ({error}); run nnUNetv2_train ... --val again") from error
    dice, recall = {}, {}
    for case in cases:
        for label, metric in case["metrics"].items():
            tp, fn = metric["TP"], metric["FN"]
            dice.setdefault(label, []).append(metric["Dice"])
            recall.setdefault(label, []).append(tp / (tp + fn) if tp + fn else np.nan)
    log = "".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))
    seconds = [float(s) for s in re.findall(r"Epoch time: ([\d.]+) s", log)]
    diagnostics = {key: re.findall(rf"\b{key} (\S+)", log) for key in DIAGNOSTICS}
    return {
        "cases": len(cases),
        "dice": {label: float(np.nanmean(values)) for label, values in dice.items()},
        "recall": {label: float(np.nanmean(values)) for label, values in recall.items()},
        "epoch_seconds": statistics.median(seconds[1:] or seconds) if seconds else None,
        "diagnostics": {key: float(values[-1]) for key, values in diagnostics.items() if values},
    }


def model_folder(root: Path, dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """The one folder of a trainer; an error that names what was looked for."""
    number = f"{int(dataset):03d}" if dataset.isdigit() else None
    found = [f for f in root.glob(f"Dataset{number}_*" if number else dataset) if f.is_dir()]
    if len(found) != 1:
        raise FileNotFoundError(f"{root} has {len(found)} folders of dataset {dataset}, expected one")
    return found[0] / f"{trainer}__{plans}__{configuration}"


def to_markdown(rows: list[dict]) -> str:
    """One line a trainer, fold and root."""
    labels = list(rows[0]["dice"])
    head = ["trainer", "repeat", "fold", "cases", "mean Dice", *(f"Dice {x}" for x in labels), "mean recall"]
    head += [*(f"recall {x}" for x in labels), "s / epoch", *DIAGNOSTICS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["trainer"], row["repeat"], row["fold"], row["cases"]]
        for values in (row["dice"], row["recall"]):
            cells += [f"{np.nanmean(list(values.values())):.4f}", *(f"{values[x]:.4f}" for x in labels)]
        cells.append("n/a" if row["epoch_seconds"] is None else f"{row['epoch_seconds']:.1f}")
        cells += [f"{row['diagnostics'][key]:.3g}" if key in row["diagnostics"] else "n/a" for key in DIAGNOSTICS]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset, number or name")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-f", nargs="+", required=True, help="folds")
    parser.add_argument("-tr", nargs="+", required=True, help="trainers")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("--results", nargs="+", default=[os.environ.get("nnUNet_results")], help="one root a repeat")
    parser.add_argument("-o", help="JSON file")
    args = parser.parse_args(argv)
    if None in args.results:
        parser.error("nnUNet_results is not set; set it, or give --results")
    try:
        rows = [
            {"trainer": trainer, "repeat": repeat, "fold": fold}
            | read_fold(model_folder(Path(root), args.d, trainer, args.p, args.c) / f"fold_{fold}")
            for trainer in args.tr
            for repeat, root in enumerate(args.results, 1)
            for fold in args.f
        ]
    except (FileNotFoundError, ValueError) as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 1
    print(to_markdown(rows))
    if args.o:
        Path(args.o).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
