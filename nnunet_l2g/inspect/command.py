"""`nnunet_l2g inspect`: pictures and numbers of what a trained model does with one image, by the trainer in its checkpoint."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """-m, -f, -chk, -i, -l, -o, --domain, --device."""
    parser.add_argument(
        "-m", dest="model", type=Path, required=True, metavar="MODEL_FOLDER",
        help="nnU-Net's <trainer>__<plans>__<configuration>, with dataset.json, plans.json and fold_<N>",
    )  # fmt: skip
    parser.add_argument("-f", dest="fold", required=True, metavar="FOLD", help="a number, or all")
    parser.add_argument(
        "-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth"
    )
    parser.add_argument(
        "-i", dest="images", nargs="+", type=Path, required=True, metavar="IMAGE",
        help="CASE_0000.nii.gz (or the model's file ending); other channels are found beside it, or named in order",
    )  # fmt: skip
    parser.add_argument("-l", dest="label", type=Path, metavar="LABEL", help="the reference segmentation of this image")
    parser.add_argument(
        "-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new, empty, or made by an earlier inspection"
    )
    parser.add_argument("--domain", choices=("source", "target"), help="GLUA: which domain the image is of (default: source)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Checks everything, predicts, measures, draws. 0 done; UserError for everything the user can mend."""
    if not re.fullmatch(r"all|\d{1,4}", args.fold):
        raise UserError(f"-f {args.fold}: expected the number of a fold, or all")
    from nnunet_l2g.lookup import quiet
    from nnunet_l2g.nnunet import choose_device

    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))  # an editable install may not be registered
    with quiet():  # imports torch, which --help should not wait for, and which may warn
        from nnunet_l2g.inspect.inspection import inspect_case

    fold = args.fold if args.fold == "all" else str(int(args.fold))
    device = choose_device(args.device)
    output = inspect_case(
        args.model.expanduser(), fold, args.checkpoint, args.images, args.label, args.output, args.domain, device
    )
    print(f"{output.folder}\n{output.index()}")
    return 0
