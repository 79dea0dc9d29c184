"""`nnunet_l2g inspect` on untrained models: what is written, that it is right, and what is refused."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from skimage import io
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.inspect.case import find_channels, read_case, read_channels
from nnunet_l2g.inspect.maps import Output
from nnunet_l2g.trainers.l2gnet import REGIONS_KEY

torch.set_num_threads(1)
MARKER = ".nnunet_l2g_inspect"
SEGMENTATION = {"prediction.nii.gz", "segmentation.png", "summary.json"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A stock trainer's model, an image, its label."""
    folder = tmp_path_factory.mktemp("plain")
    return write_model(folder), *write_case(folder / "in")


def inspect(model, image, output, *options, label=None):
    """Exit status of the command."""
    options = [*options, *(["-l", label] if label else [])]
    arguments = ["inspect", "-m", model, "-f", 0, "-i", image, "-o", output, "--device", "cpu", *options]
    return main([str(argument) for argument in arguments])


def read_summary(output):
    return json.loads((output / "summary.json").read_text())


def read_map(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def lies_on(path, image):
    one, other = (sitk.ReadImage(str(p)) for p in (path, image))
    names = ("GetSize", "GetSpacing", "GetOrigin", "GetDirection")
    return all(np.allclose(getattr(one, name)(), getattr(other, name)(), atol=1e-5) for name in names)


def check_files(output, image):
    """The files in the summary. They exist and no others, maps lie on the image, pictures show something."""
    files = read_summary(output)["files"]
    assert set(files) == {path.name for path in output.iterdir()} - {MARKER}
    for name in files:
        if name.endswith(".nii.gz"):
            assert lies_on(output / name, image), name
        if name.endswith(".png"):
            assert io.imread(output / name).std() > 10
    return set(files)


def refused(function, *arguments, words):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert all(str(word) in str(error.value) for word in words), error.value


# ---- any model ----


def test_a_stock_model_gets_nnunets_prediction_and_errors(plain, tmp_path, capsys):
    model, image, label = plain
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    assert check_files(tmp_path / "out", image) == SEGMENTATION | {"errors.nii.gz"}
    assert "segmentation.png   image, reference, prediction" in capsys.readouterr().out
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
        true, voxels = ((reference == value) & (prediction == value)).sum(), (prediction == value).sum()
        dice = 2 * true / ((reference == value).sum() + voxels)
        assert summary["segmentation"]["scores"][name]["dice"] == pytest.approx(dice, abs=1e-5)
        assert summary["segmentation"]["voxels"][name] == voxels


def test_regions_with_an_ignore_label(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "lesion": 2, "ignore": 3}
    model = write_model(tmp_path, "nnUNetTrainerL2GNet", make_plans() | {REGIONS_KEY: True}, labels, regions_class_order=[1, 2])
    image, label = write_case(tmp_path / "in")
    reference = sitk.ReadImage(str(label))
    reference[:20, :, :] = 3
    sitk.WriteImage(reference, str(label))
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    assert files == SEGMENTATION | {"errors.nii.gz", "references_0000.nii.gz", "references_0001.nii.gz", "references.png"}
    summary = read_summary(tmp_path / "out")
    scores, parts = summary["segmentation"]["scores"], summary["l2gnet"]["structures"]
    array, prediction = read_map(label), read_map(tmp_path / "out/prediction.nii.gz")
    assert (read_map(tmp_path / "out/errors.nii.gz")[array == 3] == 5).all()
    assert scores["whole"]["true_positive"] == (np.isin(array, (1, 2)) & (prediction > 0)).sum()
    inside = read_map(tmp_path / "out/references_0000.nii.gz")[np.isin(array, (1, 2))]  # 6 to 10 stand for the region
    assert parts["whole"] == pytest.approx([(inside == 5 + number).mean() for number in range(1, 6)], abs=1e-3)
    assert set(scores) == set(parts) == {"whole", "lesion"}


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


def test_channels_are_found_beside_the_first_or_taken_as_named(tmp_path):
    first, _ = write_case(tmp_path, channels=2)
    second = first.with_name("case_0001.nii.gz")
    for named, expected in (([first], [first, second]), ([second, first], [second, first])):
        assert find_channels(named, ".nii.gz") == ("case", expected)
    scan = first.rename(tmp_path / "scan.nii.gz")
    assert find_channels([scan], ".nii.gz") == ("scan", [scan])


def test_an_earlier_inspections_files_are_replaced_and_no_others(tmp_path):
    first = Output(tmp_path / "out")
    for name in ("prediction.nii.gz", "errors.nii.gz"):
        first.add(name, "a line").write_text("")
    for path in (tmp_path / "precious.txt", tmp_path / "out" / "notes.txt"):
        path.write_text("mine")
    marker = tmp_path / "out" / MARKER
    marker.write_text(json.dumps(["../precious.txt", "..", 3, *json.loads(marker.read_text())]))
    Output(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"notes.txt", MARKER}
    marker.unlink()
    refused(Output, tmp_path / "out", words=["not empty, and not made by `nnunet_l2g inspect`"])
    assert (tmp_path / "precious.txt").exists()


# ---- refusals ----


def test_a_refusal_writes_nothing(plain, tmp_path, capsys):
    model, image, _ = plain
    assert inspect(model, image, tmp_path / "out", "-f", "3") == 1
    error = f"nnunet_l2g inspect: {model}/fold_3/checkpoint_final.pth is missing; {model} has fold_0/checkpoint_final.pth"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_used(plain, tmp_path):
    model = shutil.copytree(plain[0], tmp_path / plain[0].name)
    file = model / "fold_0" / "checkpoint_final.pth"
    refused(open_model, tmp_path / "nowhere", words=["-m", tmp_path / "nowhere", "dataset.json is missing"])
    good, whole = torch.load(file, weights_only=False), file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(open_model, model, words=[file, "cannot be read", "damaged"])
    for change, words in (
        ({"inference_allowed_mirroring_axes": (7,)}, ["inference_allowed_mirroring_axes"]),
        ({"trainer_name": "nnUNetTrainerOfNobody"}, ["nnUNetTrainerOfNobody", "doctor"]),
        ({"trainer_name": "nnUNetTrainerL2GNet"}, ["do not fit"]),
        ({"init_args": {"configuration": "3d_lowres"}}, ["3d_lowres", "3d_fullres"]),
    ):
        torch.save(good | change, file)
        refused(open_model, model, words=[model, *words])
    torch.save({"state_dict": {}}, file)
    refused(open_model, model, words=[file, "KeyError: 'trainer_name'"])
    file.unlink()
    refused(open_model, model, words=["has no checkpoint", "train it"])
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    refused(open_model, write_model(tmp_path / "cascade", plans=plans), words=["cascade", "3d_lowres"])
    refused(lambda: open_model(plain[0], domain="target"), words=["--domain target", "name no target"])


def test_images_and_labels_that_cannot_be_used(plain, tmp_path):
    model, (_, image, label) = open_model(plain[0]), plain
    two, _ = write_case(tmp_path / "two", channels=2)
    text, changed = tmp_path / "text_0000.nii.gz", tmp_path / "label.nii.gz"
    text.write_bytes(b"no image")
    sitk.WriteImage(sitk.ReadImage(str(label)) * 3, str(changed))
    for images, reference, words in (
        ([tmp_path / "none_0000.nii.gz"], None, ["none_0000.nii.gz: no such file", "CASE_0000.nii.gz"]),
        ([tmp_path], None, [tmp_path, "no such file"]),
        ([plain[0] / "plans.json"], None, ["plans.json", ".nii.gz"]),
        ([text], None, [text, "SimpleITKIO cannot read it"]),
        ([two], None, [two, "2 channel(s)", "takes 1 (image)"]),
        ([image], tmp_path / "none.nii.gz", ["none.nii.gz: no such file"]),
        ([image], changed, [changed, "[3.0, 6.0]", "[0, 1, 2]"]),
    ):
        refused(read_case, model, images, reference, words=words)
    for word, values in (("shape", (12, 40, 35)), ("origin", (0, 0, 0)), ("spacing", (4, 1, 1))):
        other, reference = write_case(tmp_path / "other", **{word: values})
        refused(read_channels, SimpleITKIO(), [image, other], words=[other, word, image])
        if word != "origin":
            refused(read_case, model, [image], reference, words=[reference, word, image])
    array = np.ones((9, 9, 9))
    array[3, 3, 3] = np.nan  # SimpleITK reads it as 0, nibabel does not
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "nan_0000.nii.gz")
    refused(read_channels, NibabelIO(), [tmp_path / "nan_0000.nii.gz"], words=["nan_0000.nii.gz", "1 voxels are NaN"])


def test_a_label_whose_header_alone_differs_is_used_under_a_warning(plain, tmp_path, capsys):
    model, image, label = plain
    right = read_case(open_model(model), [image], label)
    for name, value in (("origin", (-10, 5, 78)), ("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1))):
        _, other = write_case(tmp_path / name, **{name: value})
        case = read_case(open_model(model), [image], other)
        assert right.warning is None and np.array_equal(case.reference, right.reference)
        assert case.warning.startswith(f"HEADERS DIFFER: the label {other} has origin") and str(image) in case.warning
    assert inspect(model, image, tmp_path / "out", label=other) == 0
    assert f"WARNING: {case.warning}" in capsys.readouterr().out
