"""Troubles with data: what nnU-Net's own check finds is left to it; what it lets through and would break us is refused."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from planned import PLAIN, SIZE, SPACING
from test_grcsf_trainer import make_with_cases, training_cases

from nnunet_l2g.adapt.fingerprint import CaseJob, read_case
from nnunet_l2g.architectures.grcsf.picture import labelled_patch
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.phantom import write_dataset

TURNED = (0, 1, 0, 1, 0, 0, 0, 0, -1)


def edit(path, change):
    sitk.WriteImage(change(sitk.ReadImage(str(path))), str(path))


def with_spacing(image):
    image.SetSpacing((3.6, 3.6, 9.0))
    return image


def with_direction(image):
    image.SetDirection(TURNED)
    return image


def with_origin(image):
    image.SetOrigin((50, 0, 0))
    return image


def empty(image):
    result = sitk.Image(image.GetSize(), image.GetPixelID())
    result.CopyInformation(image)
    return result


def with_a_foreign_value(image):
    image[16, 16, 4] = 9
    return image


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    folder, contrasts = tmp_path_factory.mktemp("raw"), ("cine", "late_enhancement")
    return write_dataset(folder, 5, 0, contrasts, dataset_id=984, name="Two", size=SIZE, spacing=SPACING)


@pytest.fixture
def case(two_channels, tmp_path):
    """A case to spoil: its channels and its label."""
    files = [two_channels / "imagesTr" / f"phantom_tr000_{channel:04d}.nii.gz" for channel in range(2)]
    files.append(two_channels / "labelsTr" / "phantom_tr000.nii.gz")
    return [shutil.copy(file, tmp_path) for file in files]


# ---- what nnU-Net's --verify_dataset_integrity says, case by case ----


def nnunets_check(case) -> bool:
    *images, label = map(str, case)
    return verify_labels(label, SimpleITKIO, [0, 1, 2, 3]) and check_cases(images, label, 2, SimpleITKIO)


def test_nnunet_accepts_a_good_case_and_an_empty_one(case):
    assert nnunets_check(case)
    edit(case[-1], empty)
    assert nnunets_check(case)


def test_nnunet_finds_foreign_labels_and_channels_of_two_spacings_or_shapes(case, capsys):
    edit(case[-1], with_a_foreign_value)
    assert not nnunets_check(case)
    assert "Unexpected labels found" in capsys.readouterr().out
    edit(case[1], with_spacing)
    with pytest.raises(RuntimeError):
        check_cases([str(file) for file in case[:2]], str(case[-1]), 2, SimpleITKIO)
    edit(case[1], lambda image: image[:, :, 1:])
    with pytest.raises(RuntimeError):
        check_cases([str(file) for file in case[:2]], str(case[-1]), 2, SimpleITKIO)


def test_nnunet_only_warns_of_channels_of_two_directions_or_origins(case, capsys):
    """So labelled data of this kind are trained on, by its trainers as by ours; a target's, which it never checks, are not."""
    for change in (with_direction, with_origin):
        edit(case[1], change)
        assert nnunets_check(case)
        assert "WARNING! Not all input images have the same" in capsys.readouterr().out


def test_nnunet_lets_a_slice_pass_for_a_volume(case):
    """A file of two axes, and a volume of one slice: both are made three axes long."""
    for change in (lambda image: image[:, :, 4:5], lambda image: image[:, :, 0]):
        for file in case:
            edit(file, change)
        assert nnunets_check(case)


# ---- an unlabelled target, which nnU-Net never checks ----


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize(
    ("change", "word"),
    [(with_spacing, "spacing"), (with_direction, "direction|origin"), (with_origin, "origin"),
     (lambda image: image[:, :, 1:], "shape"), (lambda image: image[:, :, 4], "shape|cannot read")],
)  # fmt: skip
def test_channels_of_a_target_case_that_differ_are_refused(case, change, word, reader):
    job = CaseJob("phantom", list(map(str, case[:2])), reader.__name__, 2)
    whole, geometry = read_case(job)
    expected, properties = reader().read_images(job.files)
    assert np.array_equal(whole, expected) and geometry.spacing == tuple(properties["spacing"])
    edit(case[1], change)
    with pytest.raises(UserError, match=rf"case phantom: .*phantom_tr000_0001.nii.gz:? .*({word})"):
        read_case(job)


@pytest.fixture
def pair(planned, tmp_path, monkeypatch):
    """nnU-Net's folders with a planned source, and a raw target to spoil."""
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, PLAIN), tmp_path / kind / PLAIN)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    return write_dataset(
        tmp_path / "raw", 5, 0, "late_enhancement", dataset_id=983, name="Late", size=SIZE, spacing=SPACING, seed=7
    )


def adapt():
    return main(["adapt", "-s", "981", "-t", "983", "-c", "2d", "-np", "1"])


def test_a_slice_among_a_targets_volumes_is_refused(pair, capsys):
    """nnU-Net's reader gives it a slice distance of 999 pixels: resampled, it would be hundreds of equal slices."""
    edit(pair / "imagesTr" / "phantom_tr003_0000.nii.gz", lambda image: image[:, :, 4])
    assert adapt() == 1
    error = capsys.readouterr().err
    assert "case phantom_tr003" in error and "2D" in error and "Traceback" not in error
    assert not list((pair.parents[1] / "preprocessed").rglob("nnUNetPlans_to983.json"))


def test_a_target_of_one_image_is_enough(pair):
    for number in range(1, 5):
        (pair / "imagesTr" / f"phantom_tr{number:03d}_0000.nii.gz").unlink()
    assert adapt() == 0


def test_a_targets_labels_are_never_looked_at(pair):
    for path in (pair / "labelsTr").iterdir():
        path.write_bytes(b"no image")
    assert adapt() == 0


# ---- empty labels ----


def test_one_case_without_labels_is_trained_on_and_the_picture_shows_another(nnunet_folders, monkeypatch):
    cases = training_cases(nnunet_folders)
    trainer = make_with_cases(nnunet_folders, cases)
    load = trainer.dataset_class.load_case

    def first_without_labels(self, case):
        data, seg, previous, properties = load(self, case)
        if case == self.identifiers[0]:
            properties = {**properties, "class_locations": {key: [] for key in properties["class_locations"]}}
        return data, seg, previous, properties

    monkeypatch.setattr(trainer.dataset_class, "load_case", first_without_labels)
    training, validation = trainer.get_tr_and_val_datasets()
    assert list(training.identifiers) == list(cases)
    assert labelled_patch(validation, trainer.configuration_manager.patch_size).case == validation.identifiers[1]
