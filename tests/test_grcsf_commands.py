"""GRCSF through nnU-Net's own command lines: killed in both stages, continued, predicted from the model folder alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from planned import PLAIN

pytestmark = [pytest.mark.commands, pytest.mark.slow]

TRAINER = "nnUNetTrainerGRCSF_4epochs_2iterations"  # two epochs of the autoencoder
TRAIN = ("nnUNetv2_train", 981, "2d", 0, "-tr", TRAINER, "-device", "cpu")


def kill_at(planned, pattern, *arguments):
    """Starts the training, kills all of it at the first line with the pattern; the log."""
    child = planned.start(*TRAIN, *arguments)
    log = ""
    for line in child.stdout:
        log += line
        if re.search(pattern, line):
            os.killpg(child.pid, signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    assert re.search(pattern, log), log
    return log


@pytest.fixture(scope="module")
def logs(planned):
    """Killed in the stage, killed in the segmenter, finished."""
    first = kill_at(planned, "stage autoencoder, epoch 2 of 2")  # the first epoch's checkpoint is written
    second = kill_at(planned, r"Epoch 2\s*$", "--c")
    return first, second, planned.run(*TRAIN, "--c")


@pytest.fixture(scope="module")
def model(planned, logs):
    return planned.path("results", PLAIN, f"{TRAINER}__nnUNetPlans__2d")


def test_each_kill_continues_in_its_stage(logs, model):
    first, second, third = logs
    assert "Epoch 0" not in first
    assert re.search("stage autoencoder: [12] of 2 epochs are in", second) and "epoch 1 of 2" not in second
    assert re.search(r"Epoch 0\s*$", second, re.M)
    assert "stage autoencoder" not in third and not re.search(r"Epoch [01]\s*$", third, re.M)
    assert "Mean Validation Dice" in third
    fold = model / "fold_0"
    for name in (
        "checkpoint_final.pth",
        "stage_autoencoder.pth",
        "progress_autoencoder.png",
        "progress_grcsf.png",
        "compensation.png",
    ):
        assert (fold / name).stat().st_size > 1000
    assert not list(fold.glob("*.partial*")) and not list(fold.glob("previous_*"))


def test_prediction_needs_the_model_folder_only_and_is_deterministic(planned, model, tmp_path):
    """Another results folder, without the stage's file."""
    results = tmp_path / "results" / PLAIN / model.name
    shutil.copytree(model, results, ignore=shutil.ignore_patterns("stage_*", "validation", "*.png", "*.txt"))
    images = []
    for name in ("one", "two"):
        planned.run(
            "nnUNetv2_predict", "-d", 981, "-c", "2d", "-f", 0, "-tr", TRAINER, "-device", "cpu", "-npp", 1, "-nps", 1,
            "-i", planned.path("raw", PLAIN, "imagesTs"), "-o", tmp_path / name, nnUNet_results=str(tmp_path / "results"),
        )  # fmt: skip
        images.append([sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted((tmp_path / name).glob("*.nii.gz"))])
    assert len(images[0]) == 2 and all(np.array_equal(a, b) for a, b in zip(*images, strict=True))


def test_a_broken_stage_is_refused_before_an_epoch(planned, model):
    fold = model.parent / "nnUNetTrainerGRCSFNoGCU_4epochs_2iterations__nnUNetPlans__2d" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "stage_autoencoder.pth").write_bytes((model / "fold_0" / "stage_autoencoder.pth").read_bytes()[:5000])
    output = planned.run(
        "nnUNetv2_train", 981, "2d", 0, "-tr", fold.parent.name.split("__")[0], "-device", "cpu", "--c", fails=True
    )
    assert "stage_autoencoder.pth cannot be read" in output and "Epoch" not in output


def test_the_gate_reads_the_stage_and_compares_with_edges(planned, model, tmp_path):
    """benchmarks/residual_gate.py, for one class on the validation cases."""
    script = Path(__file__).parents[1] / "benchmarks" / "residual_gate.py"
    command = [sys.executable, script, "--model", model, "--device", "cpu", "-o", tmp_path / "gate.json"]
    subprocess.run(list(map(str, command)), check=True, env=planned.environment, stdout=subprocess.DEVNULL)
    result = json.loads((tmp_path / "gate.json").read_text())
    assert result["epochs"] == 2 and set(result["classes"]) <= {"left_ventricle", "myocardium", "right_ventricle"}
    for maps in result["classes"].values():
        assert {"autoencoder 50 %", "autoencoder 75 %, smoothed 2", "difference of Gaussians 1", "x - blur 8"} <= set(maps)
        assert all(0 < found["average_precision"] <= 1 and found["ratio"] > 0 for found in maps.values())
