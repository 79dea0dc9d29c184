"""What `nnunet_l2g inspect` shows of L2GNet and GRCSF: which files, and that their numbers are right."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import RICH
from test_inspect import check_files, inspect, read_map, read_summary
from test_trainers import make
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.evaluation.labels import read_labels
from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.compensation import draw_compensation
from nnunet_l2g.inspect.residuals import inside_and_around
from nnunet_l2g.trainers import nnUNetTrainerL2GNet

torch.set_num_threads(1)
WHOLE = (10, 46, 39)  # write_case's image of this shape is cropped to the patch 8 x 32 x 32


# ---- L2GNet ----


PARTS = {"references.nii.gz", "references.png", "reference_patches.png"}
FORMS = {"nnUNetTrainerL2GNet": PARTS, "nnUNetTrainerL2GNetNoReadout_3epochs": PARTS, "nnUNetTrainerL2GNetAuxiliaryHead": set()}


@pytest.mark.parametrize(("trainer", "dims"), [(trainer, 2) for trainer in FORMS] + [("nnUNetTrainerL2GNet", 3)])
def test_l2gnet_and_its_ablations_show_what_they_have(tmp_path, trainer, dims):
    plans = make_plans((8, 32, 32)[-dims:], (4.0, 2.0, 2.0)[-dims:])
    model, (image, label) = write_model(tmp_path, trainer, plans), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    expected = FORMS[trainer] | {"prediction.nii.gz", "errors.nii.gz", "segmentation.png", "summary.json"}
    assert set(check_files(tmp_path / "out", image)) == expected
    found = read_summary(tmp_path / "out")["l2gnet"]
    assert found["level"] == 1 and ("alpha" in found) == ("NoReadout" not in trainer)
    assert ("note" in found) == ("AuxiliaryHead" in trainer)
    for structure in found.get("structures", {}).values():
        assert sum(structure["shares"]) == pytest.approx(structure["own"], abs=1e-3)


def test_a_checkpoint_that_the_trainer_wrote_regions_too(nnunet_folders, tmp_path):
    trainer = make(nnunet_folders, nnUNetTrainerL2GNet, RICH, "2d")
    trainer.initialize()
    model = Path(trainer.output_folder_base)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (model / f"{name}.json").write_text(json.dumps(content))
    trainer.logger.log("train_losses", np.float32(1), 0)
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    image = nnunet_folders.path("raw", RICH, "imagesTs", "phantom_ts000_0000.nii.gz")
    label = nnunet_folders.path("raw", RICH, "labelsTs", "phantom_ts000.nii.gz")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    assert set(check_files(tmp_path / "out", image)) >= {"references_0.nii.gz", "references.png", "reference_patches.png"}


def test_references_lie_where_their_tokens_are(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerL2GNet")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    opened = open_model(model)
    case = read_case(opened, [image], None)
    nearest = opened.network.explain(torch.from_numpy(case.data)[None])["cosines"][0].argmax(0).numpy()
    for axis, size in enumerate((8, 32, 32)):
        nearest = nearest.repeat(size // nearest.shape[axis], axis)
    written = read_map(tmp_path / "out/references.nii.gz").astype(int)
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    assert np.array_equal(written[inside], nearest + 1) and (written > 0).sum() == nearest.size


# ---- GRCSF ----

RECONSTRUCTIONS, RESIDUALS = {"reconstruction_50", "reconstruction_75"}, {"residual_50", "residual_75"}


@pytest.mark.parametrize(
    ("trainer", "maps"),
    [
        ("nnUNetTrainerGRCSF", RECONSTRUCTIONS | RESIDUALS | {"compensation", "importance"}),
        ("nnUNetTrainerGRCSFNoGCU", RECONSTRUCTIONS | RESIDUALS | {"importance"}),
        ("nnUNetTrainerGRCSFNoRCU", {"compensation"}),
        ("nnUNetTrainerGRCSFDoGResidual", RESIDUALS | {"compensation", "importance"}),
        ("nnUNetTrainerDiceFocal", set()),
    ],
)
def test_grcsf_and_its_twins_show_what_they_have(tmp_path, trainer, maps):
    model = write_model(tmp_path, trainer, make_plans((32, 32), (2.0, 2.0)))
    image, label = write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    written = {name.removesuffix(".nii.gz") for name in files if name.endswith(".nii.gz")}
    assert written == maps | {"prediction", "errors"}
    assert ("compensation.png" in files) == bool(maps)
    found = read_summary(tmp_path / "out")["grcsf"]
    assert ("inside_around" in found) == ("residual_50" in maps) == ("residual_inside_around.png" in files)
    assert ("note" in found) == (not maps)


def test_grcsf_maps_are_the_networks(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerGRCSF")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    opened = open_model(model)
    case = read_case(opened, [image], None)
    explained = opened.network.explain(torch.from_numpy(case.data)[None])
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    for name, expected in (("residual_75", explained["map_75"][0, 1]), ("reconstruction_50", explained["mean_50"][0, 0])):
        assert np.allclose(read_map(tmp_path / f"out/{name}.nii.gz")[inside], expected, atol=1e-4), name


def test_inside_and_around(tmp_path):
    """Spacing 4 x 1 mm: the shell of 10 mm reaches two rows or ten columns."""
    labels = read_labels(write_model(tmp_path) / "dataset.json")
    reference = np.zeros((9, 31), np.int16)
    reference[4, 15] = 2
    residual = np.full((9, 31), 7.0)
    residual[4, 15] = 3.0
    residual[2:7, 5:26][np.add.outer(np.arange(-2, 3) ** 2 * 16, np.arange(-10, 11) ** 2) <= 100] = 1.5
    residual[4, 15] = 3.0
    found = inside_and_around({"r": residual}, reference, labels, (4.0, 1.0))
    assert found["lesion"] == {"voxels": 1, "r": {"inside": 3.0, "around": 1.5, "ratio": 2.0}}
    assert found["organ"] == {"voxels": 0, "r": {"inside": None, "around": None, "ratio": None}}


def test_the_trainers_picture_of_a_patch(tmp_path):
    shape = (4, 16, 16)
    reference = np.zeros(shape, np.int16)
    reference[2, 4:8, 4:8] = 1
    image = np.random.default_rng(0).random((1, *shape))
    explained = {"map_50": np.zeros((3, *shape)), "importance_0": np.ones((1, 1, 2, 2)), "mean_50": image}
    draw_compensation(image, reference, reference, explained, {1: "lesion"}, "a case", f"{tmp_path}/out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
