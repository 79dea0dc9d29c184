"""`nnunet_l2g adapt`: its options, and what it prints at the end."""

from __future__ import annotations

import argparse

from nnunet_l2g.errors import UserError

TRAINER = "nnUNetTrainerGLUA"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds -s, -t, -c, -p and -np. -c, -p and -np mean the same as in nnU-Net's commands."""
    source = "ID or name of the labelled dataset, planned and preprocessed by nnU-Net"
    parser.add_argument("-s", dest="source", required=True, metavar="SOURCE", help=source)
    target = "ID or name of the unlabelled dataset in nnUNet_raw: dataset.json and imagesTr (no labels)"
    parser.add_argument("-t", dest="target", required=True, metavar="TARGET", help=target)
    names = "such as 2d 3d_fullres (default: all that the source is preprocessed for)"
    parser.add_argument("-c", dest="configurations", nargs="+", metavar="CONFIGURATION", help=names)
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="of the source (default: nnUNetPlans)")
    workers = "worker processes (default: nnU-Net's, 8 or nnUNet_def_n_proc)"
    parser.add_argument("-np", dest="processes", type=int, metavar="N", help=workers)


def run(args: argparse.Namespace) -> int:
    """Adapts the source's plans and prints the commands that train with them. Returns 0; see `adapt` for errors."""
    if args.processes is not None and args.processes < 1:
        raise UserError(f"-np {args.processes}: expected 1 or more")
    from nnunetv2.configuration import default_num_processes  # imports torch, which --help should not wait for

    from nnunet_l2g.adapt.plans import adapt

    processes = default_num_processes if args.processes is None else args.processes
    adapted = adapt(args.source, args.target, args.configurations, args.plans, processes)
    print(f"Adapted plans: {adapted.path}" if adapted.changed else f"Nothing to do: {adapted.path} is up to date")
    print("Train with:")
    for configuration in adapted.configurations:
        print(f"  nnUNetv2_train {adapted.source_id} {configuration} 0 -tr {TRAINER} -p {adapted.path.stem}")
    return 0
