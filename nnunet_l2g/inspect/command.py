"""`nnunet_l2g inspect`: pictures and numbers of what a trained model does with one image."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_l2g import __version__
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import write_json


def configure(parser: argparse.ArgumentParser) -> None:
    """-m, -f, -chk, -i, -l, -o, --domain, --device."""
    parser.add_argument(
        "-m", dest="model", type=Path, required=True, metavar="MODEL_FOLDER",
        help="nnU-Net's <trainer>__<plans>__<configuration>, with dataset.json, plans.json and fold_<N>",
    )  # fmt: skip
    parser.add_argument("-f", dest="fold", required=True, metavar="FOLD", help="a number, or all")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "-i", dest="images", nargs="+", type=Path, required=True, metavar="IMAGE",
        help="CASE_0000.nii.gz (or the model's file ending); other channels are found beside it, or named in order",
    )  # fmt: skip
    parser.add_argument("-l", dest="label", type=Path, metavar="LABEL", help="the reference segmentation of this image")
    parser.add_argument(
        "-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new, empty, or made by an earlier inspection"
    )
    parser.add_argument("--domain", choices=("source", "target"), help="GLUA: which domain the image is of (default: source)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """One image through one model: everything is checked, then predicted, then drawn. UserError before anything is written."""
    from nnunet_l2g.lookup import quiet

    with quiet():  # torch and nnU-Net warn when they are imported, and --help should not wait for them
        import torch

        from nnunet_l2g.inspect.case import Slices, read_case
        from nnunet_l2g.inspect.glua import as_trained_on, inspect_glua, load_trainer_state
        from nnunet_l2g.inspect.grcsf import inspect_grcsf
        from nnunet_l2g.inspect.l2gnet import inspect_l2gnet
        from nnunet_l2g.inspect.maps import Output
        from nnunet_l2g.inspect.model import load_model
        from nnunet_l2g.inspect.segmentation import inspect_segmentation, predict

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"

    model = load_model(args.model.expanduser(), args.fold, args.checkpoint, args.domain)
    case = read_case(model, args.images, args.label)
    if model.method == "GLUA":
        kept = load_trainer_state(model)
        case = as_trained_on(model, kept, case)
    output = Output(args.output)

    print(f"{model.trainer.__name__}, fold {args.fold}: case {case.name} on {device}", flush=True)
    if model.domain is not None:
        schemes = ", ".join(model.configuration.normalization_schemes)
        print(f"  taken as an image of the {model.domain} (normalisation {schemes}); change it with --domain", flush=True)
    if case.warning:
        print(f"WARNING: {case.warning}", flush=True)

    slices = Slices(model, case, predict(model, case, device))
    summary = {
        "version": __version__,
        "checkpoint": str(model.file),
        "trainer": model.trainer.__name__,
        "method": model.method,
        "domain": model.domain,
        "images": [str(path) for path in case.files],
        "reference": None if args.label is None else str(args.label),
        "warning": case.warning,
        "slice": slices.index,
        "segmentation": inspect_segmentation(model, case, slices, output),
    }
    found: dict = {}
    if model.method == "L2GNet":
        summary["l2gnet"] = found = inspect_l2gnet(model, case, slices, device, output)
    elif model.method == "GRCSF":
        summary["grcsf"] = found = inspect_grcsf(model, case, slices, device, output)
    elif model.method == "GLUA":
        summary["glua"] = found = inspect_glua(model, kept, case, slices, device, output)
    write_json(output.add("summary.json", "every number of the figures"), summary | {"files": output.files})

    if "note" in found:
        print(f"NOTE: {found['note']}")
    width = max(map(len, output.files))
    print(output.folder, *(f"  {name:{width}}  {line}" for name, line in output.files.items()), sep="\n")
    return 0
