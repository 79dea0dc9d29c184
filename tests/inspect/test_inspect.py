"""`nnunet_l2g inspect` on untrained models: what is written, that it is right, and what is refused."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
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
    """The files in the summary. They exist and no others, maps lie on the image, pictures show something."""
    files = read_summary(output)["files"]
    assert set(files) == {path.name for path in output.iterdir()} - {MARKER}
    for name, line in files.items():
        assert line and (output / name).stat().st_size > 0
        if name.endswith(".nii.gz"):
            assert lies_on(output / name, image), name
        if name.endswith(".png"):
            picture = io.imread(output / name)
            assert min(picture.shape[:2]) > 200 and picture.std() > 10
    return set(files)


# ---- any model ----


def test_a_stock_model_gets_nnunets_prediction_and_errors(plain, tmp_path, capsys):
    model, image, label = plain
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    assert files == {"prediction.nii.gz", "errors.nii.gz", "segmentation.png", "summary.json"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in files)

    reference = read_map(label)
    prediction, errors = (read_map(tmp_path / "out" / name) for name in ("prediction.nii.gz", "errors.nii.gz"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    assert np.array_equal(prediction, predictor.predict_single_npy_array(*SimpleITKIO().read_images([str(image)])))
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


def test_channels_are_found_beside_the_first_or_taken_as_named(plain, tmp_path):
    model = write_model(tmp_path, plans=make_plans(channels=2), names=("a", "b"))
    image, _ = write_case(tmp_path / "in", channels=2)
    images = [image, image.with_name("case_0001.nii.gz")]
    for named in (1, 2):
        assert inspect(model, images[:named], tmp_path / "out") == 0
        assert read_summary(tmp_path / "out")["images"] == [str(path) for path in images]
    shutil.copy(image, tmp_path / "scan.nii.gz")
    assert inspect(plain[0], tmp_path / "scan.nii.gz", tmp_path / "out") == 0
    assert read_summary(tmp_path / "out")["images"] == [str(tmp_path / "scan.nii.gz")]


def test_large_images_are_thinned_for_figures_alone(plain, tmp_path, monkeypatch):
    from nnunet_l2g.inspect import case

    model, image, label = plain
    assert inspect(model, image, tmp_path / "usual", label=label) == 0
    monkeypatch.setattr(case, "LARGEST", 9)
    assert inspect(model, image, tmp_path / "thin", label=label) == 0
    for name in ("prediction.nii.gz", "errors.nii.gz"):
        assert np.array_equal(read_map(tmp_path / "usual" / name), read_map(tmp_path / "thin" / name))
    assert (tmp_path / "usual/segmentation.png").read_bytes() != (tmp_path / "thin/segmentation.png").read_bytes()


# ---- output folder ----


def test_a_second_inspection_replaces_its_own_files_and_no_others(plain, tmp_path):
    model, image, label = plain
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "precious.txt").write_text("mine")
    marker = tmp_path / "out" / MARKER
    marker.write_text(json.dumps(["../precious.txt", "..", 3, *json.loads(marker.read_text())]))
    assert inspect(model, image, tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"prediction.nii.gz", "segmentation.png", "summary.json", MARKER, "notes.txt"}
    assert (tmp_path / "precious.txt").exists()


def test_a_folder_of_others_stays_as_it_is(plain, tmp_path, capsys):
    model, image, _ = plain
    (tmp_path / "prediction.nii.gz").write_text("mine")
    for folder, words in (
        (tmp_path, "not empty, and not made by `nnunet_l2g inspect`"),
        (tmp_path / "prediction.nii.gz", "this is a file"),
        (tmp_path / "prediction.nii.gz" / "out", "cannot be written"),
    ):
        assert inspect(model, image, folder) == 1
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prediction.nii.gz"]


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
    refused(capsys, tmp_path, [tmp_path / "nowhere", "dataset.json is missing"], tmp_path / "nowhere", image)
    refused(capsys, tmp_path, ["dataset.json is missing"], fold, image)
    has = f"{model} has fold_0/checkpoint_final.pth; name one with -f and -chk"
    refused(capsys, tmp_path, [f"{model}/fold_3/checkpoint_final.pth is missing", has], model, image, "-f", "3")
    refused(capsys, tmp_path, [f"{fold}/checkpoint_best.pth is missing", has], model, image, "-chk", "checkpoint_best.pth")
    (fold / "checkpoint_final.pth").unlink()
    refused(capsys, tmp_path, ["has no checkpoint", "train it"], model, image)


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
    for content, words in (
        (good | {"extra": evil}, ["never unpickled"]),
        ({"state_dict": {}}, ["KeyError: 'trainer_name'"]),
        (good | {"inference_allowed_mirroring_axes": (7,)}, ["inference_allowed_mirroring_axes"]),
        (good | {"trainer_name": "nnUNetTrainerOfNobody"}, ["nnUNetTrainerOfNobody", "doctor"]),
        (good | {"trainer_name": "nnUNetTrainerL2GNet"}, ["do not fit"]),
    ):
        torch.save(content, path)
        refused(capsys, tmp_path, [path, *words], model, image)
    assert not (tmp_path / "executed").exists()
    torch.save(good | {"init_args": {"configuration": "3d_lowres"}}, path)
    refused(capsys, tmp_path, ["plans.json", "3d_lowres", "3d_fullres"], model, image)


def test_images_that_cannot_be_used(plain, tmp_path, capsys):
    model, image, _ = plain
    write_case(tmp_path / "two", channels=2)
    two = tmp_path / "two" / "case_0000.nii.gz"
    for path in (tmp_path / "none_0000.nii.gz", tmp_path / "two"):
        refused(capsys, tmp_path, [path, "no such file", "CASE_0000.nii.gz"], model, path)
    refused(capsys, tmp_path, [two, "2 channel(s)", "takes 1 (image)"], model, two)
    refused(capsys, tmp_path, [image, "2 channel(s)"], model, [image, image])
    (tmp_path / "image.png").write_bytes(b"x")
    refused(capsys, tmp_path, ["image.png", ".nii.gz"], model, tmp_path / "image.png")
    (tmp_path / "bad_0000.nii.gz").write_bytes(b"no image")
    refused(capsys, tmp_path, ["bad_0000.nii.gz", "SimpleITKIO cannot read it"], model, tmp_path / "bad_0000.nii.gz")


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
        other, _ = write_case(tmp_path / "other", **{word: values})
        refused(capsys, tmp_path, [other, word, image], model, [image, other])


def test_labels_that_cannot_be_used(plain, tmp_path, capsys):
    model, image, label = plain
    for word, values in (("shape", (12, 40, 35)), ("spacing", (4, 1.5, 2.6))):
        _, other = write_case(tmp_path / "other", **{word: values})
        refused(capsys, tmp_path, [other, word, image], model, image, label=other)
    changed = tmp_path / "label.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(label)) * 3, str(changed))
    refused(capsys, tmp_path, [changed, "[3.0, 6.0]", "[0, 1, 2]"], model, image, label=changed)
    refused(capsys, tmp_path, ["none.nii.gz: no such file"], model, image, label=tmp_path / "none.nii.gz")


@pytest.mark.parametrize(("name", "value"), [("origin", (-10, 5, 78)), ("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1))])
def test_a_label_whose_header_alone_differs_is_used_under_a_warning(plain, tmp_path, capsys, name, value):
    model, image, label = plain
    _, other = write_case(tmp_path / "other", **{name: value})
    assert inspect(model, image, tmp_path / "right", label=label) == inspect(model, image, tmp_path / "out", label=other) == 0
    assert f"WARNING: HEADERS DIFFER: the label {other} has origin" in capsys.readouterr().out
    found, expected = read_summary(tmp_path / "out"), read_summary(tmp_path / "right")
    assert found["segmentation"] == expected["segmentation"] and expected["warning"] is None
    assert str(image) in found["warning"]


def test_a_cascades_second_stage_and_a_domain_without_target(tmp_path, capsys):
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    image, _ = write_case(tmp_path / "in")
    refused(capsys, tmp_path, ["cascade", "3d_lowres"], write_model(tmp_path / "cascade", plans=plans), image)
    refused(capsys, tmp_path, ["--domain target", "name no target"], write_model(tmp_path), image, "--domain", "target")
