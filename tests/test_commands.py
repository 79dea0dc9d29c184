"""A user's way through nnU-Net's own command lines, in processes of their own, on a tiny phantom."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import SimpleITK as sitk
from planned import PLAIN

pytestmark = [pytest.mark.commands, pytest.mark.slow]

TRAINER = "nnUNetTrainerL2GNet_3epochs_2iterations"
TRAIN = ("nnUNetv2_train", 981, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu")
PREDICT = ("nnUNetv2_predict", "-d", 981, "-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "-device", "cpu", "-npp", 1, "-nps", 1)


@pytest.fixture(scope="module")
def killed_and_continued(planned):
    """Trains, is killed once epoch 1 has ended, continues with --c; the two logs."""
    child = planned.start(*TRAIN)
    first = ""
    for line in child.stdout:
        first += line
        if re.search(r"Epoch 2\s*$", line):  # epoch 1 is over, its checkpoint written
            os.killpg(child.pid, signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    assert "Epoch 2" in first, first
    return first, planned.run(*TRAIN, "--c")


@pytest.fixture(scope="module")
def model(planned, killed_and_continued):
    return planned.path("results", PLAIN, f"{TRAINER}__nnUNetPlans__3d_fullres")


def predict(planned, output, **variables):
    planned.run(*PREDICT, "-i", planned.path("raw", PLAIN, "imagesTs"), "-o", output, **variables)
    files = sorted(output.glob("*.nii.gz"))
    assert len(files) == 2
    return {file.name: sitk.ReadImage(str(file)) for file in files}


def test_a_killed_training_continues_where_it_stopped_and_validates(killed_and_continued, model):
    first, second = killed_and_continued
    assert re.search(r"Epoch 0\s", first) and not re.search(r"Epoch [01]\s*$", second, re.M)
    assert re.search(r"Epoch 2\s*$", second, re.M) and "Mean Validation Dice" in second
    assert len(re.findall(r"perplexity \S+ codes_used \S+ kept_variance \S+", first + second)) == 3
    fold = model / "fold_0"
    assert (fold / "validation" / "summary.json").exists()
    assert (fold / "checkpoint_final.pth").exists() and not (fold / "checkpoint_latest.pth").exists()
    assert (fold / "progress.png").exists() and (fold / "progress_l2gnet.png").stat().st_size > 10_000
    assert not list(fold.glob("*.partial*")) and not list(fold.glob("previous_*"))


def test_model_exports_and_predicts_identically_elsewhere(planned, model, tmp_path):
    here = predict(planned, tmp_path / "here")
    reference = sitk.ReadImage(str(next(planned.path("raw", PLAIN, "imagesTs").glob("*_0000.nii.gz"))))
    assert next(iter(here.values())).GetSpacing() == pytest.approx(reference.GetSpacing())
    archive = tmp_path / "model.zip"
    planned.run("nnUNetv2_export_model_to_zip", "-d", 981, "-o", archive, "-c", "3d_fullres", "-tr", TRAINER, "-f", 0)
    elsewhere = tmp_path / "results_elsewhere"
    elsewhere.mkdir()
    planned.run("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(elsewhere))
    there = predict(planned, tmp_path / "there", nnUNet_results=str(elsewhere))
    for name, image in here.items():
        assert np.array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(there[name])), name


def test_another_trainers_checkpoint_is_refused_before_an_epoch(planned, model, tmp_path):
    """A user copies a checkpoint into the twin's folder to save time."""
    twin = "nnUNetTrainerL2GNetOneReference_3epochs_2iterations"
    fold = model.parent / f"{twin}__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    shutil.copy(model / "fold_0" / "checkpoint_best.pth", fold / "checkpoint_latest.pth")
    output = planned.run("nnUNetv2_train", 981, "3d_fullres", 0, "-tr", twin, "-device", "cpu", "--c", fails=True)
    assert "iterations: checkpoint 20, here 0" in output and "Epoch" not in output


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nnUNetTrainerL2GNet_20epoch_", "it has nnUNetTrainerL2GNet_<N>epochs"),
        ("nnUNetTrainerL2GNet_20epoch_", "Could not find requested nnunet trainer nnUNetTrainerL2GNet_20epoch_"),
        ("nnUNetTrainerL2GNet_0epochs", "N epochs and M iterations have to be at least 1"),
    ],
)
def test_a_wrong_trainer_name_is_refused_at_once(planned, name, named):
    output = planned.run("nnUNetv2_train", 981, "3d_fullres", 0, "-tr", name, "-device", "cpu", fails=True)
    assert named in output and "Epoch" not in output
