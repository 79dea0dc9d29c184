"""The phantom: same seed same voxels, one grid for image and label, nested anatomy, and datasets that nnU-Net accepts."""

import json
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation, binary_fill_holes

from nnunet_l2g.phantom import CONTRASTS, LABELS, make_case, make_channels, write_dataset

SMALL = {"size": (32, 32, 6), "spacing": (3.5, 3.5, 12.0)}
LEFT, WALL, RIGHT, SCAR = 1, 2, 3, 4


def arrays(*args, **keywords):
    image, label = make_case(*args, **keywords)
    return sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("scar", [False, True])
def test_same_seed_is_bit_identical_and_others_differ(contrast, scar):
    first, second = make_case(7, contrast, scar), make_case(7, contrast, scar)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
        assert (a.GetSpacing(), a.GetOrigin(), a.GetDirection()) == (b.GetSpacing(), b.GetOrigin(), b.GetDirection())
    other = make_case(8, contrast, scar)
    for a, b in zip(first, other, strict=True):
        assert not np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
    assert first[0].GetOrigin() != other[0].GetOrigin()


@pytest.mark.parametrize("keywords", [{}, SMALL, {"size": (72, 48, 12), "spacing": (1.4, 1.9, 6.0)}])
def test_image_and_label_share_an_oblique_grid(keywords):
    image, label = make_case(3, **keywords)
    assert image.GetSize() == label.GetSize() == tuple(keywords.get("size", (64, 64, 10)))
    assert image.GetSpacing() == label.GetSpacing() == keywords.get("spacing", (1.8, 1.8, 8.0))
    assert image.GetOrigin() == label.GetOrigin()
    assert image.GetDirection() == label.GetDirection()
    assert (image.GetPixelID(), label.GetPixelID()) == (sitk.sitkInt16, sitk.sitkUInt8)
    rotation = np.reshape(image.GetDirection(), (3, 3))
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert np.all(np.abs(rotation - np.eye(3)).max(axis=0) > 0.05)  # no axis lies along the scanner's


@pytest.mark.parametrize("keywords", [{}, SMALL])
@pytest.mark.parametrize("seed", range(12))
def test_every_structure_is_there_and_the_wall_encloses_the_cavity(seed, keywords):
    _, label = arrays(seed, **keywords)
    assert set(np.unique(label)) == {0, LEFT, WALL, RIGHT}
    for plane in label:
        heart = np.isin(plane, (LEFT, WALL))
        if np.any(plane == LEFT):
            around = binary_dilation(plane == LEFT) & (plane != LEFT)
            assert np.all(plane[around] == WALL)
            assert np.array_equal(binary_fill_holes(plane == WALL), heart)
        assert not np.any(binary_fill_holes(heart) & (plane == RIGHT))
    area = [(plane == LEFT).sum() for plane in label if np.any(plane == LEFT)]
    assert all(b <= 1.05 * a + 3 for a, b in pairwise(area))  # tapers from base to apex, up to the grid's rounding
    assert area[-1] < area[0]


def test_anatomy_varies_and_stays_inside_the_image():
    labels = [arrays(seed)[1] for seed in range(10)]
    volumes = np.array([[np.sum(label == value) for value in (LEFT, WALL, RIGHT)] for label in labels])
    assert np.all(volumes.std(axis=0) / volumes.mean(axis=0) > 0.1)
    centres = np.array([np.argwhere(label == LEFT).mean(axis=0)[1:] for label in labels])
    assert np.all(centres.std(axis=0) > 1.5)
    touching = [
        np.isin(label[:, [0, -1]], (LEFT, WALL)).any() or np.isin(label[:, :, [0, -1]], (LEFT, WALL)).any() for label in labels
    ]
    assert not any(touching)


@pytest.mark.parametrize("seed", range(6))
def test_scars_lie_in_the_wall_and_change_nothing_else(seed):
    _, without = arrays(seed, "late_enhancement")
    _, with_scar = arrays(seed, "late_enhancement", scar=True)
    _, hidden = arrays(seed, "late_enhancement", scar=True, labels="anatomy")
    _, alone = arrays(seed, "late_enhancement", scar=True, labels="scar")
    scar = with_scar == SCAR
    assert scar.any()
    assert np.all(without[scar] == WALL)
    assert np.array_equal(with_scar[~scar], without[~scar])
    assert np.array_equal(hidden, without)
    assert np.array_equal(alone, scar.astype(np.uint8))


def test_scars_vary_in_size():
    volumes = np.array([np.sum(arrays(seed, "late_enhancement", scar=True)[1] == SCAR) for seed in range(15)])
    assert volumes.min() < 40 < 150 < volumes.max()


@pytest.mark.parametrize("seed", range(6))
def test_contrasts(seed):
    cine, label = arrays(seed, "cine", scar=True)
    late, same = arrays(seed, "late_enhancement", scar=True)
    assert np.array_equal(label, same)  # the seed alone decides the anatomy
    mean = {
        name: {value: image[label == value].mean() for value in (LEFT, WALL, RIGHT, SCAR)}
        for name, image in (("cine", cine), ("late", late))
    }
    assert min(mean["cine"][LEFT], mean["cine"][RIGHT]) > 1.5 * mean["cine"][WALL]
    assert mean["cine"][SCAR] < 0.7 * mean["cine"][LEFT]
    assert mean["late"][WALL] < 0.6 * mean["late"][LEFT]
    assert mean["late"][SCAR] > 1.2 * max(mean["late"][value] for value in (LEFT, WALL, RIGHT))


def test_noise_differs_between_contrasts_and_the_background_is_not_empty():
    images, label = make_channels(5)
    assert len(images) == 2
    outside = sitk.GetArrayFromImage(label) == 0
    cine, late = (sitk.GetArrayFromImage(image).astype(float) for image in images)
    assert not np.array_equal(cine, late)
    blood = cine[sitk.GetArrayFromImage(label) == LEFT].mean()
    assert np.mean(cine[outside] > 0.7 * blood) > 0.03  # fat, aorta: as bright as blood


def test_two_dimensional_cases():
    for seed in range(10):
        image, label = make_case(seed, size=(48, 40), spacing=(2.0, 2.0))
        assert image.GetSize() == label.GetSize() == (48, 40)
        assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, LEFT, WALL, RIGHT}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"contrast": "t2"}, "contrast='t2'.*'cine'.*'late_enhancement'"),
        ({"labels": "liver"}, "labels='liver'.*'anatomy_scar'"),
        ({"labels": "scar"}, "labels='scar'.*scar=True"),
        ({"seed": -1}, "seed=-1.*non-negative"),
        ({"seed": 1.5}, "seed=1.5.*integer"),
        ({"size": (31, 64, 10)}, r"size=\(31, 64, 10\).*at least \(32, 32, 6\)"),
        ({"size": (64, 64, 5)}, r"size=\(64, 64, 5\).*at least"),
        ({"size": (64,)}, r"size=\(64,\).*\(x, y\)"),
        ({"spacing": (1.0, 1.0)}, "spacing=.*expected 3"),
        ({"spacing": (1.0, 0.0, 8.0)}, "spacing=.*positive"),
        ({"spacing": (1.0, float("nan"), 8.0)}, "spacing=.*positive"),
    ],
)
def test_bad_case_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_case(**{"seed": 0, **keywords})
    with pytest.raises(ValueError, match="no contrast"):
        make_channels(0, ())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_training": 4}, "num_training=4.*at least 5.*5 folds"),
        ({"num_training": -1}, "num_training=-1"),
        ({"num_test": -1}, "num_test=-1.*0 or more"),
        ({"dataset_id": 0}, "dataset_id=0.*1 to 999"),
        ({"dataset_id": 1000}, "dataset_id=1000"),
        ({"name": "a b"}, "name='a b'.*letters"),
        ({"scar": True, "labels": "scar", "regions": True}, "regions=True.*anatomy_scar"),
        ({"contrast": ("cine", "t2")}, "contrast='t2'"),
    ],
)
def test_bad_dataset_arguments_write_nothing(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "raw", **keywords)
    assert not (tmp_path / "raw").exists()


def verify(folder, monkeypatch):
    """By threads: the process that nnU-Net spawns imports torch first, most of the time."""
    from nnunetv2.experiment_planning import verify_dataset_integrity as module

    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(module, "multiprocessing", threads)
    module.verify_dataset_integrity(str(folder), num_processes=1)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"scar": True, "contrast": ("cine", "late_enhancement"), "regions": True, "ignore_label": True},
        {"scar": True, "contrast": "late_enhancement", "labels": "scar"},
        {"size": (40, 36), "spacing": (2.5, 2.5), "ignore_label": True},
    ],
    ids=["plain", "channels-regions-ignore", "lesions", "two-dimensional"],
)
def test_nnunet_accepts_the_dataset(tmp_path, keywords, capfd, monkeypatch):
    folder = write_dataset(tmp_path, 5, 2, seed=3, **{**SMALL, **keywords})
    verify(folder, monkeypatch)
    output = capfd.readouterr().out
    assert "Error" not in output
    assert "Warning" not in output
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 5
    channels = len(description["channel_names"])
    ending = description["file_ending"]
    for split, count in (("Tr", 5), ("Ts", 2)):
        assert len(list((folder / f"images{split}").glob(f"*{ending}"))) == count * channels
        assert len(list((folder / f"labels{split}").glob(f"*{ending}"))) == count


def test_dataset_is_reproducible_and_its_test_cases_do_not_depend_on_the_training_cases(tmp_path):
    a = write_dataset(tmp_path / "a", 5, 1, seed=3, **SMALL)
    b = write_dataset(tmp_path / "b", 6, 1, seed=3, **SMALL)
    c = write_dataset(tmp_path / "c", 5, 1, seed=4, **SMALL)
    for name in ("imagesTr/phantom_tr004_0000.nii.gz", "imagesTs/phantom_ts000_0000.nii.gz", "labelsTs/phantom_ts000.nii.gz"):
        read = [sitk.GetArrayFromImage(sitk.ReadImage(folder / name)) for folder in (a, b, c)]
        assert np.array_equal(read[0], read[1])
        assert not np.array_equal(read[0], read[2])
    train = {sitk.GetArrayFromImage(sitk.ReadImage(path)).tobytes() for path in (a / "labelsTr").iterdir()}
    assert len(train) == 5


def test_regions_and_ignore_label(tmp_path):
    folder = write_dataset(tmp_path, 5, 1, scar=True, regions=True, ignore_label=True, **SMALL)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {
        "background": 0,
        "heart": [1, 2, 3, 4],
        "left_heart": [1, 2, 4],
        "scar": 4,
        "left_ventricle": 1,
        "ignore": 5,
    }
    assert description["regions_class_order"] == [3, 2, 4, 1]
    train = [sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in sorted((folder / "labelsTr").iterdir())]
    assert 0.1 < np.mean([np.mean(label == 5) for label in train]) < 0.4
    test = [sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in sorted((folder / "labelsTs").iterdir())]
    assert all(5 not in label for label in test)
    assert all(max(values.values()) <= 4 for values in LABELS.values())


def test_an_existing_dataset_is_kept_and_a_broken_off_one_is_noticed(tmp_path, monkeypatch):
    from nnunet_l2g.phantom import dataset

    real, calls = dataset.make_channels, []

    def fails_late(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(dataset, "make_channels", fails_late)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 5, 1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".Dataset980_CardiacPhantom.partial"]
    folder = write_dataset(tmp_path, 5, 1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name] == ["Dataset980_CardiacPhantom"]
    with pytest.raises(FileExistsError, match="Dataset980_CardiacPhantom exists; remove it"):
        write_dataset(tmp_path, 5, 1, **SMALL)
