"""What `nnunet_l2g inspect` shows of L2GNet and GRCSF: which files, and that they are right."""

import numpy as np
import pytest
import torch
from test_inspect import SEGMENTATION, check_files, inspect, read_map, read_summary
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.inspect.case import read_case

torch.set_num_threads(1)
REFERENCES = {"references.nii.gz", "references.png"}
RECONSTRUCTIONS = {"reconstruction_50.nii.gz", "reconstruction_75.nii.gz", "compensation.png"}
RESIDUALS = {"residual_50.nii.gz", "residual_75.nii.gz", "compensation.png"}
GCU, RCU = {"compensation.nii.gz", "compensation.png"}, {"importance.nii.gz", "compensation.png"}


@pytest.mark.parametrize(
    ("trainer", "files"),
    [
        ("nnUNetTrainerL2GNet", REFERENCES),
        ("nnUNetTrainerL2GNetNoReadout_3epochs", REFERENCES),
        ("nnUNetTrainerL2GNetAuxiliaryHead", set()),
        ("nnUNetTrainerGRCSFNoGCU", RECONSTRUCTIONS | RESIDUALS | RCU),
        ("nnUNetTrainerGRCSFNoRCU", GCU),
        ("nnUNetTrainerGRCSFDoGResidual", RESIDUALS | GCU | RCU),
        ("nnUNetTrainerDiceFocal", set()),
    ],
)
def test_ablations_show_what_they_have(tmp_path, trainer, files):
    model = write_model(tmp_path, trainer, make_plans((32, 32), (2.0, 2.0)))
    image, label = write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    assert check_files(tmp_path / "out", image) == SEGMENTATION | {"errors.nii.gz"} | files
    summary = read_summary(tmp_path / "out")
    found = summary[summary["method"].lower()]
    assert ("note" in found) == (not files)
    if files == REFERENCES:
        assert ("alpha" in found) == ("NoReadout" not in trainer)
        nearest, reference = read_map(tmp_path / "out/references.nii.gz"), read_map(label)
        for value, name in ((1, "organ"), (2, "lesion")):
            shares = [(nearest[reference == value] == 5 * value + number).mean() for number in range(1, 6)]
            assert found["structures"][name] == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize("trainer", ["nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF"])
def test_maps_are_the_networks(tmp_path, trainer):
    """On an image that is cropped to exactly one patch, 8 x 32 x 32."""
    folder = write_model(tmp_path, trainer)
    image, _ = write_case(tmp_path / "in", (10, 46, 39), (4.0, 2.0, 2.0))
    assert inspect(folder, image, tmp_path / "out") == 0
    files = check_files(tmp_path / "out", image) - SEGMENTATION
    model = open_model(folder)
    case = read_case(model, [image], None)
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    maps = {name: read_map(tmp_path / "out" / name)[inside] for name in files if name.endswith(".nii.gz")}
    explained = model.network.explain(torch.from_numpy(case.data)[None])
    if "references.nii.gz" in maps:
        nearest = explained["cosines"][0].argmax(0).numpy()
        for axis, size in enumerate((8, 32, 32)):
            nearest = nearest.repeat(size // nearest.shape[axis], axis)
        assert np.array_equal(maps["references.nii.gz"], nearest + 1)
    else:
        assert files == RECONSTRUCTIONS | RESIDUALS | GCU | RCU
        assert np.allclose(maps["residual_75.nii.gz"], explained["map_75"][0, 1], atol=1e-4)
        assert np.allclose(maps["reconstruction_50.nii.gz"], explained["mean_50"][0, 0], atol=1e-4)
