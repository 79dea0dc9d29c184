"""`nnunet_l2g compare`: trainings, or folders of predictions, against a baseline: scores, paired statistics, report."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.compare.slurm_executor import add_arguments, slurm_options
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import marker_of, open_folder, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument_group("trainings, as nnU-Net names them; the first is the baseline").add_argument
    add("-d", dest="dataset", metavar="DATASET", help="number or name of the dataset")
    add("-tr", dest="trainers", nargs="+", metavar="TRAINER", default=["nnUNetTrainer"], help="two or more, baseline first")
    add("-c", dest="configurations", nargs="+", metavar="CONFIGURATION", help="one for all, or one for each: 3d_fullres, ...")
    add("-p", dest="plans", nargs="+", default=["nnUNetPlans"], metavar="PLANS", help="as -c (default: nnUNetPlans)")
    add("-f", dest="folds", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="default: 0 1 2 3 4")
    runs = "runs 1 to R of each trainer: TRAINER, TRAINER_run2, ..., TRAINER_run<R>; one number for all, or one for each"
    add("--runs", type=int, nargs="+", default=[1], metavar="R", help=runs)
    add("--train", action="store_true", help="run nnUNetv2_train for what is missing, and continue what was interrupted")
    add("--jobs", type=int, metavar="J", help="with --train on a CPU: J trainings at once, of one thread each (default: one)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for --train and all that predicts (default: auto)")
    add("--measure", action="store_true", help="FLOPs of a patch, seconds of inference for a case, memory of a training step")
    add("--shift", action="store_true", help="predict and score perturbed validation images too")
    add("--without-method", action="store_true", help="the Dice lost when the method is left out of the trained networks")
    add_arguments(parser)
    add = parser.add_argument_group("or folders of predictions; the first is the baseline").add_argument
    add("--predictions", nargs="+", metavar="NAME=FOLDER", help="two names or more; a name given again is another run")
    add("--reference", type=expanded, metavar="FOLDER", help="references (default with -d: nnU-Net's gt_segmentations)")
    add("--dataset-json", type=expanded, metavar="FILE", help="default: the one beside predictions or references")
    add = parser.add_argument_group("scores and statistics").add_argument
    add("--surface-tolerance", type=float, default=2.0, metavar="MM", help="of the normalised surface Dice (default: 2 mm)")
    add("--lesions", action="store_true", help="lesion-wise precision, recall and F1 too")
    add("--lesion-overlap", type=float, default=0.0, metavar="FRACTION", help="of a lesion to be found (default: any voxel)")
    add("--lesion-min-size", type=int, default=1, metavar="VOXELS", help="smaller lesions are left out (default: 1)")
    add("--ensemble", action="store_true", help="an ensemble of the runs of each method, and where its runs disagree")
    add("-np", dest="processes", type=int, metavar="N", help="scoring processes (default: cores, up to 8)")
    add = parser.add_argument
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="of the report: new, empty, or made by compare")


def expanded(text: str) -> Path:
    """The path; a shell does not expand ~ after =."""
    return Path(text).expanduser()


def run(args: argparse.Namespace) -> int:
    """Checks all that can be checked, trains what is missing (--train), scores and writes. 0 done, 130 interrupted."""
    check_numbers(args)
    check_mode(args)
    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))  # an editable install may not be registered
    slurm_options(args)
    from nnunet_l2g.compare.report import write_report
    from nnunet_l2g.nnunet import Interrupted, available_cores

    args.processes = args.processes or min(available_cores(), 8)
    try:
        comparison, output = compare_folders(args) if args.predictions else compare_models(args)
        page, text = write_report(comparison, output)
        print(f"\n{text}\n\nreport  {page}")
        return 0
    except (Interrupted, KeyboardInterrupt):
        print("\nnnunet_l2g compare: interrupted; what is finished is kept, the same command continues", file=sys.stderr)
        return 130


def compare_models(args: argparse.Namespace) -> tuple:
    """The comparison of trainings in nnUNet_results, and the report's folder."""
    import pandas as pd

    from nnunet_l2g.compare.fairness import model_warnings
    from nnunet_l2g.compare.measure import measure
    from nnunet_l2g.compare.models import choose_models, dataset_name
    from nnunet_l2g.compare.predicting import Predictor, raw_images, shift_table
    from nnunet_l2g.compare.results import read_models
    from nnunet_l2g.compare.training import check_folds
    from nnunet_l2g.compare.without_method import OPTION, choose_methods, dice_without, lost_table
    from nnunet_l2g.nnunet import choose_device

    folds = check_fold_names(args.folds)
    dataset = dataset_name(args.dataset)
    methods = choose_models(dataset, args.trainers, args.plans, args.configurations, args.runs)
    models, first = [model for runs in methods for model in runs], [runs[0] for runs in methods]
    device = choose_device(args.device) if args.measure or args.shift or args.without_method else "cpu"
    if args.train:
        train(args, methods, folds, dataset)
    check_folds(models, folds, dataset)
    inputs = read_models(methods, folds, dataset, args.reference)
    inputs.warnings = model_warnings(models, folds, inputs.runs, dataset)
    first_runs = [method.runs[0] for method in inputs.methods]
    images = raw_images(first, inputs, dataset, "--shift") if args.shift else {}
    changed = choose_methods(methods, folds) if args.without_method else []
    raw = raw_images([model for runs in changed for model in runs], inputs, dataset, OPTION) if changed else {}
    output = open_output(args.output)
    comparison = score(args, inputs, output)
    predictor = Predictor(inputs, dataset, device, output, comparison.options, args.processes)
    if args.measure:
        comparison.cost = comparison.cost.join(pd.DataFrame(measure(first, first_runs, dataset, device)))
    if args.shift:
        comparison.extra["shift"] = shift_table(predictor, first, images)
    if args.without_method:
        comparison.extra["without"] = lost_table(comparison.cases, dice_without(predictor, changed, raw))
    return comparison, output


def train(args: argparse.Namespace, methods: list[list], folds: list[str], dataset: str) -> None:
    """--train: what is missing, here or on a cluster; run 1 of all methods, then run 2."""
    from nnunet_l2g.compare.local_executor import places, train_locally
    from nnunet_l2g.compare.slurm_executor import check_slurm, train_on_slurm
    from nnunet_l2g.compare.training import check_trainable, missing_trainings
    from nnunet_l2g.nnunet import choose_device

    models = [model for run in itertools.zip_longest(*methods) for model in run if model is not None]
    missing = missing_trainings(models, folds, dataset)
    if not missing:
        return
    job = slurm_options(args)
    if job is None:
        device = choose_device(args.device)
        here = places(device, args.jobs)
        check_trainable(missing)
        train_locally(missing, device, here, open_output(args.output))
    else:
        check_slurm()
        check_trainable(missing)
        train_on_slurm(missing, job, open_output(args.output))


def compare_folders(args: argparse.Namespace) -> tuple:
    """The comparison of folders of predictions, and the report's folder."""
    from nnunet_l2g.compare.results import read_folders

    inputs = read_folders(parse_predictions(args.predictions), args.reference, args.dataset_json)
    output = open_output(args.output)
    return score(args, inputs, output), output


def score(args: argparse.Namespace, inputs, output: Path):
    """The comparison: every case of every run scored, and the tables computed from the scores."""
    from nnunet_l2g.compare.ensemble import add_ensembles, rank_cases
    from nnunet_l2g.compare.tables import compare
    from nnunet_l2g.evaluation.cases import Options

    disagreement = add_ensembles(inputs, output) if args.ensemble else None
    options = Options(args.surface_tolerance, args.lesions, args.lesion_overlap, args.lesion_min_size)
    more = "the same command with --runs 3 --train" if args.dataset else "--predictions NAME=FOLDER1 NAME=FOLDER2 ..."
    comparison = compare(inputs, options, args.processes, shlex.join(["nnunet_l2g", *sys.argv[1:]]), more)
    if disagreement is not None:
        comparison.extra["failures"] = rank_cases(disagreement, comparison.cases)
    return comparison


def open_output(path: Path) -> Path:
    """The report's folder as an absolute path, made if missing. UserError as in `open_folder`."""
    path = open_folder(path, "compare")
    write_text(marker_of(path, "compare"), "Made by `nnunet_l2g compare`, which replaces its own files in this folder.\n")
    return path


def check_numbers(args: argparse.Namespace) -> None:
    """UserError for a number out of its range."""
    largest = sys.float_info.max
    for option, value, least, most, expected in (
        ("--lesion-min-size", args.lesion_min_size, 1, largest, "1 or more"),
        ("-np", args.processes, 1, largest, "1 or more"),
        ("--jobs", args.jobs, 1, largest, "1 or more"),
        *(("--runs", runs, 1, 100, "1 to 100") for runs in args.runs),
        ("--surface-tolerance", args.surface_tolerance, 0, largest, "a distance of 0 or more"),
        ("--lesion-overlap", args.lesion_overlap, 0, 1, "a fraction between 0 and 1"),
    ):
        if value is not None and not least <= value <= most:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{option} {shown}: expected {expected}")


def check_mode(args: argparse.Namespace) -> None:
    """UserError unless either trainings or folders of predictions are named, with all that belongs to them."""
    if args.predictions:
        of_trainings = (args.dataset, args.configurations, args.train, args.measure, args.shift, args.without_method)
        if any(of_trainings) or args.runs != [1]:
            raise UserError(
                "--predictions and -d, -c, --runs, --train, --measure, --shift or --without-method: compare either folders of "
                "predictions or trainings"
            )
        if args.reference is None:
            raise UserError("--predictions needs --reference FOLDER, the segmentations to compare with")
    elif not args.dataset or not args.configurations:
        raise UserError("nothing to compare: name trainings with -d, -c and -tr, or folders with --predictions and --reference")
    elif args.dataset_json:
        raise UserError("--dataset-json belongs to --predictions; trainings have their own")
    if args.jobs is not None and not (args.train and args.executor == "local"):
        raise UserError(f"--jobs {args.jobs}: belongs to --train on this machine; add --train, or leave it out")


def check_fold_names(folds: list[str]) -> list[str]:
    """UserError unless each is a number or all, and none is named twice."""
    for fold in folds:
        if not re.fullmatch(r"all|\d{1,4}", fold):
            raise UserError(f"-f {fold}: expected fold numbers, or all")
    folds = [fold if fold == "all" else str(int(fold)) for fold in folds]
    if len(set(folds)) < len(folds) or ("all" in folds and len(folds) > 1):
        raise UserError(f"-f {' '.join(folds)}: name each fold once, and all by itself")
    return folds


def parse_predictions(texts: list[str]) -> list[tuple[str, Path]]:
    """Names and folders of NAME=FOLDER. UserError for another form, or fewer than two names."""
    named = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--predictions {text}: expected NAME=FOLDER")
        named.append((name, expanded(folder)))
    if len(dict(named)) < 2:
        raise UserError(f"--predictions {texts[0]}: nothing to compare it with; use at least two names, the baseline first")
    return named
