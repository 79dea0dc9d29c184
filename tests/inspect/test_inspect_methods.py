"""What `nnunet_l2g inspect` shows of L2GNet and GRCSF: which files, and that they are right."""

import numpy as np
import pytest
import torch
from test_inspect import SEGMENTATION, check_files, inspect, read_map, read_summary
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.architectures.grcsf.picture import draw_compensation
from nnunet_l2g.inspect.case import read_case

torch.set_num_threads(1)
WHOLE = (10, 46, 39)  # write_case's image of this shape is cropped to the patch 8 x 32 x 32
SEGMENTATION = SEGMENTATION | {"errors.nii.gz"}


@pytest.mark.parametrize(
    ("trainer", "dims", "shown"),
    [
        ("nnUNetTrainerL2GNet", 2, True),
        ("nnUNetTrainerL2GNet", 3, True),
        ("nnUNetTrainerL2GNetNoReadout_3epochs", 2, True),
        ("nnUNetTrainerL2GNetAuxiliaryHead", 2, False),
    ],
)
def test_l2gnet_and_its_ablations_show_what_they_have(tmp_path, trainer, dims, shown):
    plans = make_plans((8, 32, 32)[-dims:], (4.0, 2.0, 2.0)[-dims:])
    model, (image, label) = write_model(tmp_path, trainer, plans), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    assert check_files(tmp_path / "out", image) == SEGMENTATION | ({"references.nii.gz", "references.png"} if shown else set())
    found = read_summary(tmp_path / "out")["l2gnet"]
    assert found["level"] == 1 and ("alpha" in found) == ("NoReadout" not in trainer)
    assert ("note" in found) != shown
    if shown:
        nearest, reference = read_map(tmp_path / "out/references.nii.gz"), read_map(label)
        for value, name in ((1, "organ"), (2, "lesion")):
            shares = [(nearest[reference == value] == 5 * value + number).mean() for number in range(1, 6)]
            assert found["structures"][name] == pytest.approx(shares, abs=1e-3)


def explain(folder, image):
    """What the network does with an image that is one patch, and where that patch lies in the image."""
    model = open_model(folder)
    case = read_case(model, [image], None)
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    return model.network.explain(torch.from_numpy(case.data)[None]), inside


def test_references_lie_where_their_tokens_are(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerL2GNet")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    explained, inside = explain(model, image)
    nearest = explained["cosines"][0].argmax(0).numpy()
    for axis, size in enumerate((8, 32, 32)):
        nearest = nearest.repeat(size // nearest.shape[axis], axis)
    written = read_map(tmp_path / "out/references.nii.gz").astype(int)
    assert np.array_equal(written[inside], nearest + 1) and (written > 0).sum() == nearest.size


RECONSTRUCTIONS, RESIDUALS = {"reconstruction_50", "reconstruction_75"}, {"residual_50", "residual_75"}


@pytest.mark.parametrize(
    ("trainer", "maps"),
    [
        ("nnUNetTrainerGRCSFNoGCU", RECONSTRUCTIONS | RESIDUALS | {"importance"}),
        ("nnUNetTrainerGRCSFNoRCU", {"compensation"}),
        ("nnUNetTrainerGRCSFDoGResidual", RESIDUALS | {"compensation", "importance"}),
        ("nnUNetTrainerDiceFocal", set()),
    ],
)
def test_ablations_of_grcsf_show_what_they_have(tmp_path, trainer, maps):
    model = write_model(tmp_path, trainer, make_plans((32, 32), (2.0, 2.0)))
    image, label = write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    expected = {f"{name}.nii.gz" for name in maps} | ({"compensation.png"} if maps else set())
    assert check_files(tmp_path / "out", image) == SEGMENTATION | expected
    assert ("note" in read_summary(tmp_path / "out")["grcsf"]) == (not maps)


def test_grcsf_maps_are_the_networks(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerGRCSF")
    image, _ = write_case(tmp_path / "in", WHOLE, (4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out") == 0
    maps = RECONSTRUCTIONS | RESIDUALS | {"compensation", "importance"}
    assert check_files(tmp_path / "out", image) >= {f"{name}.nii.gz" for name in maps}
    explained, inside = explain(model, image)
    for name, expected in (("residual_75", explained["map_75"][0, 1]), ("reconstruction_50", explained["mean_50"][0, 0])):
        assert np.allclose(read_map(tmp_path / f"out/{name}.nii.gz")[inside], expected, atol=1e-4), name


def test_the_trainers_picture_of_a_patch(tmp_path):
    shape = (4, 16, 16)
    reference = np.zeros(shape, np.int16)
    reference[2, 4:8, 4:8] = 1
    image = np.random.default_rng(0).random((1, *shape))
    explained = {"map_50": np.zeros((3, *shape)), "importance_0": np.ones((1, 1, 2, 2)), "mean_50": image}
    draw_compensation(image, reference, reference, explained, {1: "lesion"}, "a case", f"{tmp_path}/out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
