"""Maps of a whole image from patches, and their way back onto the image."""

import itertools

import nibabel
import numpy as np
import pytest
import torch
from test_inspect import lies_on, read_map
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.evaluation.geometry import write_nifti
from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.maps import map_image, to_image

torch.set_num_threads(1)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("dims", [2, 3])
def test_maps_return_to_where_they_came_from(tmp_path, transpose, dims):
    """Oblique image, cropped to nonzero, transposed by the plans, resampled to another spacing."""
    spacing = (3.0, 2.0, 2.2)[-dims:]
    model = open_model(write_model(tmp_path, plans=make_plans((16, 16, 16)[-dims:], spacing, transpose)))
    case = read_case(model, [write_case(tmp_path / "in")[0]], None)
    assert case.properties["shape_after_cropping_and_before_resampling"] != case.properties["shape_before_cropping"]
    inside = case.image[0] > 0
    restored = to_image(case.data[0], case, outside=-9)
    assert restored.shape == case.image.shape[1:]
    assert (restored[~inside] == -9).mean() > 0.9  # cropped away
    likeness = np.corrcoef(restored[inside], case.image[0][inside])[0, 1]
    assert likeness > 0.9
    for axis, step in itertools.product(range(3), (-1, 1)):  # a map that is a voxel off does worse
        assert np.corrcoef(np.roll(restored, step, axis)[inside], case.image[0][inside])[0, 1] < likeness - 0.02
    whole = to_image(np.rint(10 * case.data[0]).astype(np.int16), case)
    assert whole.dtype == np.int16 and np.corrcoef(whole[inside], case.image[0][inside])[0, 1] > 0.85
    assert set(np.unique(whole)) <= {0, *np.rint(10 * case.data[0]).astype(np.int16).flat}  # never averaged


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_nifti_files_lie_on_the_image_for_every_reader(tmp_path, reader):
    image, _ = write_case(tmp_path / "in", direction=(0, -1, 0, 0, 0, 1, -1, 0, 0))
    model = open_model(write_model(tmp_path, plans=make_plans(reader=reader)))
    array, properties = model.labels.reader().read_images([str(image)])
    write_nifti(array[0], properties, tmp_path / "map.nii.gz")
    assert lies_on(tmp_path / "map.nii.gz", image)
    assert np.array_equal(read_map(image), read_map(tmp_path / "map.nii.gz"))
    assert np.allclose(nibabel.load(image).affine, nibabel.load(tmp_path / "map.nii.gz").affine, atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 16, 16), (16, 16, 64), (16, 16), (64, 8)])
def test_patches_put_an_image_together_again(patch):
    data = np.random.default_rng(0).normal(size=(2, 9, 30, 37)).astype(np.float32)

    def maps_of(x):
        assert tuple(x.shape) == (1, 2, *patch)
        return {"same": x, "first": (x[:, :1] * 1000).long()}

    maps = map_image(data, patch, maps_of, "cpu", "test")
    assert np.allclose(maps["same"], data, atol=1e-5)
    assert maps["first"].dtype == np.int64 and np.array_equal(maps["first"], (data[:1] * 1000).astype(np.int64))


def test_integers_come_from_the_patch_in_whose_middle_they_lie():
    count, starts = itertools.count(), [0, 8, 16, 24]
    data = np.zeros((1, 1, 16, 40), np.float32)
    maps = map_image(data, (16, 16), lambda x: {"patch": torch.full(x.shape, next(count))}, "cpu", "test")
    patches = maps["patch"][0, 0, 8]
    nearest = [min(range(4), key=lambda i: abs(starts[i] + 8 - voxel)) for voxel in range(40)]
    assert (patches == nearest).mean() > 0.9 and set(patches) == set(range(4))  # a tie may go either way
