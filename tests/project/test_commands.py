"""A user's way through nnU-Net's own command lines, in processes of their own, on a tiny phantom.

Seven commands, each of which imports torch and starts worker processes: most of a minute.
"""

import os
import re
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
    assert len(re.findall(r"alpha \S+ changed_voxels \S+ references_used \S+", first + second)) == 3
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
