"""`nnunet_l2g inspect` on untrained models: what is written, that it is right, and what is refused."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from skimage import io
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g.cli import main

torch.set_num_threads(1)
MARKER = ".nnunet_l2g_inspect"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A stock trainer's model, an image, its label."""
    folder = tmp_path_factory.mktemp("plain")
    return write_model(folder), *write_case(folder / "in")


def inspect(model, image, output, *options, label=None):
    """Exit status of the command."""
    images = image if isinstance(image, list) else [image]
    options = [*options, *(["-l", label] if label else [])]
    arguments = ["inspect", "-m", model, "-f", 0, "-i", *images, "-o", output, "--device", "cpu", *options]
    return main([str(argument) for argument in arguments])


def read_summary(output):
    return json.loads((output / "summary.json").read_text())


def read_map(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def lies_on(path, image):
    one, other = (sitk.ReadImage(str(p)) for p in (path, image))
    names = ("GetSpacing", "GetOrigin", "GetDirection")
    close = [np.allclose(getattr(one, name)(), getattr(other, name)(), atol=1e-5) for name in names]
    return one.GetSize() == other.GetSize() and all(close)


def check_files(output, image):
    """Every file in the summary exists and nothing else does; NIfTI lies on the image; pictures are no stubs."""
    files = read_summary(output)["files"]
    assert set(files) == {path.name for path in output.iterdir()} - {MARKER}
    for name, line in files.items():
        assert line and (output / name).stat().st_size > 0
        if name.endswith(".nii.gz"):
            assert lies_on(output / name, image), name
        if name.endswith(".png"):
            picture = io.imread(output / name)
            assert min(picture.shape[:2]) > 200 and picture.std() > 10
    return files


# ---- any model ----


def test_a_stock_model_gets_prediction_and_errors(plain, tmp_path, capsys):
    model, image, label = plain
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    assert set(files) == {"prediction.nii.gz", "errors.nii.gz", "segmentation.png", "summary.json"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in files)
    reference = read_map(label)
    prediction, errors = (read_map(tmp_path / "out" / name) for name in ("prediction.nii.gz", "errors.nii.gz"))
    expected = np.select(
        [(reference == prediction) & (reference > 0), (reference == 0) & (prediction > 0), (reference > 0) & (prediction == 0),
         reference != prediction], [1, 2, 3, 4])  # fmt: skip
    assert len(np.unique(prediction)) > 1 and np.array_equal(errors, expected)
    summary = read_summary(tmp_path / "out")
    assert (summary["trainer"], summary["method"], summary["domain"]) == ("nnUNetTrainer", None, None)
    for value, name in ((1, "organ"), (2, "lesion")):
        true = ((reference == value) & (prediction == value)).sum()
        dice = 2 * true / ((reference == value).sum() + (prediction == value).sum())
        assert summary["segmentation"]["scores"][name]["dice"] == pytest.approx(dice, abs=1e-5)
        assert summary["segmentation"]["voxels"][name] == (prediction == value).sum()


def test_the_prediction_is_nnunets(plain, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    model, image, _ = plain
    assert inspect(model, image, tmp_path / "out") == 0
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    array, properties = sitk_read(image)
    expected = predictor.predict_single_npy_array(array, properties)
    assert np.array_equal(read_map(tmp_path / "out/prediction.nii.gz"), expected)
    assert "errors.nii.gz" not in read_summary(tmp_path / "out")["files"]


def sitk_read(image):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    return SimpleITKIO().read_images([str(image)])


def test_regions_with_an_ignore_label(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "lesion": 2, "ignore": 3}
    model = write_model(tmp_path, labels=labels, regions_class_order=[1, 2])
    image, label = write_case(tmp_path / "in")
    reference = sitk.ReadImage(str(label))
    reference[:20, :, :] = 3
    sitk.WriteImage(reference, str(label))
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    scores = read_summary(tmp_path / "out")["segmentation"]["scores"]
    array, prediction = read_map(label), read_map(tmp_path / "out/prediction.nii.gz")
    assert (read_map(tmp_path / "out/errors.nii.gz")[array == 3] == 5).all()
    valid = array != 3
    assert scores["whole"]["true_positive"] == ((array > 0) & (prediction > 0) & valid).sum()
    assert set(scores) == {"whole", "lesion"}


def test_a_natural_image_of_three_channels(tmp_path):
    plans = make_plans((32, 32), (1, 1), channels=3, reader="NaturalImage2DIO", schemes=("RGBTo01Normalization",))
    model = write_model(tmp_path, "nnUNetTrainerGRCSFNoRCU", plans, names=("R", "G", "B"), ending=".png")
    rng = np.random.default_rng(0)
    io.imsave(tmp_path / "eye_0000.png", rng.integers(0, 255, (50, 41, 3), np.uint8), check_contrast=False)
    io.imsave(tmp_path / "eye.png", rng.integers(0, 3, (50, 41), np.uint8), check_contrast=False)
    assert inspect(model, tmp_path / "eye_0000.png", tmp_path / "out", label=tmp_path / "eye.png") == 0
    for name in ("prediction.nii.gz", "compensation.nii.gz"):
        image = sitk.ReadImage(str(tmp_path / "out" / name))
        assert image.GetSize() == (41, 50) and image.GetSpacing() == (1, 1)
    assert (read_map(tmp_path / "out/errors.nii.gz") == 1).any()


@pytest.mark.parametrize("named", [1, 2])
def test_channels_are_found_beside_the_first_or_taken_as_named(tmp_path, named):
    model = write_model(tmp_path, plans=make_plans(channels=2), names=("a", "b"))
    image, _ = write_case(tmp_path / "in", channels=2)
    images = [image, image.with_name("case_0001.nii.gz")]
    assert inspect(model, images[:named], tmp_path / "out") == 0
    assert read_summary(tmp_path / "out")["images"] == [str(path) for path in images]


def test_a_file_without_channel_number_serves_a_model_of_one_channel(plain, tmp_path):
    model, image, _ = plain
    shutil.copy(image, tmp_path / "scan.nii.gz")
    assert inspect(model, tmp_path / "scan.nii.gz", tmp_path / "out") == 0
    assert read_summary(tmp_path / "out")["images"] == [str(tmp_path / "scan.nii.gz")]


def test_large_images_are_thinned_for_figures_alone(plain, tmp_path, monkeypatch):
    from nnunet_l2g.inspect import view

    model, image, label = plain
    assert inspect(model, image, tmp_path / "usual", label=label) == 0
    monkeypatch.setattr(view, "LARGEST", 9)
    assert inspect(model, image, tmp_path / "thin", label=label) == 0
    for name in ("prediction.nii.gz", "errors.nii.gz"):
        assert np.array_equal(read_map(tmp_path / "usual" / name), read_map(tmp_path / "thin" / name))
    pictures = [io.imread(tmp_path / folder / "segmentation.png") for folder in ("usual", "thin")]
    assert not np.array_equal(*pictures)


# ---- output folder ----


def test_a_second_inspection_replaces_its_own_files_and_no_others(plain, tmp_path):
    model, image, label = plain
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert inspect(model, image, tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"prediction.nii.gz", "segmentation.png", "summary.json", MARKER, "notes.txt"}


def test_a_folder_of_others_stays_as_it_is(plain, tmp_path, capsys):
    model, image, _ = plain
    (tmp_path / "prediction.nii.gz").write_text("mine")
    assert inspect(model, image, tmp_path) == 1
    assert "not empty, and not made by `nnunet_l2g inspect`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prediction.nii.gz"]
    assert inspect(model, image, tmp_path / "prediction.nii.gz") == 1
    assert "this is a file" in capsys.readouterr().err
    assert inspect(model, image, tmp_path / "prediction.nii.gz" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_marker_cannot_name_files_elsewhere(plain, tmp_path):
    model, image, _ = plain
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "out" / MARKER).write_text(json.dumps(["../precious.txt", "..", 3]))
    assert inspect(model, image, tmp_path / "out") == 0
    assert (tmp_path / "precious.txt").exists()


# ---- refusals: one line that names the file, and no output folder ----


def refused(capsys, tmp_path, words, model, image, *options, label=None):
    """The command ends with 1 and one error that has all words; nothing was written."""
    assert inspect(model, image, tmp_path / "refused", *options, label=label) == 1
    error = capsys.readouterr().err
    message = next(line for line in error.splitlines() if line.startswith("nnunet_l2g inspect:"))
    assert "Traceback" not in error and all(str(word) in message for word in words), message
    assert not (tmp_path / "refused").exists()


@pytest.fixture
def copied(plain, tmp_path):
    """The model folder to spoil."""
    model, *rest = plain
    return (shutil.copytree(model, tmp_path / model.name), *rest)


def test_model_folders_that_are_none(copied, tmp_path, capsys):
    model, image, _ = copied
    fold = model / "fold_0"
    refused(capsys, tmp_path, ["no such folder", tmp_path / "nowhere"], tmp_path / "nowhere", image)
    refused(capsys, tmp_path, ["dataset.json is missing"], fold, image)
    refused(capsys, tmp_path, ["expected the number of a fold"], model, image, "-f", "x")
    refused(capsys, tmp_path, ["fold_3 is missing", "has fold 0"], model, image, "-f", "3")
    refused(capsys, tmp_path, ["checkpoint_best.pth is missing", "has checkpoint checkpoint_final.pth"], model, image, "-chk",
            "checkpoint_best.pth")  # fmt: skip
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    refused(capsys, tmp_path, ["has checkpoint checkpoint_latest.pth", "-chk"], model, image)
    (fold / "checkpoint_latest.pth").unlink()
    refused(capsys, tmp_path, ["has no checkpoint", "train this fold"], model, image)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_foreign_checkpoints(copied, tmp_path, capsys):
    model, image, _ = copied
    path = model / "fold_0" / "checkpoint_final.pth"
    good = torch.load(path, weights_only=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(capsys, tmp_path, [path, "cannot be read"], model, image)
    evil = Evil()
    evil.path = tmp_path / "executed"
    torch.save(good | {"extra": evil}, path)
    refused(capsys, tmp_path, [path, "never unpickled"], model, image)
    assert not (tmp_path / "executed").exists()
    torch.save({"state_dict": {}}, path)
    refused(capsys, tmp_path, [path, "network_weights, trainer_name, init_args"], model, image)
    torch.save(good | {"trainer_name": "nnUNetTrainerOfNobody"}, path)
    refused(capsys, tmp_path, [path, "nnUNetTrainerOfNobody", "doctor"], model, image)
    torch.save(good | {"trainer_name": "nnUNetTrainerL2GNet"}, path)
    refused(capsys, tmp_path, [path, "do not fit"], model, image)
    torch.save(good | {"init_args": {"configuration": "3d_lowres"}}, path)
    refused(capsys, tmp_path, [path, "3d_lowres", "3d_fullres"], model, image)


def test_images_that_cannot_be_used(plain, tmp_path, capsys):
    model, image, _ = plain
    write_case(tmp_path / "two", channels=2)
    two = tmp_path / "two" / "case_0000.nii.gz"
    refused(capsys, tmp_path, ["no such file"], model, tmp_path / "none_0000.nii.gz")
    refused(capsys, tmp_path, ["did you mean", two], model, tmp_path / "two" / "case")
    refused(capsys, tmp_path, ["a folder", two], model, tmp_path / "two")
    refused(capsys, tmp_path, [two, "2 channels", "takes 1 (image)"], model, two)
    refused(capsys, tmp_path, [image, "2 channels"], model, [image, image])
    (tmp_path / "image.png").write_bytes(b"x")
    refused(capsys, tmp_path, ["image.png", ".nii.gz"], model, tmp_path / "image.png")
    (tmp_path / "bad_0000.nii.gz").write_bytes(b"no image")
    refused(capsys, tmp_path, ["bad_0000.nii.gz", "SimpleITKIO cannot read it"], model, tmp_path / "bad_0000.nii.gz")
    (tmp_path / "two" / "case_0001.nii.gz").rename(tmp_path / "two" / "case_0002.nii.gz")
    refused(capsys, tmp_path, ["case_0001.nii.gz is missing"], model, two)


def test_voxels_that_are_not_finite(tmp_path, capsys):
    """SimpleITK reads NaN of a NIfTI file as 0, nibabel does not."""
    model = write_model(tmp_path, plans=make_plans(reader="NibabelIO"))
    image, _ = write_case(tmp_path / "in")
    array = nibabel.load(image).get_fdata()
    array[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "nan_0000.nii.gz")
    refused(capsys, tmp_path, ["nan_0000.nii.gz", "1 voxels are NaN"], model, tmp_path / "nan_0000.nii.gz")


def test_channels_on_two_grids(tmp_path, capsys):
    model = write_model(tmp_path, plans=make_plans(channels=2), names=("a", "b"))
    image, _ = write_case(tmp_path / "one")
    for word, values in (("shape", (12, 40, 35)), ("origin", (0, 0, 0)), ("spacing", (4, 1, 1))):
        options = {word: values}
        other, _ = write_case(tmp_path / "other", **options)
        refused(capsys, tmp_path, [other, word], model, [image, other])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shape": (12, 40, 35)}, "shape (12, 40, 35)"),
        ({"spacing": (4, 1.5, 2.6)}, "spacing"),
    ],
)
def test_labels_that_do_not_lie_on_the_image(plain, tmp_path, capsys, options, word):
    model, image, _ = plain
    _, label = write_case(tmp_path / "other", **options)
    refused(capsys, tmp_path, [label, word, image], model, image, label=label)


@pytest.mark.parametrize(("name", "value"), [("origin", (-10, 5, 78)), ("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1))])
def test_a_label_whose_header_alone_differs_is_used_under_a_warning(plain, tmp_path, capsys, name, value):
    model, image, label = plain
    _, other = write_case(tmp_path / "other", **{name: value})
    assert inspect(model, image, tmp_path / "right", label=label) == inspect(model, image, tmp_path / "out", label=other) == 0
    assert f"WARNING: HEADERS DIFFER: the label {other} has origin" in capsys.readouterr().out
    found, expected = read_summary(tmp_path / "out"), read_summary(tmp_path / "right")
    assert found["segmentation"] == expected["segmentation"] and expected["warning"] is None
    assert str(image) in found["warning"]


def test_an_image_whose_name_begins_with_a_dot(plain, tmp_path, capsys):
    model, image, _ = plain
    hidden = image.with_name(f"._{image.name}")
    hidden.write_bytes(bytes(100))
    refused(capsys, tmp_path, [hidden, "begin with a dot"], model, hidden)
    refused(capsys, tmp_path, [f"such as {image}"], model, image.parent)
    hidden.unlink()


def test_labels_with_unknown_values(plain, tmp_path, capsys):
    model, image, label = plain
    changed = tmp_path / "label.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(label)) * 3, str(changed))
    refused(capsys, tmp_path, [changed, "[3.0, 6.0]", "[0, 1, 2]"], model, image, label=changed)
    refused(capsys, tmp_path, ["-l", "no such file"], model, image, label=tmp_path / "none.nii.gz")


def test_a_cascades_second_stage_and_a_domain_without_target(tmp_path, capsys):
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    image, _ = write_case(tmp_path / "in")
    refused(capsys, tmp_path, ["cascade", "3d_lowres"], write_model(tmp_path / "cascade", plans=plans), image)
    refused(capsys, tmp_path, ["--domain target", "name no target"], write_model(tmp_path), image, "--domain", "target")
