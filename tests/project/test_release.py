"""`nnunet_l2g release`: a model for others, equal voxel by voxel, written whole or not at all."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g import cli
from nnunet_l2g.autoload import VARIABLE, with_trainers


def release(model, output, *options):
    return cli.main(["release", "-m", str(model), "-o", str(output), *options])


def predict(model, images, output):
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(str(images), str(output), overwrite=True)


# What the receiver does, in a process in which any import of this package fails.
RECEIVER = """
import os, sys
sys.modules["nnunet_l2g"] = None
archive, images, output = sys.argv[1:]
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
install_model_from_zip_file(archive)
(model,) = os.scandir(os.path.join(os.environ["nnUNet_results"], "Dataset990_Tiny"))
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model.path, (0,), "checkpoint_final.pth")
predictor.predict_from_files_sequential(images, output, overwrite=True)
"""


@pytest.mark.commands
def test_plain_nnunet_installs_it_and_gives_the_same_segmentation(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, with_trainers(""))
    model = write_model(tmp_path / "models", "nnUNetTrainerGLUA")
    image, label = write_case(tmp_path / "images")
    label.unlink()  # every file in the folder is an image
    for name in ("ours", "theirs", "results"):
        (tmp_path / name).mkdir()
    predict(model, image.parent, tmp_path / "ours")
    assert release(model, tmp_path / "model.zip") == 0
    variables = {"nnUNet_results": str(tmp_path / "results"), "NNUNET_L2G_AUTOLOAD": "0", VARIABLE: ""}
    command = [sys.executable, "-c", RECEIVER, tmp_path / "model.zip", image.parent, tmp_path / "theirs"]
    done = subprocess.run(list(map(str, command)), env=os.environ | variables, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / name / "case.nii.gz")) for name in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)
    assert len(np.unique(ours)) > 1


def test_a_network_that_computes_more_is_refused_without_onnx(tmp_path, capsys):
    model = write_model(tmp_path / "models", "nnUNetTrainerL2GNet")
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"]["alpha"] += 1.0  # trained: the read-out is on
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    assert release(model, tmp_path / "model.zip") == 1
    message = capsys.readouterr().err
    assert "nnUNetTrainerL2GNet computes more than plain nnU-Net" in message
    assert "--onnx" in message
    assert not list(tmp_path.glob("*.zip")) + list(tmp_path.glob(".nnunet*"))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("model.tar", (), "expected the name of a zip file"),
        ("there.zip", (), "exists"),
        ("no/model.zip", (), "there is no folder"),
        ("model.zip", ("-f", "3"), "fold_3/checkpoint_final.pth is missing"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys, name, options, expected):
    (tmp_path / "there.zip").write_text("theirs")
    model = write_model(tmp_path / "models", "nnUNetTrainerGLUA")
    assert release(model, tmp_path / name, *options) == 1
    assert expected in capsys.readouterr().err
    assert (tmp_path / "there.zip").read_text() == "theirs"


@pytest.mark.long
@pytest.mark.parametrize("trainer", ["nnUNetTrainerL2GNet", "nnUNetTrainerGLUA"])
def test_onnx(tmp_path, trainer):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = write_model(tmp_path / "models", trainer, make_plans())
    assert release(model, tmp_path / "model.zip", "--onnx") == 0
    zipfile.ZipFile(tmp_path / "model.zip").extractall(tmp_path / "released")
    inputs = json.loads((tmp_path / "released" / "preprocessing.json").read_text())
    session = runtime.InferenceSession(tmp_path / "released" / "fold_0.onnx")
    (logits,) = session.run(None, {"image": np.zeros((3, 1, *inputs["patch_size"]), np.float32)})
    assert logits.shape == (3, len(inputs["labels"]), *inputs["patch_size"])
