"""The phantom: same seed same voxels, one grid for image and label, nested anatomy, and datasets that nnU-Net accepts."""

import json
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation, binary_fill_holes

from nnunet_l2g.phantom import CONTRASTS, make_case, write_dataset

SMALL = {"size": (32, 32, 6), "spacing": (3.5, 3.5, 12.0)}
LEFT, WALL, RIGHT, SCAR = 1, 2, 3, 4


def arrays(*args, **keywords):
    return tuple(sitk.GetArrayFromImage(image) for image in make_case(*args, **keywords))


def test_the_same_seed_gives_the_same_voxels_and_another_one_does_not():
    for contrast in CONTRASTS:
        first, second, other = (make_case(seed, contrast, scar=True) for seed in (7, 7, 8))
        for a, b, c in zip(first, second, other, strict=True):
            one, same, different = map(sitk.GetArrayFromImage, (a, b, c))
            assert np.array_equal(one, same) and not np.array_equal(one, different)
            assert (a.GetOrigin(), a.GetDirection()) == (b.GetOrigin(), b.GetDirection())
        assert first[0].GetOrigin() != other[0].GetOrigin()


@pytest.mark.parametrize("keywords", [{}, SMALL, {"size": (72, 48, 12), "spacing": (1.4, 1.9, 6.0)}])
def test_image_and_label_share_an_oblique_grid(keywords):
    image, label = make_case(3, **keywords)
    assert image.GetSize() == label.GetSize() == tuple(keywords.get("size", (64, 64, 10)))
    assert image.GetSpacing() == label.GetSpacing() == keywords.get("spacing", (1.8, 1.8, 8.0))
    assert (image.GetOrigin(), image.GetDirection()) == (label.GetOrigin(), label.GetDirection())
    assert (image.GetPixelID(), label.GetPixelID()) == (sitk.sitkInt16, sitk.sitkUInt8)
    rotation = np.reshape(image.GetDirection(), (3, 3))
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert np.all(np.abs(rotation - np.eye(3)).max(axis=0) > 0.05)  # no axis lies along the scanner's


def test_every_structure_is_there_and_the_wall_encloses_the_cavity():
    volumes, centres = [], []
    for seed in range(12):
        _, label = arrays(seed, **(SMALL if seed % 2 else {}))
        assert set(np.unique(label)) == {0, LEFT, WALL, RIGHT}
        for plane in label:
            heart = np.isin(plane, (LEFT, WALL))
            assert not np.isin([*plane[[0, -1]], *plane[:, [0, -1]].T], (LEFT, WALL)).any()  # inside the image
            assert not np.any(binary_fill_holes(heart) & (plane == RIGHT))
            if np.any(plane == LEFT):
                around = binary_dilation(plane == LEFT) & (plane != LEFT)
                assert np.all(plane[around] == WALL)
                assert np.array_equal(binary_fill_holes(plane == WALL), heart)
        area = [(plane == LEFT).sum() for plane in label if np.any(plane == LEFT)]
        assert all(b <= 1.05 * a + 3 for a, b in pairwise(area))  # tapers from base to apex, up to the grid's rounding
        assert area[-1] < area[0]
        if seed % 2 == 0:
            volumes.append([np.sum(label == value) for value in (LEFT, WALL, RIGHT)])
            centres.append(np.argwhere(label == LEFT).mean(axis=0)[1:])
    assert np.all(np.std(volumes, axis=0) / np.mean(volumes, axis=0) > 0.1) and np.all(np.std(centres, axis=0) > 1.5)


def test_contrasts_and_scars():
    sizes = []
    for seed in range(12):
        cine, label = arrays(seed, "cine", scar=True)
        late, same = arrays(seed, "late_enhancement", scar=True)
        black, _ = arrays(seed, "black_blood", scar=True)
        _, without = arrays(seed, "late_enhancement")
        scar = label == SCAR
        assert np.array_equal(label, same)  # the seed alone decides the anatomy
        assert np.all(without[scar] == WALL) and np.array_equal(label[~scar], without[~scar])
        sizes.append(scar.sum())
        means = [
            {value: image[label == value].mean() for value in (0, LEFT, WALL, RIGHT, SCAR)} for image in (cine, late, black)
        ]
        assert min(means[0][LEFT], means[0][RIGHT]) > 1.5 * means[0][WALL] and means[0][SCAR] < 0.7 * means[0][LEFT]
        assert means[1][WALL] < 0.6 * means[1][LEFT]
        assert means[1][SCAR] > 1.2 * max(means[1][value] for value in (LEFT, WALL, RIGHT))
        assert max(means[2][LEFT], means[2][RIGHT]) < 0.6 * means[2][WALL]
        assert np.mean(cine[label == 0] > 0.7 * means[0][LEFT]) > 0.03  # fat and aorta are as bright as blood
    assert min(sizes) > 0 and min(sizes) < 50 and max(sizes) > 150


def test_two_dimensional_cases_and_a_size_too_small():
    for seed in range(5):
        image, label = make_case(seed, size=(48, 40), spacing=(2.0, 2.0))
        assert image.GetSize() == label.GetSize() == (48, 40)
        assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, LEFT, WALL, RIGHT}
    with pytest.raises(ValueError, match=r"size=\(64, 64, 5\).*at least \(32, 32, 6\)"):
        make_case(0, size=(64, 64, 5))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"scar": True, "contrast": ("cine", "late_enhancement"), "regions": True, "ignore_label": True},
        {"size": (40, 36), "spacing": (2.5, 2.5), "ignore_label": True},
    ],
    ids=["plain", "channels-regions-ignore", "two-dimensional"],
)
def test_nnunet_accepts_the_dataset(tmp_path, keywords, capfd, monkeypatch):
    """By threads: nnU-Net's spawned process would import torch first."""
    from nnunetv2.experiment_planning import verify_dataset_integrity as module

    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(module, "multiprocessing", threads)
    folder = write_dataset(tmp_path, 5, 2, seed=3, **{**SMALL, **keywords})
    module.verify_dataset_integrity(str(folder), num_processes=1)
    output = capfd.readouterr().out
    assert "Error" not in output and "Warning" not in output
    description = json.loads((folder / "dataset.json").read_text())
    assert len(list((folder / "imagesTs").glob(f"*{description['file_ending']}"))) == 2 * len(description["channel_names"])
    if keywords.get("regions"):
        assert description["regions_class_order"] == [3, 2, 4, 1]
        assert description["labels"] == {"background": 0, "heart": [1, 2, 3, 4], "left_heart": [1, 2, 4], "scar": 4,
                                         "left_ventricle": 1, "ignore": 5}  # fmt: skip
        train, test = ([sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in (folder / f"labels{split}").iterdir()]
                       for split in ("Tr", "Ts"))  # fmt: skip
        assert 0.1 < np.mean([np.mean(label == 5) for label in train]) < 0.4 and all(5 not in label for label in test)


def test_test_cases_do_not_depend_on_the_training_cases(tmp_path):
    folders = [write_dataset(tmp_path / str(seed) / str(n), n, 1, seed=seed, **SMALL) for n, seed in ((5, 3), (6, 3), (5, 4))]
    for name in ("imagesTr/phantom_tr004_0000.nii.gz", "labelsTs/phantom_ts000.nii.gz"):
        read = [sitk.GetArrayFromImage(sitk.ReadImage(folder / name)) for folder in folders]
        assert np.array_equal(read[0], read[1]) and not np.array_equal(read[0], read[2])


def test_an_existing_dataset_is_kept_and_an_interrupted_one_is_written_again(tmp_path, monkeypatch):
    from nnunet_l2g.phantom import dataset

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "dataset_json", lambda *_: 1 / 0)  # the last thing that is written
        with pytest.raises(ZeroDivisionError):
            write_dataset(tmp_path, 5, 0, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".Dataset980_CardiacPhantom.partial"]
    assert write_dataset(tmp_path, 5, 0, **SMALL) == tmp_path / "Dataset980_CardiacPhantom" == next(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="Dataset980_CardiacPhantom exists; remove it"):
        write_dataset(tmp_path, 5, 0, **SMALL)
