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

MOST_RUNS = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """What to compare, what to compute, where to write."""
    models = parser.add_argument_group("trainings, as nnU-Net names them; the first is the baseline")
    models.add_argument("-d", dest="dataset", metavar="DATASET", help="number or name of the dataset")
    models.add_argument(
        "-tr",
        dest="trainers",
        nargs="+",
        metavar="TRAINER",
        default=["nnUNetTrainer"],
        help="two or more, the baseline first (default: nnUNetTrainer)",
    )
    models.add_argument(
        "-c",
        dest="configurations",
        nargs="+",
        metavar="CONFIGURATION",
        help="one for all, or one for each: 3d_fullres, 2d, ...",
    )
    models.add_argument(
        "-p",
        dest="plans",
        nargs="+",
        default=["nnUNetPlans"],
        metavar="PLANS",
        help="one for all, or one for each (default: nnUNetPlans)",
    )
    models.add_argument(
        "-f", dest="folds", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="default: 0 1 2 3 4"
    )
    models.add_argument(
        "--runs",
        type=int,
        nargs="+",
        default=[1],
        metavar="R",
        help="take runs 1 to R of each trainer: TRAINER, TRAINER_run2, ..., TRAINER_run<R>; one number for all, or one for "
        "each (default: 1)",
    )
    models.add_argument(
        "--train", action="store_true", help="run nnUNetv2_train for what is missing, and continue what was broken off"
    )
    models.add_argument(
        "--jobs",
        type=int,
        metavar="J",
        help="of --train on a CPU: J trainings side by side, of one thread each (default: one, of all cores)",
    )
    models.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="of --train and of all that predicts (default: auto)"
    )
    models.add_argument(
        "--measure",
        action="store_true",
        help="FLOPs of a patch, seconds of inference for one case, and on a GPU the memory of a training step",
    )
    models.add_argument("--shift", action="store_true", help="predict and score perturbed validation images too")
    models.add_argument(
        "--without-method",
        action="store_true",
        help="predict the validation cases again with the method left out of the trained networks: the Dice lost",
    )
    add_arguments(parser)
    folders = parser.add_argument_group("or folders of predictions; the first is the baseline")
    folders.add_argument(
        "--predictions",
        nargs="+",
        metavar="NAME=FOLDER",
        help="two names or more, the same cases in each folder; a name given again is another run",
    )
    folders.add_argument(
        "--reference",
        type=expanded,
        metavar="FOLDER",
        help="references, named as the predictions (with -d: default is nnU-Net's gt_segmentations)",
    )
    folders.add_argument(
        "--dataset-json", type=expanded, metavar="FILE", help="default: the one beside predictions or references"
    )
    scores = parser.add_argument_group("scores and statistics")
    scores.add_argument(
        "--surface-tolerance",
        type=float,
        default=2.0,
        metavar="MM",
        help="of the normalised surface Dice (default: 2 mm; pixels where the files have no spacing)",
    )
    scores.add_argument("--lesions", action="store_true", help="lesion-wise precision, recall and F1 too")
    scores.add_argument(
        "--lesion-overlap",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="of a lesion that one predicted component has to share (default: 0, any voxel)",
    )
    scores.add_argument(
        "--lesion-min-size", type=int, default=1, metavar="VOXELS", help="smaller ones are left out (default: 1)"
    )
    scores.add_argument(
        "--ensemble",
        action="store_true",
        help="the runs of each method together, as a method of its own, and where they disagree",
    )
    parser.add_argument("-np", dest="processes", type=int, metavar="N", help="scoring processes (default: cores, up to 8)")
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of the report: new, empty, or made by an earlier comparison",
    )


def expanded(text: str) -> Path:
    """The path; bash leaves a ~ behind = as it is."""
    return Path(text).expanduser()


def run(args: argparse.Namespace) -> int:
    """Checks everything that can be checked, trains what is missing (--train), scores and writes. 0 done, 130 interrupted."""
    check_numbers(args)
    check_mode(args)
    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))  # an editable install may not be registered
    slurm_options(args)
    from nnunet_l2g.compare.output import open_output
    from nnunet_l2g.nnunet import Interrupted

    try:
        return compare_folders(args, open_output) if args.predictions else compare_models(args, open_output)
    except (Interrupted, KeyboardInterrupt):
        print("\nnnunet_l2g compare: interrupted; what is finished is kept, the same command goes on there", file=sys.stderr)
        return 130


def compare_models(args: argparse.Namespace, open_output) -> int:
    """Trainings in nnUNet_results."""
    import pandas as pd

    from nnunet_l2g.compare.comparison import cost_table
    from nnunet_l2g.compare.fairness import model_warnings
    from nnunet_l2g.compare.measure import measure
    from nnunet_l2g.compare.models import choose_models, dataset_name
    from nnunet_l2g.compare.predicting import Predictor, raw_images, shift_table
    from nnunet_l2g.compare.results import read_models
    from nnunet_l2g.compare.training import check_folds
    from nnunet_l2g.compare.without_method import OPTION, choose_methods, dice_without
    from nnunet_l2g.nnunet import choose_device

    folds = check_fold_names(args.folds)
    dataset = dataset_name(args.dataset)
    methods = choose_models(dataset, args.trainers, args.plans, args.configurations, args.runs)
    models, first = [model for runs in methods for model in runs], [runs[0] for runs in methods]
    device = choose_device(args.device) if args.measure or args.shift or args.without_method else "cpu"
    if args.train:
        train(args, methods, folds, dataset, open_output)
    check_folds(models, folds, dataset)
    inputs = read_models(methods, folds, dataset, args.reference)
    inputs.warnings = model_warnings(models, folds, inputs.runs, dataset)
    images = raw_images(first, inputs, dataset, "--shift") if args.shift else {}
    changed = choose_methods(methods, folds) if args.without_method else []
    raw = raw_images([model for runs in changed for model in runs], inputs, dataset, OPTION) if changed else {}
    output = open_output(args.output)
    cost, shift, without = cost_table(inputs), None, None
    predictor = Predictor(inputs, dataset, device, output, options_of(args), processes_of(args))
    if args.measure:
        cost = cost.join(pd.DataFrame(measure(first, [method.runs[0] for method in inputs.methods], dataset, device)))
    if args.shift:
        shift = shift_table(predictor, first, images)
    if args.without_method:
        without = dice_without(predictor, changed, raw)
    return finish(args, inputs, output, cost, shift, without)


def train(args: argparse.Namespace, methods: list[list], folds: list[str], dataset: str, open_output) -> None:
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


def compare_folders(args: argparse.Namespace, open_output) -> int:
    """Folders of predictions."""
    from nnunet_l2g.compare.results import read_folders

    inputs = read_folders(parse_predictions(args.predictions), args.reference, args.dataset_json)
    return finish(args, inputs, open_output(args.output))


def options_of(args: argparse.Namespace):
    """What is scored."""
    from nnunet_l2g.evaluation.cases import Options

    return Options(args.surface_tolerance, args.lesions, args.lesion_overlap, args.lesion_min_size)


def processes_of(args: argparse.Namespace) -> int:
    """-np, or the cores up to 8."""
    from nnunet_l2g.nnunet import available_cores

    return args.processes or min(available_cores(), 8)


def finish(args: argparse.Namespace, inputs, output: Path, cost=None, shift=None, without=None) -> int:
    """Scores, prints and writes."""
    from nnunet_l2g.compare.comparison import compare
    from nnunet_l2g.compare.ensemble import add_ensembles
    from nnunet_l2g.compare.page import terminal
    from nnunet_l2g.compare.report import write_report

    disagreement = add_ensembles(inputs, output) if args.ensemble else None
    comparison = compare(
        inputs,
        options_of(args),
        processes=processes_of(args),
        command=shlex.join(["nnunet_l2g", *sys.argv[1:]]),
        more_runs=more_runs(sys.argv[1:]) if args.dataset else "--predictions NAME=FOLDER1 NAME=FOLDER2 ...",
        cost=cost,
        shift=shift,
        without=without,
        disagreement=disagreement,
    )
    page = write_report(comparison, output)
    print(f"\n{terminal(comparison)}\n\nreport  {page}")
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """UserError for a number out of its range."""
    for option, value, least in (
        ("--lesion-min-size", args.lesion_min_size, 1),
        ("-np", 1 if args.processes is None else args.processes, 1),
        ("--jobs", 1 if args.jobs is None else args.jobs, 1),
    ):
        if value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    for runs in args.runs:
        if not 1 <= runs <= MOST_RUNS:
            raise UserError(f"--runs {runs}: expected 1 to {MOST_RUNS}")
    if not 0 <= args.surface_tolerance < float("inf"):
        raise UserError(f"--surface-tolerance {args.surface_tolerance:g}: expected a distance of 0 or more")
    if not 0 <= args.lesion_overlap <= 1:
        raise UserError(f"--lesion-overlap {args.lesion_overlap:g}: expected a fraction between 0 and 1")


def check_mode(args: argparse.Namespace) -> None:
    """UserError unless either trainings or folders of predictions are named, with all that belongs to them."""
    if args.predictions:
        of_trainings = (args.train, args.measure, args.shift, args.without_method, args.runs != [1])
        if args.dataset or args.configurations or any(of_trainings):
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


def more_runs(arguments: list[str]) -> str:
    """The same command with three runs of each, trained where they are missing."""
    kept, of_runs = [], False
    for argument in arguments:
        of_runs = argument == "--runs" or (of_runs and argument.isdigit())
        if not of_runs and argument != "--train" and not argument.startswith("--runs="):
            kept.append(argument)
    return shlex.join(["nnunet_l2g", *kept, "--runs", "3", "--train"])


def parse_predictions(texts: list[str]) -> list[tuple[str, Path]]:
    """NAME=FOLDER each; a name used again is another run. UserError for another form, or fewer than two names."""
    named = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--predictions {text}: expected NAME=FOLDER")
        named.append((name, expanded(folder)))
    if len(dict(named)) < 2:
        raise UserError(f"--predictions {texts[0]}: nothing to compare it with; use at least two names, the baseline first")
    return named
