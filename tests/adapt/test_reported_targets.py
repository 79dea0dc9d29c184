"""Targets and sources of kinds that users have reported: `adapt` names what is wrong and notices what has changed."""

import json
import os

import numpy as np
import pytest
import tifffile
from test_hostile_files import CASES, find_source, source  # noqa: F401

from nnunet_l2g.adapt.datasets import find_target
from nnunet_l2g.adapt.fingerprint import CaseJob, _analyse
from nnunet_l2g.errors import UserError


@pytest.fixture
def images(source, tmp_path):  # noqa: F811
    """imagesTr of the target, CASES in it."""
    return tmp_path / "raw" / "Dataset991_Other" / "imagesTr"


def target():
    return find_target("991", find_source())


def test_cases_that_write_one_file(images):
    (images / f"{CASES[0]}_seg_0000.nii.gz").touch()
    with pytest.raises(UserError, match=rf"_seg: {CASES[0]}_seg; {CASES[0]} and {CASES[0]}_seg write one file.* rename"):
        target()
    (images / f"{CASES[0]}_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=rf"_seg: {CASES[0]}_seg. nnU-Net .* leaves such cases out"):
        target()


def test_a_source_case_that_nnunet_leaves_out(source):  # noqa: F811
    (source / "gt_segmentations" / "b_seg.nii.gz").touch()
    with pytest.raises(UserError, match="does not train on b_seg; rename"):
        find_source()


def test_names_that_begin_with_a_dot_are_no_cases(images, source):  # noqa: F811
    (images / f"._{CASES[0]}_0000.nii.gz").write_bytes(bytes(9))
    (source / "gt_segmentations" / f"._{CASES[0]}.nii.gz").write_bytes(bytes(9))
    assert list(target().cases) == sorted(CASES)


@pytest.mark.parametrize(("kind", "words"), [("folder", "is a folder"), ("link", "is no file, or a link to none")])
def test_what_is_no_file_is_named_by_its_path(images, kind, words):
    path = images / f"{CASES[0]}_0000.nii.gz"
    path.unlink()
    path.mkdir() if kind == "folder" else os.symlink("gone", path)
    with pytest.raises(UserError, match=rf"{path} {words}"):
        target()


def test_a_target_of_version_1(images):
    old = {"modality": {"0": "MRI"}, "labels": {"0": "background"}, "numTraining": 2}
    (images.parent / "dataset.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"dataset.json: of nnU-Net version 1 .* convert"):
        target()


def test_a_fingerprint_knows_what_was_read_and_not_the_file_alone(tmp_path):
    """Voxels and spacing count; a file written anew with the same content does not."""

    def digest(voxels, spacing, **how):
        tifffile.imwrite(tmp_path / "c_0000.tif", voxels, **how)
        (tmp_path / "c.json").write_text(json.dumps({"spacing": spacing}))
        return _analyse(CaseJob("c", [str(tmp_path / "c_0000.tif")], "Tiff3DIO", 1, 10))[1]["digest"]

    voxels = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    first = digest(voxels, [3, 1, 1])
    assert digest(voxels, [3, 1, 1], compression="zlib") == first
    assert len({first, digest(voxels, [30, 1, 1]), digest(voxels + 1, [3, 1, 1]), digest(voxels[:2], [3, 1, 1])}) == 4
