"""Whole-image maps from patches, and their way back onto the image."""

import itertools
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.geometry import to_original, write_map
from nnunet_l2g.inspect.model import load_model
from nnunet_l2g.inspect.tiles import tile_maps, to_patch

torch.set_num_threads(1)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("dims", [2, 3])
def test_maps_return_to_where_they_came_from(tmp_path, transpose, dims):
    """Oblique image, cropped to nonzero, transposed by the plans, resampled to another spacing."""
    spacing = (3.0, 2.0, 2.2)[-dims:]
    model = load_model(write_model(tmp_path, plans=make_plans((16, 16, 16)[-dims:], spacing, transpose)), "0",
                       "checkpoint_final.pth")  # fmt: skip
    image, label = write_case(tmp_path / "in")
    case = read_case(model, [image], label)
    assert case.properties["shape_after_cropping_and_before_resampling"] != case.properties["shape_before_cropping"]
    back = model.plans.transpose_backward
    inside = case.image[0] > 0
    restored = to_original(case.data[0], case.properties, back, outside=-9)
    assert restored.shape == case.image.shape[1:] == case.reference.shape
    assert (restored[~inside] == -9).mean() > 0.9  # cropped away
    likeness = np.corrcoef(restored[inside], case.image[0][inside])[0, 1]
    assert likeness > 0.9
    for axis, step in itertools.product(range(3), (-1, 1)):  # a map that is a voxel off does worse
        assert np.corrcoef(np.roll(restored, step, axis)[inside], case.image[0][inside])[0, 1] < likeness - 0.02
    labels = to_original(np.maximum(case.labels, 0), case.properties, back)
    assert labels.dtype == np.int16
    for value in (1, 2):
        assert dice(labels == value, case.reference == value) > 0.85
    flipped = labels[::-1, ::-1, ::-1]
    assert dice(flipped == 2, case.reference == 2) < 0.5


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_nifti_files_lie_on_the_image_for_every_reader(tmp_path, reader):
    image, _ = write_case(tmp_path / "in", direction=(0, -1, 0, 0, 0, 1, -1, 0, 0))
    model = load_model(write_model(tmp_path, plans=make_plans(reader=reader)), "0", "checkpoint_final.pth")
    array, properties = model.reader.read_images([str(image)])
    write_map(array[0], properties, tmp_path / "map.nii.gz")
    one, other = (sitk.ReadImage(str(path)) for path in (image, tmp_path / "map.nii.gz"))
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(one, geometry)(), getattr(other, geometry)(), atol=1e-5), geometry
    assert np.array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))
    assert np.allclose(nibabel.load(image).affine, nibabel.load(tmp_path / "map.nii.gz").affine, atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 16, 16), (16, 16, 64), (16, 16), (64, 8)])
def test_tiles_put_an_image_together_again(patch):
    data = np.random.default_rng(0).normal(size=(2, 9, 30, 37)).astype(np.float32)

    def look(x):
        assert tuple(x.shape) == (1, 2, *patch)
        return {"same": x, "first": (x[:, :1] * 1000).long()}

    maps = tile_maps(data, patch, look, "cpu", "test")
    assert np.allclose(maps["same"], data, atol=1e-5)
    assert maps["first"].dtype == np.int64 and np.array_equal(maps["first"], (data[:1] * 1000).astype(np.int64))


def test_integers_come_from_the_patch_in_whose_middle_they_lie():
    count = itertools.count()
    patch, starts = 16, [0, 8, 16, 24]
    data = np.zeros((1, 1, 16, 40), np.float32)
    tiles = tile_maps(data, (16, patch), lambda x: {"tile": torch.full(x.shape, next(count))}, "cpu", "test")["tile"][0, 0, 8]
    nearest = [min(range(4), key=lambda i: abs(starts[i] + patch // 2 - voxel)) for voxel in range(40)]
    assert (tiles == nearest).mean() > 0.9  # a tie may go either way
    assert sorted(set(tiles)) == [0, 1, 2, 3]


def test_coarse_maps_are_repeated_where_they_lie():
    coarse = torch.arange(6).view(1, 1, 2, 3)
    fine = to_patch(coarse, (4, 9))
    assert torch.equal(fine, coarse.repeat_interleave(2, 2).repeat_interleave(3, 3))


def test_a_natural_image_gets_unit_spacing(tmp_path):
    write_map(np.zeros((1, 20, 30), np.float32), {"spacing": (999, 1, 1)}, tmp_path / "map.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "map.nii.gz"))
    assert image.GetSize() == (30, 20) and image.GetSpacing() == (1.0, 1.0)
    assert json.dumps(image.GetOrigin()) == "[0.0, 0.0]"
