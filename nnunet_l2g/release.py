"""`nnunet_l2g release`: a trained model as a zip that others can use without this package.

A network that computes what plain nnU-Net computes with the same weights (GLUA, its ablations, nnUNetTrainerDiceFocal,
nnUNetTrainerRandomIntensity) is written as nnU-Net's own model. Any other network is written as ONNX.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import zipfile
from pathlib import Path

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import write_json

CHECKPOINT = "checkpoint_final.pth"
TOLERANCE = 1e-3  # largest difference of ONNX Runtime's logits, relative to the largest logit


def configure(parser: argparse.ArgumentParser) -> None:
    """-m, -f, -chk, -o, --onnx."""
    parser.add_argument(
        "-m",
        dest="model",
        type=Path,
        required=True,
        metavar="MODEL_FOLDER",
        help="nnU-Net's <trainer>__<plans>__<configuration>",
    )
    parser.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="numbers, or all (default: every trained fold)")
    parser.add_argument("-chk", dest="checkpoint", default=CHECKPOINT, metavar="FILE", help=f"default: {CHECKPOINT}")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE.zip", help="the zip to write; a new file")
    parser.add_argument("--onnx", action="store_true", help="write the networks as ONNX, for programs without PyTorch")


def run(args: argparse.Namespace) -> int:
    """Writes the zip, whole or not at all, and says how to use it. UserError for everything the user can mend."""
    output = args.output.expanduser().absolute()
    if output.suffix != ".zip":
        raise UserError(f"-o {output}: expected the name of a zip file, such as model.zip")
    if output.exists():
        raise UserError(f"-o {output}: exists; it is not overwritten. Name another file")
    if not output.parent.is_dir():
        raise UserError(f"-o {output}: there is no folder {output.parent}; make it first")
    if args.onnx:
        check_onnx()
    folder = args.model.expanduser().absolute()
    folds = args.folds or sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{args.checkpoint}"))
    os.environ[VARIABLE] = with_trainers(os.environ.get(VARIABLE, ""))
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".nnunet_l2g_release_") as work:
        content = Path(work, "content")
        content.mkdir()
        for fold in folds or ["0"]:  # without any fold, load_model says what is missing
            print(f"fold {fold}", flush=True)
            advice = release_fold(folder, fold, args.checkpoint, content, args.onnx)
        archive = Path(work, output.name)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for path in sorted(content.rglob("*")):
                target.write(path, path.relative_to(content))
        os.replace(archive, output)
    print(f"{output}\n{advice.format(zip=output.name)}")
    return 0


def release_fold(folder: Path, fold: str, checkpoint: str, content: Path, onnx: bool) -> str:
    """Writes one fold of a model below `content`; returns what the receiver of the zip does with it."""
    import torch

    from nnunet_l2g.inspect.model import load_model

    model = load_model(folder, fold, checkpoint)
    configuration = model.checkpoint["init_args"]["configuration"]
    name = f"nnUNetTrainer__{model.plans.plans_name}__{configuration}"
    target = content if onnx else content / model.plans.dataset_name / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        if (folder / file).is_file():
            (target / file).write_bytes((folder / file).read_bytes())
    if onnx:
        write_onnx(model, target / f"fold_{fold}.onnx")
        write_json(target / "preprocessing.json", preprocessing(model))
        return "preprocessing.json in it says how an image becomes the network's input."
    plain = plain_network(model)
    if plain is None:
        raise UserError(
            f"-m {folder}: the network of {model.trainer.__name__} computes more than plain nnU-Net does. Add --onnx; "
            "or write it with nnU-Net's nnUNetv2_export_model_to_zip, and whoever receives it needs `pip install nnunet-l2g`"
        )
    (target / f"fold_{fold}").mkdir()
    released = {
        "network_weights": plain.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": configuration, "fold": fold},
        "inference_allowed_mirroring_axes": model.checkpoint.get("inference_allowed_mirroring_axes"),
    }
    torch.save(released, target / f"fold_{fold}" / CHECKPOINT)
    return (
        "Whoever receives it: nnUNetv2_install_pretrained_model_from_zip {zip}; then nnUNetv2_predict "
        f"-d {model.plans.dataset_name} -c {configuration} -p {model.plans.plans_name} ..., without this package"
    )


def plain_network(model):
    """nnU-Net's own network with the model's weights, or None if it does not compute the same logits."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_l2g.inspect.model import build_network

    heads = model.manager.num_segmentation_heads
    plain = build_network(nnUNetTrainer, model.plans, model.configuration, model.channels, heads, model.file).eval()
    weights = model.network.state_dict()
    try:
        plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
    except (KeyError, RuntimeError):  # a network of other weights
        return None
    image = example(model)
    with torch.inference_mode():
        return plain if torch.equal(plain(image), model.network(image)) else None


def example(model):
    """Noise of the shape of the network's input: (2, C, *patch)."""
    import torch

    return torch.randn(2, model.channels, *model.configuration.patch_size, generator=torch.Generator().manual_seed(0))


def preprocessing(model) -> dict:
    """What a program without nnU-Net has to know about a network's input and output."""
    values, plans = model.configuration, model.plans
    return {
        "input": "image: (batch, channels, *patch_size), float32; batch is free",
        "output": "logits: (batch, heads, *patch_size), before softmax (sigmoid if there are regions)",
        "patch_size": list(values.patch_size),
        "spacing": list(values.spacing),
        "transpose_forward": list(plans.transpose_forward),
        "channels": model.dataset.get("channel_names", model.dataset.get("modality")),
        "normalization_schemes": list(values.normalization_schemes),
        "use_mask_for_norm": list(values.use_mask_for_norm),
        "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
        "labels": model.dataset["labels"],
        "regions_class_order": model.dataset.get("regions_class_order"),
        "mirroring_axes": model.checkpoint.get("inference_allowed_mirroring_axes"),
    }


def check_onnx() -> None:
    """UserError unless what the export needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'--onnx: {error.name} is not installed; pip install "nnunet-l2g[onnx]"') from error


def write_onnx(model, path: Path) -> None:
    """Exports the network with a free batch size. UserError if ONNX Runtime's logits differ from PyTorch's."""
    import onnxruntime
    import torch

    image = example(model)
    torch.onnx.export(
        model.network,
        (image,),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        input_names=["image"],
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (image, image[:1]):
        with torch.inference_mode():
            expected = model.network(batch)
        (found,) = session.run(None, {"image": batch.numpy()})
        difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"--onnx: ONNX Runtime's logits differ from PyTorch's by {difference:.1e} of the largest, expected "
                f"{TOLERANCE:.0e} at most; nothing was written. Try another version of onnxruntime"
            )
