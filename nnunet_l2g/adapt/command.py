"""`nnunet_l2g adapt`: an unlabelled target for a labelled source, as plans to train with."""

from __future__ import annotations

import argparse

from nnunet_l2g.errors import UserError

TRAINER = "nnUNetTrainerGLUA"


def configure(parser: argparse.ArgumentParser) -> None:
    """-s, -t, -c, -p, -np; as nnU-Net's own options where it has them."""
    parser.add_argument(
        "-s",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="ID or name of the labelled dataset, planned and preprocessed by nnU-Net",
    )
    parser.add_argument(
        "-t",
        dest="target",
        required=True,
        metavar="TARGET",
        help="ID or name of the unlabelled dataset in nnUNet_raw: dataset.json and imagesTr (no labels)",
    )
    parser.add_argument(
        "-c",
        dest="configurations",
        nargs="+",
        metavar="CONFIGURATION",
        help="such as 2d 3d_fullres (default: all that the source is preprocessed for)",
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="of the source (default: nnUNetPlans)")
    parser.add_argument(
        "-np", dest="processes", type=int, metavar="N", help="worker processes (default: nnU-Net's, 8 or nnUNet_def_n_proc)"
    )


def run(args: argparse.Namespace) -> int:
    """Adapts and says how to train. 0 done; UserError for everything the user can mend."""
    if args.processes is not None and args.processes < 1:
        raise UserError(f"-np {args.processes}: expected 1 or more")
    from nnunetv2.configuration import default_num_processes  # imports torch, which --help should not wait for

    from nnunet_l2g.adapt.adapt import adapt

    processes = default_num_processes if args.processes is None else args.processes
    result = adapt(args.source, args.target, args.configurations, args.plans, processes)
    print(f"Adapted plans: {result.plans_file}" if result.changed else f"Nothing to do: {result.plans_file} is up to date")
    print("Train with:")
    for configuration in result.source.configurations:
        print(f"  nnUNetv2_train {result.source.id} {configuration} 0 -tr {TRAINER} -p {result.plans_name}")
    return 0
