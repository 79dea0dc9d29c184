"""What `nnunet_l2g adapt` refuses: one sentence each, before anything is written."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from small_source import CASES, edit_json
from tiny_model import make_plans

from nnunet_l2g.adapt.datasets import find_source, find_target
from nnunet_l2g.adapt.fingerprint import CaseSummary, check_geometry, read_case, summarise_case
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.training.adapted_plans import TARGET_KEY


def target_json(**entries):
    return lambda f: edit_json(f.target / "dataset.json", lambda content: content.update(entries))


def rename_first(name):
    return lambda f: (f.images / f"{CASES[0]}_0000.nii.gz").rename(f.images / name)


def first_is_a_link_to_nothing(f):
    (f.images / f"{CASES[0]}_0000.nii.gz").unlink()
    os.symlink("gone", f.images / f"{CASES[0]}_0000.nii.gz")


def add_cascade(f):
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    edit_json(f.plans, lambda plans: plans["configurations"].update({"3d_cascade_fullres": cascade}))


def unlink(pattern):
    return lambda f: [path.unlink() for path in f.source.glob(pattern)]


SOURCE, PREPROCESS = "Dataset990_Tiny", "nnUNetv2_preprocess -d 990 -plans_name nnUNetPlans -c 3d_fullres"
REFUSED = {
    "channels": (target_json(channel_names={"0": "a", "1": "b"}), "", f"names 2 channel(s) ['a', 'b'], the source {SOURCE}"),
    "a channel is missing": (lambda f: (f.images / "case_1_0001.nii.gz").touch(), "", "Dataset991_Other has 1 image file(s)"),
    "file ending": (target_json(file_ending=".mha"), "", "file_ending '.mha', the source has '.nii.gz'"),
    "version 1": (lambda f: (f.target / "dataset.json").write_text('{"modality": {"0": "MRI"}}'), "", "of nnU-Net version 1"),
    "no dataset.json": (lambda f: (f.target / "dataset.json").unlink(), "", "dataset.json is missing"),
    "no imagesTr": (lambda f: shutil.rmtree(f.images), "", "imagesTr holds no image ending in .nii.gz"),
    "no raw data": (lambda f: shutil.rmtree(f.target), "", "-t 991: no such dataset"),
    "odd name": (rename_first("case.nii.gz"), "", "case.nii.gz: expected CASE_0000.nii.gz"),
    "a name in _seg": (rename_first("a_seg_0000.nii.gz"), "", "whose names end in _seg: a_seg. nnU-Net keeps"),
    "a link to nothing": (first_is_a_link_to_nothing, "", "case_0_0000.nii.gz is no file"),
    "the source itself": (None, "-t 990", f"-t 990 is the source {SOURCE} itself"),
    "the source by name": (None, f"-t {SOURCE}", f"-t {SOURCE} is the source {SOURCE} itself"),
    "unknown": (None, "-s 77", "-s 77: no such dataset"),
    "no ID": (None, "-t late", "-t late: no such dataset"),
    "no process": (None, "-np 0", "-np 0: expected 1 or more"),
    "not planned": (lambda f: f.plans.unlink(), "", "has no plans nnUNetPlans: run `nnUNetv2_plan_and_preprocess -d 990`"),
    "not preprocessed": (lambda f: shutil.rmtree(f.source / "tiny"), "", f"{SOURCE} is not preprocessed for any of 3d_fullres"),
    "empty": (unlink("tiny/*"), "", f"is not preprocessed for 3d_fullres: 3 of 3 cases are missing in .*; run `{PREPROCESS}`"),
    "half preprocessed": (unlink("tiny/case_1*"), "", "is not preprocessed for 3d_fullres: 1 of 3 cases"),
    "no segmentations": (unlink("gt_segmentations/*"), "", "gt_segmentations is missing or empty"),
    "a source case in _seg": (lambda f: (f.source / "gt_segmentations" / "b_seg.nii.gz").touch(), "", "end in _seg: b_seg."),
    "no such configuration": (None, "-c 2d", "-c 2d: not in the plans nnUNetPlans of Dataset990_Tiny; choose from 3d_fullres"),
    "cascade": (add_cascade, "-c 3d_cascade_fullres", "-c 3d_cascade_fullres: a cascade needs"),
    "adapted plans": (lambda f: edit_json(f.plans, lambda plans: plans.update({TARGET_KEY: {}})), "", "are adapted already"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(small_source, capsys, name):
    change, options, words = REFUSED[name]
    if change:
        change(small_source)
    before = sorted(small_source.source.parent.rglob("*"))
    assert main(["adapt", "-s", "990", "-t", "991", "-np", "1", *options.split()]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("nnunet_l2g adapt: ") and all(part in error for part in words.split(".*")), error
    assert sorted(small_source.source.parent.rglob("*")) == before


def test_nnunets_variables_are_needed(small_source, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        find_source("990", "nnUNetPlans", None)


def test_names_that_begin_with_a_dot_are_no_cases(small_source):
    for path in (small_source.images / "._a_0000.nii.gz", small_source.source / "gt_segmentations" / "._a.nii.gz"):
        path.write_bytes(bytes(9))
    assert list(find_target("991", find_source("990", "nnUNetPlans", None)).cases) == CASES


def summary(spacing=(4.0, 2.0, 2.0), shape=(8, 32, 32)):
    return CaseSummary("case", "", shape, spacing, None, 1.0, [])


@pytest.mark.parametrize("spacing", [(4.0, 2.0, 2.0), (0.2, 1.0, 1.0), (80.0, 2.0, 2.0), (20.0, 10.0, 9.0), (400.0, 0.1, 9.0)])
def test_plausible_spacings(spacing):
    check_geometry(SimpleNamespace(name="Source", manager=PlansManager(make_plans())), "Target", [summary(spacing)])


@pytest.mark.parametrize(
    ("case", "words"),
    [(summary((0.004, 0.002, 0.002)), r"median spacing of \(0.004, 0.002, 0.002\), .* of \(4, 2, 2\)"),
     (summary((0.4, 0.2, 0.2)), "are the units the same"), (summary((40.0, 20.0, 20.0)), "are the units the same"),
     (summary((0.0, 2.0, 2.0)), "are the units the same"), (summary(shape=(1, 32, 32)), "case case .* is 2D .* Source is 3D")],
)  # fmt: skip
def test_another_unit_and_another_dimension_are_refused(case, words):
    with pytest.raises(UserError, match=words):
        check_geometry(SimpleNamespace(name="Source", manager=PlansManager(make_plans())), "Target", [case])


def write(path, voxels, **geometry):
    image = SimpleITK.GetImageFromArray(voxels)
    for name, value in geometry.items():
        getattr(image, f"Set{name}")(value)
    SimpleITK.WriteImage(image, str(path))
    return str(path)


VOXELS = np.arange(1, 121, dtype=np.float32).reshape(4, 5, 6)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize(
    ("voxels", "geometry", "words"),
    [(VOXELS, {"Spacing": (1, 1, 9)}, "spacing"), (VOXELS, {"Direction": (0, 1, 0, 1, 0, 0, 0, 0, -1)}, "direction|origin"),
     (VOXELS, {"Origin": (50, 0, 0)}, "origin"), (VOXELS[1:], {}, "shape"), (VOXELS[0], {}, "shape|cannot read")],
)  # fmt: skip
def test_channels_that_do_not_lie_on_one_grid_are_refused(tmp_path, reader, voxels, geometry, words):
    """nnU-Net's readers only print a warning about another direction or origin."""
    files = [write(tmp_path / "a_0000.nii.gz", VOXELS), write(tmp_path / "a_0001.nii.gz", VOXELS)]
    found, _ = read_case("a", files, reader, 2)
    assert found.shape[0] == 2 and sorted(found[0].ravel()) == sorted(VOXELS.ravel())
    write(tmp_path / "a_0001.nii.gz", voxels, **geometry)
    with pytest.raises(UserError, match=rf"case a: .*a_0001.nii.gz:? .*({words})"):
        read_case("a", files, reader, 2)
    Path(files[0]).write_bytes(b"no")
    with pytest.raises(UserError, match=rf"case a: .*a_0000.nii.gz: the source reader {reader} cannot read it"):
        read_case("a", files, reader, 2)


def test_a_2d_image_is_flat_and_has_no_direction(tmp_path):
    image = SimpleITK.GetImageFromArray(VOXELS[0].astype(np.uint8))
    SimpleITK.WriteImage(image, str(tmp_path / "a_0000.png"))
    found = summarise_case(("a", [str(tmp_path / "a_0000.png")]), "NaturalImage2DIO", 1, 10)
    assert found.shape == (1, 5, 6) and found.direction is None and len(found.samples[0]) == 10


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite numbers"), (0, "holds only zeros"), (1, r"1 channel\(s\), dataset.json names 2")]
)
def test_voxels_that_cannot_be_used(tmp_path, value, words):
    """In .mha: nnU-Net's reader replaces NaN in NIfTI files by 0."""
    file = write(tmp_path / "a_0000.mha", np.full((4, 5, 6), value, np.float32))
    with pytest.raises(UserError, match=f"case a .*{words}"):
        read_case("a", [file], "SimpleITKIO", 2 if value == 1 else 1)
