"""GLUA through real command lines on the two-contrast phantom: adapted, killed in the second stage, continued, predicted."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from planned import ADAPTED, PLAIN, SIZE, SPACING, TARGET, Planned

from nnunet_l2g.phantom import write_dataset

pytestmark = [pytest.mark.commands, pytest.mark.slow]

TRAINER = "nnUNetTrainerGLUA_4epochs_2iterations"  # two epochs of translation
TRAIN = ("nnUNetv2_train", 981, "2d", 0, "-tr", TRAINER, "-p", ADAPTED, "-device", "cpu")


@pytest.fixture(scope="module")
def pair(planned, tmp_path_factory):
    """Labelled cine phantoms, and late enhancement phantoms without labels."""
    project = Planned(tmp_path_factory.mktemp("pair"))
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, PLAIN), project.path(kind, PLAIN))
    project.path("results").mkdir()
    write_dataset(project.path("raw"), 5, 2, "late_enhancement", seed=7, dataset_id=983, name="Late", size=SIZE,
                  spacing=SPACING)  # fmt: skip
    shutil.rmtree(project.path("raw", TARGET, "labelsTr"))
    return project


@pytest.fixture(scope="module")
def logs(pair):
    """Refused on plans without a target, killed in the segmenter's third epoch, finished."""
    refused = pair.run("nnUNetv2_train", 981, "2d", 0, "-tr", TRAINER, "-device", "cpu", fails=True)
    pair.run("nnunet_l2g", "adapt", "-s", 981, "-t", 983, "-c", "2d", "-np", 1)
    child, first = pair.start(*TRAIN), ""
    for line in child.stdout:
        first += line
        if re.search(r"Epoch 2\s*$", line):
            os.killpg(child.pid, signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    return refused, first, pair.run(*TRAIN, "--c")


def test_killed_in_the_second_stage_it_continues_there(pair, logs):
    refused, first, second = logs
    assert "name no target; make some with `nnunet_l2g adapt -s 981" in refused and "Epoch 0" not in refused
    assert "stage translation, epoch 2 of 2" in first and re.search(r"Epoch 2\s*$", first, re.M), first
    assert "stage translation" not in second and not re.search(r"Epoch 0\s*$", second, re.M)
    assert re.search(r"Epoch 3\s*$", second, re.M) and "Mean Validation Dice" in second
    assert re.search(r"gap_features_translated [\d.]+ mask_mean [\d.e-]+ domain_accuracy [\d.]+ alignment_weight 0.005", second)
    fold = pair.path("results", PLAIN, f"{TRAINER}__{ADAPTED}__2d", "fold_0")
    for name in ("checkpoint_final.pth", "stage_translation.pth", "progress_translation.png", "progress_glua.png"):
        assert (fold / name).stat().st_size > 1000
    assert not list(fold.glob("*.partial*"))
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert set(checkpoint["nnunet_l2g"]) == {"translator", "alignment", "random_state"}


def test_target_images_are_predicted_by_the_model_folder_alone(pair, logs, tmp_path):
    """Another results folder, without the stage's file and without what continuing needs; no preprocessed data."""
    model = pair.path("results", PLAIN, f"{TRAINER}__{ADAPTED}__2d")
    results = tmp_path / "results" / PLAIN / model.name
    shutil.copytree(model, results, ignore=shutil.ignore_patterns("stage_*", "validation", "*.png", "*.txt"))
    file = results / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["nnunet_l2g"]
    torch.save(checkpoint, file)
    pair.run(
        "nnUNetv2_predict", "-d", 981, "-c", "2d", "-f", 0, "-tr", TRAINER, "-p", ADAPTED, "-device", "cpu",
        "-npp", 1, "-nps", 1, "--disable_tta", "-i", pair.path("raw", TARGET, "imagesTs"), "-o", tmp_path / "out",
        nnUNet_results=str(tmp_path / "results"), nnUNet_preprocessed=str(tmp_path / "nothing"),
    )  # fmt: skip
    predictions = [sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted((tmp_path / "out").glob("*.nii.gz"))]
    assert len(predictions) == 2 and all(set(np.unique(p)) <= {0, 1, 2, 3} for p in predictions)
