"""What nnU-Net's result folders say about several trainers: Dice, recall, seconds per epoch, and what L2GNet logs.

python benchmarks/results_table.py -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainer_20epochs nnUNetTrainerL2GNet_20epochs \\
    --results repeat1/nnUNet_results repeat2/nnUNet_results [-o results.json] > results.md

Reads `fold_*/validation/summary.json` (nnU-Net's per-case evaluation of the full validation images) and the training logs;
no checkpoint is opened, nothing is computed anew. Each row is one trainer in one results folder (a repeat), the cases of
its folds pooled.

Dice: per case as nnU-Net computes it, missing where a class is in neither segmentation. Recall: TP / (TP + FN) of voxels per
case, missing where the reference has none. Per class: the mean over cases that have a value. Mean foreground: the mean over
classes, n/a if one has no value in any case (nnU-Net's foreground_mean). s/epoch: median over epochs, without the first one
after each start, which compiles. Diagnostics: the last epoch's, mean over folds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

# of nnunet_l2g's layers; with several levels each name has a prefix
DIAGNOSTICS = (
    "perplexity", "codes_used", "kept_variance", "tokens_per_reference", "marginal_error", "duplicate_references",
    "reference_drift",
)  # fmt: skip
NAN = math.nan


class UserError(Exception):
    """A sentence for the user."""


def main() -> int:
    args = parse_arguments()
    try:
        result = collect(args)
    except UserError as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 1
    print(format_markdown(result))
    if args.output:
        args.output.write_text(json.dumps(without_nan(result), indent=2, allow_nan=False) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", required=True, help="dataset: number or name")
    parser.add_argument("-c", dest="configuration", required=True, help="for example 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="default: %(default)s")
    parser.add_argument("-f", dest="folds", nargs="+", default=["0"], help="0 to 4, or all; default: 0")
    parser.add_argument("-tr", dest="trainers", nargs="+", required=True, metavar="TRAINER")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="FOLDER",
        help="one nnUNet_results folder for each repeat (default: the variable nnUNet_results)",
    )  # fmt: skip
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if args.results is None:
        if "nnUNet_results" not in os.environ:
            parser.error("give --results FOLDER, or set nnUNet_results")
        args.results = [Path(os.environ["nnUNet_results"])]
    for option, values in (("-tr", args.trainers), ("-f", args.folds), ("--results", args.results)):
        if len(set(values)) < len(values):
            parser.error(f"{option} names one twice: {' '.join(map(str, values))}")
    return args


def collect(args: argparse.Namespace) -> dict:
    """Everything that was asked for; raises UserError where something is missing or does not go together."""
    rows = []
    for trainer in args.trainers:
        for repeat, root in enumerate(args.results, 1):
            model = find_dataset(root, args.dataset) / f"{trainer}__{args.plans}__{args.configuration}"
            rows.append({"trainer": trainer, "repeat": repeat, **read_model(model, args.folds)})
    first = rows[0]
    for row in rows[1:]:
        differing = sorted(set(row["cases"]) ^ set(first["cases"]))
        if differing or row["dice"].keys() != first["dice"].keys():
            raise UserError(
                f"{row['trainer']} (repeat {row['repeat']}) has {len(row['cases'])} validation cases, {first['trainer']} "
                f"{len(first['cases'])}; they differ in {', '.join(differing[:5]) or 'the classes'}. Expected the same: train "
                "all of them on one split (splits_final.json)."
            )
    return {
        "dataset": find_dataset(args.results[0], args.dataset).name,
        "configuration": args.configuration,
        "plans": args.plans,
        "folds": args.folds,
        "repeats": len(args.results),
        "rows": rows,
    }


def find_dataset(root: Path, dataset: str) -> Path:
    """The dataset's folder in a results folder, by number or name."""
    if not root.is_dir():
        raise UserError(f"there is no results folder {root}")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else dataset
    found = sorted(path for path in root.glob(pattern) if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"expected one folder {pattern} in {root}, found {names}")
    return found[0]


def read_model(model: Path, folds: list[str]) -> dict:
    """Numbers of one trained model: scores pooled over its folds, times, diagnostics."""
    if not model.is_dir():
        trained = ", ".join(sorted(path.name for path in model.parent.iterdir() if path.is_dir())) or "none"
        raise UserError(f"missing {model}. Trained there: {trained}")
    names = class_names(read_json(model / "dataset.json"))
    cases, epochs, diagnostics = {}, [], []
    for fold in folds:
        folder = model / f"fold_{fold}"
        runs = read_logs(folder)
        for case, metrics in read_cases(folder / "validation" / "summary.json").items():
            if case in cases:
                raise UserError(f"case {case} is in the validation of two folds ({', '.join(folds)}) of {model}")
            cases[case] = metrics
        if not runs["validated"]:
            raise UserError(
                f"{folder}: the newest training log does not end with nnU-Net's 'Mean Validation Dice', so the summary.json "
                "there is of an earlier run, or validation is not done. Finish it: nnUNetv2_train ... --c (or --val)."
            )
        epochs.extend(runs["epochs"])
        diagnostics.append(runs["diagnostics"])
    labels = list(next(iter(cases.values())))
    scores = {
        "dice": {names.get(label, label): [case[label]["Dice"] for case in cases.values()] for label in labels},
        "recall": {names.get(label, label): [recall(case[label]) for case in cases.values()] for label in labels},
    }
    means = {kind: {name: mean_of(values) for name, values in classes.items()} for kind, classes in scores.items()}
    return {
        "mean_dice": statistics.fmean(means["dice"].values()),
        "mean_recall": statistics.fmean(means["recall"].values()),
        "num_cases": len(cases),
        "seconds_per_epoch": statistics.median(epochs) if epochs else NAN,
        "diagnostics": {key: mean_of([fold[key] for fold in diagnostics if key in fold]) for key in diagnostics[0]},
        **means,
        "cases": {
            case: {kind: {name: scores[kind][name][number] for name in scores[kind]} for kind in scores}
            for number, case in enumerate(cases)
        },
    }


def read_json(file: Path) -> dict:
    if not file.exists():
        raise UserError(f"missing {file}. Is this training, and nnU-Net's validation after it, finished?")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not complete JSON ({error}); validate again: nnUNetv2_train ... --val") from error


def class_names(dataset: dict) -> dict[str, str]:
    """Names by the keys of summary.json: a label's number, or a region's tuple of numbers."""
    return {str(tuple(value) if isinstance(value, list) else value): name for name, value in dataset["labels"].items()}


def read_cases(summary: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by case and label, without background."""
    results = read_json(summary)["metric_per_case"]
    if not results:
        raise UserError(f"{summary} has no case")
    return {
        Path(result["prediction_file"]).name.split(".")[0]: {
            label: metrics for label, metrics in result["metrics"].items() if label != "0"
        }
        for result in results
    }


def recall(metrics: dict[str, float]) -> float:
    """Share of the reference's voxels that were found; nan without any."""
    reference = metrics["TP"] + metrics["FN"]
    return metrics["TP"] / reference if reference else NAN


def mean_of(values: list[float]) -> float:
    """Mean without nan, as numpy.nanmean; nan if nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else NAN


def read_logs(fold: Path) -> dict:
    """The newest run in a fold's training logs, over all its restarts with --c.

    `epochs`: seconds, without the first epoch after each start. `diagnostics`: last values by name. `validated`: whether
    validation finished after the last epoch. Epoch 0 in a log begins a new run and ends what was before it.
    """
    logs = sorted(fold.glob("training_log_*.txt"), key=lambda log: [int(number) for number in re.findall(r"\d+", log.name)])
    if not logs:
        raise UserError(f"missing {fold / 'training_log_*.txt'}: seconds per epoch and diagnostics are read from it")
    epochs, diagnostics, validated = {}, {}, False
    for log in logs:
        epoch, starting = None, True
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?: ", "", line).strip()
            if match := re.fullmatch(r"Epoch (\d+)", text):
                epoch, validated = int(match[1]), False
                if epoch == 0:
                    epochs, diagnostics = {}, {}
            elif match := re.fullmatch(r"Epoch time: ([\d.]+) s", text):
                epochs[epoch] = NAN if starting else float(match[1])
                starting = False
            elif found := parse_diagnostics(text):
                diagnostics = found
            elif text.startswith("Mean Validation Dice"):
                validated = True
    seconds = [value for value in epochs.values() if not math.isnan(value)]
    return {"epochs": seconds, "diagnostics": diagnostics, "validated": validated}


def parse_diagnostics(text: str) -> dict[str, float]:
    """'perplexity 31.1 codes_used 45' -> its pairs; empty for any other line."""
    words = text.split(" ")
    keys, values = words[::2], words[1::2]
    if len(keys) != len(values) or not all(key.endswith(DIAGNOSTICS) for key in keys):
        return {}
    try:
        return {key: float(value) for key, value in zip(keys, values, strict=True)}
    except ValueError:
        return {}


def format_markdown(result: dict) -> str:
    """A table of the runs, and one each for Dice and recall of the classes."""
    rows = result["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row["diagnostics"]))
    folds = f"fold{'s' if len(result['folds']) > 1 else ''} {', '.join(result['folds'])}"
    header = ["trainer", "repeat", "mean Dice", "mean recall", "cases", "s/epoch", *(key.replace("_", " ") for key in keys)]
    table = [
        [
            row["trainer"],
            str(row["repeat"]),
            number(row["mean_dice"]),
            number(row["mean_recall"]),
            str(row["num_cases"]),
            number(row["seconds_per_epoch"], ".1f"),
            *(number(row["diagnostics"].get(key, NAN), ".3g") for key in keys),
        ]
        for row in rows
    ]
    parts = [
        f"{result['dataset']}, {result['configuration']}, {result['plans']}, {folds}: per-case validation, mean over "
        "foreground classes",
        markdown(header, table),
    ]
    runs = [row["trainer"] + (f" ({row['repeat']})" if result["repeats"] > 1 else "") for row in rows]
    for kind in ("dice", "recall"):
        classes = [[name, *(number(row[kind][name]) for row in rows)] for name in rows[0][kind]]
        parts.append(markdown([f"{kind.capitalize()} per class", *runs], classes))
    return "\n\n".join(parts)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float, form: str = ".4f") -> str:
    return "n/a" if math.isnan(value) else format(value, form)


def without_nan(value):
    """JSON has no nan: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
