"""`nnunet_l2g adapt`: what it checks, what it makes of an unlabelled target; no kill and no changed file can spoil it."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import FEW_SAMPLES, FORKED, PLAIN, RICH, SIZE, SPACING, Planned
from test_trainers import CPU
from test_trainers import make as make_trainer

from nnunet_l2g.adapt.digests import digest_samples
from nnunet_l2g.adapt.fingerprint import CaseJob, body_mask, read_case
from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.phantom import write_dataset
from nnunet_l2g.training.adapted_plans import TARGET_KEY, check_adapted_plans

TARGET = "Dataset983_Late"
PLANS = "nnUNetPlans_to983"
CASES = [f"phantom_tr{i:03d}" for i in range(5)]


@pytest.fixture(scope="module")
def prepared(planned, tmp_path_factory):
    """Cine phantoms, planned and preprocessed, and late enhancement phantoms, raw."""
    project = Planned(tmp_path_factory.mktemp("pair"))
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, PLAIN), project.path(kind, PLAIN))
    write_dataset(project.path("raw"), 5, 2, "late_enhancement", seed=7, dataset_id=983, name="Late", size=SIZE,
                  spacing=SPACING)  # fmt: skip
    return project


@pytest.fixture
def pair(prepared, tmp_path, monkeypatch):
    """A copy of them for one test, with nnU-Net's variables set."""
    project = Planned(tmp_path / "nnunet")
    shutil.copytree(prepared.folder, project.folder)
    for name, value in project.variables.items():
        monkeypatch.setenv(name, value)
    return project


def adapt(*args, source="981", target="983", configurations=("2d",)):
    """The command's exit status, in this process unless -np says otherwise."""
    return main(["adapt", "-s", source, "-t", target, "-c", *configurations, "-np", "1", *args])


def data(project, configuration="2d", target=TARGET, plans="nnUNetPlans") -> Path:
    return project.path("preprocessed", target, f"from_981_{plans}", f"nnUNetPlans_{configuration}")


def read_plans(project, name=PLANS) -> dict:
    return json.loads(project.path("preprocessed", PLAIN, f"{name}.json").read_text())


def tree(folder: Path, pattern="*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_images(folder: Path, change, names="*.nii.gz") -> None:
    for path in sorted(folder.glob(names)):
        SimpleITK.WriteImage(change(SimpleITK.ReadImage(str(path))), str(path))


def to_ct(image):
    """Body of 40 +- 20 HU on air of -1000 +- 10 HU, in a corner padded with -3024."""
    array = SimpleITK.GetArrayFromImage(image).astype(float)
    body = array > np.median(array)
    rng = np.random.default_rng(0)
    hounsfield = np.where(body, rng.normal(40, 20, array.shape), rng.normal(-1000, 10, array.shape))
    hounsfield[:, :10, :10] = -3024
    result = SimpleITK.GetImageFromArray(hounsfield.astype(np.int16))
    result.CopyInformation(image)
    return result


def make_ct(project) -> None:
    raw = project.path("raw", TARGET)
    edit_images(raw / "imagesTr", to_ct)
    edit_json(raw / "dataset.json", lambda d: d.update(channel_names={"0": "CT"}))


def check(project, configuration="2d"):
    return check_adapted_plans(read_plans(project), configuration)


# what it makes


def test_target_is_preprocessed_as_nnunet_preprocesses_an_unlabelled_image_with_the_adapted_plans(pair, capsys):
    before = tree(pair.path("preprocessed", PLAIN))
    assert adapt(configurations=("2d", "3d_fullres")) == 0
    printed = capsys.readouterr().out
    plans = read_plans(pair)
    for configuration in ("2d", "3d_fullres"):
        assert f"nnUNetv2_train 981 {configuration} 0 -tr nnUNetTrainerGLUA -p {PLANS}" in printed
        target = check(pair, configuration)
        assert (target.dataset_name, target.folder, target.identifiers) == (TARGET, data(pair, configuration), CASES)
        assert {p.name for p in target.folder.iterdir()} == {c + s for c in CASES for s in (".b2nd", "_seg.b2nd", ".pkl")}
        manager = PlansManager(plans)
        resolved = manager.get_configuration(configuration)
        for case in CASES:
            image = pair.path("raw", TARGET, "imagesTr", f"{case}_0000.nii.gz")
            expected, mask, _ = DefaultPreprocessor(verbose=False).run_case([str(image)], None, manager, resolved, {})
            found, stored_mask, _, properties = nnUNetDatasetBlosc2(str(target.folder)).load_case(case)
            np.testing.assert_array_equal(found[:], expected)
            np.testing.assert_array_equal(stored_mask[:], mask)
            assert properties["class_locations"] == {}
    after = tree(pair.path("preprocessed", PLAIN))
    assert after.pop(f"{PLANS}.json") and after == before


@pytest.mark.parametrize("dataset", [PLAIN, RICH])
def test_nnunets_loader_draws_patches_from_the_target(pair, planned, dataset):
    assert adapt() == 0
    target, manager = check(pair), PlansManager(read_plans(pair))
    labels = manager.get_label_manager(json.loads(planned.path("preprocessed", dataset, "dataset.json").read_text()))
    patch = manager.get_configuration("2d").patch_size
    for oversampling in (0.0, 1.0):
        loader = nnUNetDataLoader(nnUNetDatasetBlosc2(str(target.folder)), 4, patch, patch, labels, oversampling)
        assert loader.has_ignore == (dataset == RICH)
        loader.has_ignore = False  # with an ignore label it would look for annotated voxels, and there are none
        batch = next(loader)
        assert batch["data"].shape == (4, 1, *patch) and set(batch["target"].unique().tolist()) <= {0, -1}


def test_plans_are_the_sources_but_for_name_normalisation_and_target(pair):
    make_ct(pair)
    source = read_plans(pair, "nnUNetPlans")
    assert adapt() == 0
    plans = read_plans(pair)
    assert plans.pop(TARGET_KEY)["dataset_name"] == TARGET
    assert plans.pop("plans_name") == PLANS and source.pop("plans_name")
    statistics = plans.pop("foreground_intensity_properties_per_channel")["0"]
    assert source.pop("foreground_intensity_properties_per_channel")["0"] != statistics
    for configuration in plans["configurations"].values():
        assert configuration["normalization_schemes"] == ["CTNormalization"]
        configuration["normalization_schemes"] = ["ZScoreNormalization"]
    assert plans == source
    # the body of to_ct, not the air and not the padding
    assert abs(statistics["mean"] - 40) < 2 and abs(statistics["std"] - 20) < 2 and statistics["percentile_00_5"] > -100
    found = nnUNetDatasetBlosc2(str(data(pair))).load_case(CASES[0])[0][:]
    np.testing.assert_allclose(found.min(), (statistics["percentile_00_5"] - statistics["mean"]) / statistics["std"], rtol=1e-3)
    assert check(pair).source_normalization_schemes == ["ZScoreNormalization"]


def test_zeros_around_the_target_switch_masked_normalisation_on_for_the_target_only(pair):
    def surround(image):
        array = SimpleITK.GetArrayFromImage(image)
        array[:, :10], array[:, 26:] = 0, 0
        array[:, 10:12, :8] = 0  # within the box: outside the mask
        result = SimpleITK.GetImageFromArray(array)
        result.CopyInformation(image)
        return result

    edit_images(pair.path("raw", TARGET, "imagesTr"), surround)
    assert adapt() == 0
    assert read_plans(pair)["configurations"]["2d"]["use_mask_for_norm"] == [True]
    assert check(pair).source_use_mask_for_norm == [False]
    image, mask, _, _ = nnUNetDatasetBlosc2(str(data(pair))).load_case(CASES[0])
    image, mask = image[:], mask[:]
    assert (mask == -1).any() and (image[mask == -1] == 0).all() and abs(image[mask == 0].mean()) < 1e-3


@given(
    air=st.integers(-1100, 0), contrast=st.integers(300, 2000), share=st.floats(0.1, 0.8), padding=st.integers(0, 200),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_body_is_told_from_air_whatever_the_unit_and_the_padding(air, contrast, share, padding, seed):
    rng = np.random.default_rng(seed)
    body = rng.random((12, 24, 24)) < share
    image = air + np.where(body, contrast, 0) + rng.normal(0, 10, body.shape)
    image.reshape(-1)[:padding] = -3024
    body.reshape(-1)[:padding] = False
    np.testing.assert_array_equal(body_mask(image.astype(np.float32)), body)


@pytest.mark.parametrize("values", [[5.0], [0.0, 1.0]])
def test_body_of_images_without_contrast(values):
    image = np.resize(np.float32(values), (2, 4, 4))
    np.testing.assert_array_equal(body_mask(image), image == max(values))


def test_resenc_plans_and_several_targets_live_side_by_side(pair):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    plan_experiments([981], "nnUNetPlannerResEncM")
    write_dataset(pair.path("raw"), 5, 0, "late_enhancement", seed=8, dataset_id=984, name="Other", size=SIZE, spacing=SPACING)
    assert adapt() == 0
    first = tree(pair.path("preprocessed", TARGET))
    assert adapt(target="Dataset984_Other") == 0
    assert adapt("-p", "nnUNetResEncUNetMPlans") == 0
    for name, target in ((PLANS, TARGET), ("nnUNetPlans_to984", "Dataset984_Other"), ("nnUNetResEncUNetMPlans_to983", TARGET)):
        assert check_adapted_plans(read_plans(pair, name), "2d").dataset_name == target
    after = tree(pair.path("preprocessed", TARGET))
    assert {name: content for name, content in after.items() if name in first} == first
    network = read_plans(pair, "nnUNetResEncUNetMPlans_to983")["configurations"]["2d"]["architecture"]["network_class_name"]
    assert network.endswith("ResidualEncoderUNet")


def test_configurations_adapted_earlier_stay_and_are_kept_up_to_date(pair):
    assert adapt(configurations=("2d",)) == 0
    make_ct(pair)
    assert adapt(configurations=("3d_fullres",)) == 0
    assert set(read_plans(pair)[TARGET_KEY]["configurations"]) == {"2d", "3d_fullres"}
    for configuration in ("2d", "3d_fullres"):
        assert nnUNetDatasetBlosc2(str(check(pair, configuration).folder)).load_case(CASES[0])[0][:].min() > -10


def test_cascades_are_left_out_of_adapted_plans(pair):
    def add(plans):
        plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"] | {"next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    edit_json(pair.path("preprocessed", PLAIN, "nnUNetPlans.json"), add)
    assert main(["adapt", "-s", "981", "-t", "983", "-np", "1"]) == 0
    plans = read_plans(pair)
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_lowres"} and "next_stage" not in str(plans)
    assert len({entry["data"] for entry in plans[TARGET_KEY]["configurations"].values()}) == 2  # two share theirs


# labels


AUDITED = """
import os, sys
touched = []
def spy(event, args):
    if event in ("open", "os.listdir", "os.scandir") and "labelsT" in str(args[0]):
        touched.append(str(args[0]))
sys.addaudithook(spy)
from nnunet_l2g.cli import main
status = main(sys.argv[1:])
open(os.path.join(os.environ["nnUNet_raw"], "Dataset981_PhantomPlain", "labelsTr", "phantom_tr000.nii.gz")).close()
os.listdir(os.path.join(os.environ["nnUNet_raw"], "Dataset981_PhantomPlain", "labelsTr"))
assert len([path for path in touched if "981" in path]) >= 2, "the spy sees nothing"
print("TARGET LABELS:", [path for path in touched if "981" not in path])
sys.exit(status)
"""


def test_labels_of_the_target_are_never_listed_opened_or_needed(pair):
    labels = pair.path("raw", TARGET, "labelsTr")
    for path in labels.iterdir():
        path.write_bytes(b"not an image")
    command = [sys.executable, "-c", AUDITED, "adapt", "-s", "981", "-t", "983", "-c", "2d", "-np", "1"]
    done = subprocess.run(command, env=pair.environment, capture_output=True, text=True)
    assert done.returncode == 0 and "TARGET LABELS: []" in done.stdout, done.stdout + done.stderr
    with_labels = tree(pair.path("preprocessed"))

    shutil.rmtree(labels)
    edit_json(pair.path("raw", TARGET, "dataset.json"), lambda d: [d.pop("labels"), d.pop("numTraining")])
    shutil.rmtree(pair.path("preprocessed", TARGET))
    pair.path("preprocessed", PLAIN, f"{PLANS}.json").unlink()
    assert adapt() == 0
    assert tree(pair.path("preprocessed")) == with_labels


# bad input: one line, and nothing computed


def flip(image):
    return SimpleITK.Flip(image, [True, False, False])[:, :, :]


def scaled(factor):
    def change(image):
        image.SetSpacing([s * factor for s in image.GetSpacing()])
        return image

    return change


def raw_target(project):
    return project.path("raw", TARGET)


BAD_TARGETS = {
    "channels": (lambda p: edit_json(raw_target(p) / "dataset.json", lambda d: d.update(channel_names={"0": "a", "1": "b"})),
                 r"has 2 channel\(s\) \['a', 'b'\], the source .* has 1"),
    "channels in files": (lambda p: [shutil.copy(f, str(f).replace("_0000", "_0001")) for f in
                                     list((raw_target(p) / "imagesTr").iterdir())],
                          r"phantom_tr000 has 2 channel\(s\), dataset.json names 1"),
    "a channel is missing": (lambda p: [shutil.copy(f, str(f).replace("_0000", "_0001")) for f in
                                        sorted((raw_target(p) / "imagesTr").iterdir())[1:]],
                             r"case phantom_tr000 of .* has 1 image file\(s\), expected 2"),
    "file ending": (lambda p: edit_json(raw_target(p) / "dataset.json", lambda d: d.update(file_ending=".mha")),
                    r"file_ending '\.mha', the source has '\.nii\.gz'"),
    "reader": (lambda p: edit_json(raw_target(p) / "dataset.json",
                                   lambda d: d.update(overwrite_image_reader_writer="NibabelIO")),
               "asks for the reader NibabelIO, the source's plans have SimpleITKIO"),
    "no dataset.json": (lambda p: (raw_target(p) / "dataset.json").unlink(), "dataset.json is missing"),
    "no imagesTr": (lambda p: shutil.rmtree(raw_target(p) / "imagesTr"), "imagesTr is missing"),
    "no image": (lambda p: [f.unlink() for f in (raw_target(p) / "imagesTr").iterdir()], "holds no image ending in .nii.gz"),
    "no raw data": (lambda p: shutil.rmtree(raw_target(p)), "983: no such dataset"),
    "odd name": (lambda p: (raw_target(p) / "imagesTr" / "phantom_tr000_0000.nii.gz").rename(
        raw_target(p) / "imagesTr" / "phantom.nii.gz"), r"phantom.nii.gz: expected CASE_0000.nii.gz"),
    "metres": (lambda p: edit_images(raw_target(p) / "imagesTr", scaled(0.001)), r"median spacing of \(0.01, 0.0036, 0.0036\)"),
    "centimetres": (lambda p: edit_images(raw_target(p) / "imagesTr", scaled(0.1)), "are the units the same"),
    "flipped": (lambda p: edit_images(raw_target(p) / "imagesTr", flip), "5 of 5 images .* axes are swapped or flipped"),
    "permuted": (lambda p: edit_images(raw_target(p) / "imagesTr", lambda i: SimpleITK.PermuteAxes(i, [1, 2, 0])),
                 "axes are swapped or flipped|are the units the same"),
    "2D": (lambda p: edit_images(raw_target(p) / "imagesTr", lambda i: i[:, :, 3:4]), "holds 2D images .* the source .* 3D"),
    "2D files": (lambda p: edit_images(raw_target(p) / "imagesTr", lambda i: i[:, :, 3]), "holds 2D images"),
    "no image file": (lambda p: (raw_target(p) / "imagesTr" / "phantom_tr000_0000.nii.gz").write_bytes(b"no"),
                      "phantom_tr000: .* the source's reader SimpleITKIO cannot read it"),
    "zeros": (lambda p: edit_images(raw_target(p) / "imagesTr", lambda i: i * 0), "holds only zeros"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_a_target_that_does_not_fit_is_refused_in_one_line_before_any_work(pair, capsys, name):
    spoil, message = BAD_TARGETS[name]
    spoil(pair)
    before = tree(pair.path("preprocessed"))
    assert adapt() == 1
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.splitlines()[-1]) and error.startswith("nnunet_l2g adapt: "), error
    assert tree(pair.path("preprocessed")) == before and not pair.path("preprocessed", TARGET).exists()


def test_voxels_that_are_no_numbers_are_refused(tmp_path):
    """The NIfTI reader sets them to 0; those of other formats do not."""
    image = np.zeros((4, 5, 6), np.float32)
    image[1, 2, 3] = np.nan
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), str(tmp_path / "case_0000.mha"))
    with pytest.raises(UserError, match="case case holds voxels that are not finite numbers"):
        read_case(CaseJob("case", [str(tmp_path / "case_0000.mha")], "SimpleITKIO", 1))


def source(project):
    return project.path("preprocessed", PLAIN)


BAD_SOURCES = {
    "the target itself": (lambda p: None, dict(target="981"), "is the source Dataset981_PhantomPlain itself"),
    "the target by name": (lambda p: None, dict(target=PLAIN), "is the source Dataset981_PhantomPlain itself"),
    "unknown": (lambda p: None, dict(source="77"), "-s 77: no such dataset"),
    "no id": (lambda p: None, dict(target="late"), "-t late: no such dataset"),
    "not planned": (lambda p: (source(p) / "nnUNetPlans.json").unlink(), {},
                    "has no plans nnUNetPlans.*plan_and_preprocess -d 981"),
    "no fingerprint": (lambda p: (source(p) / "dataset_fingerprint.json").unlink(), {}, "dataset_fingerprint.json is missing"),
    "not preprocessed": (lambda p: shutil.rmtree(source(p) / "nnUNetPlans_2d"), {},
                         "is not preprocessed for 2d.*nnUNetv2_preprocess -d 981 -plans_name nnUNetPlans -c 2d"),
    "half preprocessed": (lambda p: [f.unlink() for f in (source(p) / "nnUNetPlans_2d").glob("phantom_tr001*")], {},
                          "1 of 6 cases are missing, phantom_tr001 first"),
    "unknown configuration": (lambda p: None, dict(configurations=("3d_lowres",)), "-c 3d_lowres: not in the plans"),
    "cascade": (lambda p: edit_json(source(p) / "nnUNetPlans.json", lambda d: d["configurations"].update(
        {"3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}})),
        dict(configurations=("3d_cascade_fullres",)), "-c 3d_cascade_fullres: a cascade"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_is_not_ready_is_refused_in_one_line(pair, capsys, name):
    spoil, args, message = BAD_SOURCES[name]
    spoil(pair)
    assert adapt(**args) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not pair.path("preprocessed", TARGET).exists()


def test_two_channels_against_one(planned, pair, capsys):
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, RICH), pair.path(kind, RICH))
    assert adapt(source="982") == 1
    assert "the source Dataset982_PhantomRich has 2" in capsys.readouterr().err


def test_adapted_plans_are_not_adapted_again_and_variables_are_needed(pair, capsys, monkeypatch):
    assert adapt() == 0
    assert adapt("-p", PLANS) == 1
    assert "these plans are adapted already; give the source's own plans, -p nnUNetPlans" in capsys.readouterr().err
    assert adapt("-np", "0") == 1
    monkeypatch.delenv("nnUNet_raw")
    assert adapt() == 1
    assert "nnUNet_raw is not set" in capsys.readouterr().err


def test_a_minority_turned_otherwise_is_warned_of_and_used(pair, capsys):
    edit_images(pair.path("raw", TARGET, "imagesTr"), flip, "phantom_tr00[34]*")
    assert adapt() == 0
    assert "Warning: 2 of 5 images" in capsys.readouterr().out
    assert check(pair).identifiers == CASES


# repeated, interrupted, changed


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_again_there_is_nothing_to_do(pair, capsys):
    assert adapt() == 0
    before = stamps(pair.path("preprocessed"))
    capsys.readouterr()
    os.utime(pair.path("raw", TARGET, "imagesTr", "phantom_tr000_0000.nii.gz"))  # a new time, the same content
    assert adapt() == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert stamps(pair.path("preprocessed")) == before


def test_only_what_changed_is_made_again(pair):
    assert adapt() == 0
    folder, images = data(pair), pair.path("raw", TARGET, "imagesTr")
    plans, before = read_plans(pair), stamps(folder)
    edit_images(images, lambda image: image + 1 - 1 + SimpleITK.Cast(image > 100, image.GetPixelID()) * 9, "phantom_tr001*")
    (images / "phantom_tr002_0000.nii.gz").unlink()
    shutil.copy(images / "phantom_tr000_0000.nii.gz", images / "new_0000.nii.gz")
    damaged = bytearray((folder / "phantom_tr003.b2nd").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / "phantom_tr003.b2nd").write_bytes(damaged)
    (folder / "phantom_tr004.pkl").unlink()
    (folder / "stranger.b2nd").write_bytes(b"")
    assert adapt() == 0
    after = stamps(folder)
    assert check(pair).identifiers == ["new", *(case for case in CASES if case != "phantom_tr002")]
    same = {name for name in after if after[name] == before.get(name)}
    assert same == {"phantom_tr000.b2nd", "phantom_tr000_seg.b2nd", "phantom_tr000.pkl"}
    assert {name.split(".")[0].removesuffix("_seg") for name in after} == set(check(pair).identifiers)
    assert read_plans(pair)[TARGET_KEY] == plans[TARGET_KEY]  # z-scores of other images do not depend on the changed ones


def test_other_settings_make_all_cases_again(pair):
    assert adapt() == 0
    edit_json(pair.path("raw", TARGET, "dataset.json"), lambda d: d.update(channel_names={"0": "rescale_to_0_1"}))
    assert adapt() == 0
    for case in check(pair).identifiers:
        image = nnUNetDatasetBlosc2(str(data(pair))).load_case(case)[0][:]
        assert image.min() == 0 and abs(image.max() - 1) < 1e-6


def fork(function) -> int:
    """The exit code of function() in a forked child; -9 if it was killed."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(120)
    return child.exitcode


def killed_at(step: int):
    """Adapts, and is killed with SIGKILL right before the step-th file comes into place."""
    replace, count = os.replace, 0

    def counting(*args):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*args)

    os.replace = counting
    os._exit(adapt())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_file_and_run_again_it_equals_an_uninterrupted_run(pair, capfd):
    cases = CASES[:2]
    for case in CASES[2:]:
        pair.path("raw", TARGET, "imagesTr", f"{case}_0000.nii.gz").unlink()
    clean = pair.folder.with_name("clean")
    shutil.copytree(pair.path("preprocessed"), clean)
    assert adapt() == 0
    expected = tree(pair.path("preprocessed"))
    step = 0
    while True:
        step += 1
        shutil.rmtree(pair.path("preprocessed"))
        shutil.copytree(clean, pair.path("preprocessed"))
        if fork(lambda step=step: killed_at(step)) == 0:
            break
        assert not source(pair).joinpath(f"{PLANS}.json").exists()
        before = stamps(data(pair)) if data(pair).exists() else {}
        finished = {p.stem for p in data(pair).with_name("nnUNetPlans_2d.partial").glob("*.json")}
        if data(pair).with_suffix(".json").exists():
            finished |= set(json.loads(data(pair).with_suffix(".json").read_text())["cases"])
        assert adapt() == 0
        assert tree(pair.path("preprocessed")) == expected, f"killed at file {step}"
        kept = {name for name, stamp in stamps(data(pair)).items() if stamp == before.get(name)}
        assert kept == {case + suffix for case in finished for suffix in (".b2nd", "_seg.b2nd", ".pkl")}
    assert step == 1 + 1 + 4 * len(cases) + 2 + 1  # fingerprint, manifest, three files and a record a case, manifest, plans


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_brings_a_changed_target_up_to_date_the_old_plans_are_refused(pair, capfd):
    assert adapt() == 0
    make_ct(pair)
    assert fork(lambda: killed_at(6)) == -signal.SIGKILL
    with pytest.raises(UserError, match="not complete: adapt was interrupted"):
        check(pair)
    assert adapt() == 0 and check(pair).identifiers == CASES


@pytest.mark.long
def test_parallel_workers_make_the_same_and_end_with_a_killed_parent(pair):
    """Real commands with two workers each, all of which import torch: 25 s."""
    assert adapt() == 0
    expected = tree(pair.path("preprocessed"))
    shutil.rmtree(pair.path("preprocessed", TARGET))
    (source(pair) / f"{PLANS}.json").unlink()
    command = [sys.executable, "-m", "nnunet_l2g.cli", "adapt", "-s", "981", "-t", "983", "-c", "2d", "-np", "2"]
    child = subprocess.Popen(command, env=pair.environment, start_new_session=True, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    workers = wait_for(lambda: children(child.pid) if len(children(child.pid)) >= 3 else [])  # two workers, one tracker
    child.kill()
    child.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers))
    done = subprocess.run(command, env=pair.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(pair.path("preprocessed")) == expected


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


# what a trainer asks before it trains


BROKEN = {
    "plans without a target": (lambda p: edit_json(source(p) / f"{PLANS}.json", lambda d: d.pop(TARGET_KEY)),
                               "name no target; make some with `nnunet_l2g adapt -s 981 -t TARGET"),
    "another format": (lambda p: edit_json(source(p) / f"{PLANS}.json", lambda d: d[TARGET_KEY].update(format=0)),
                       "target format 0, expected 1"),
    "target deleted": (lambda p: shutil.rmtree(p.path("preprocessed", TARGET)),
                       "are gone .*nnunet_l2g adapt -s 981 -t 983 -c 2d -p nnUNetPlans"),
    "target's folder deleted": (lambda p: shutil.rmtree(data(p)), "are gone"),
    "a file deleted": (lambda p: (data(p) / "phantom_tr002_seg.b2nd").unlink(), "phantom_tr002_seg.b2nd is missing"),
    "a file cut": (lambda p: (data(p) / "phantom_tr002.b2nd").write_bytes(b"x"), "has another size"),
    "other settings": (lambda p: edit_json(data(p).with_suffix(".json"), lambda d: d.update(settings="0")),
                       "with other settings"),
    "source planned anew": (lambda p: edit_json(source(p) / "nnUNetPlans.json", lambda d: d["configurations"]["2d"].update(
        batch_size=3)), "nnUNetPlans.json have changed"),
    "source data deleted": (lambda p: shutil.rmtree(source(p) / "nnUNetPlans_2d"), "data of the source .* are missing"),
    "a source case gone": (lambda p: (source(p) / "nnUNetPlans_2d" / "phantom_tr002.b2nd").unlink(), "are not those that"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_trainer_is_told_what_is_broken(pair, name):
    assert adapt() == 0
    assert check(pair).identifiers == CASES
    spoil, message = BROKEN[name]
    spoil(pair)
    with pytest.raises(UserError, match=message):
        check(pair)


def test_a_trainer_is_told_that_its_configuration_was_not_adapted(pair):
    assert adapt() == 0
    with pytest.raises(UserError, match=r"adapted for 2d, not for 3d_fullres.* -c 3d_fullres"):
        check(pair, "3d_fullres")


def test_plans_and_data_hold_no_absolute_path(pair):
    """So that nnUNet_preprocessed can be copied to another machine."""
    assert adapt() == 0
    for name, content in tree(pair.path("preprocessed")).items():
        if name.endswith(".json"):
            assert str(pair.folder).encode() not in content, name
    elsewhere = pair.folder.with_name("elsewhere")
    pair.path("preprocessed").rename(elsewhere)
    target = check_adapted_plans(json.loads((elsewhere / PLAIN / f"{PLANS}.json").read_text()), "2d", elsewhere)
    assert target.folder.is_dir() and target.folder.is_relative_to(elsewhere)
    assert load_pickle(str(target.folder / "phantom_tr000.pkl"))["class_locations"] == {}


def test_large_files_are_told_apart_by_size_start_middle_and_end(tmp_path):
    content = bytes(1_000_000)
    (tmp_path / "a").write_bytes(content)
    digests = {digest_samples(tmp_path / "a")}
    for position in (0, 350_000, 999_999):
        (tmp_path / "b").write_bytes(content[:position] + b"x" + content[position + 1 :])
        digests.add(digest_samples(tmp_path / "b"))
    (tmp_path / "b").write_bytes(content + b"\0")
    digests.add(digest_samples(tmp_path / "b"))
    assert len(digests) == 5


# with nnU-Net's own commands


def test_source_data_overwritten_through_adapted_plans_are_found_out(pair, capsys):
    """What `nnUNetv2_preprocess -plans_name nnUNetPlans_to983` does, in this process."""
    make_ct(pair)
    assert adapt() == 0
    capsys.readouterr()
    shutil.copytree(source(pair) / "nnUNetPlans_2d", pair.folder / "kept")
    DefaultPreprocessor(verbose=False).run(981, "2d", PLANS, 1)
    with pytest.raises(UserError, match="target's normalisation on them: run `nnUNetv2_preprocess -d 981 -plans_name nnUNetPl"):
        check(pair)
    assert adapt() == 1  # not blessed by adapting again
    assert "were not made with its plans nnUNetPlans" in capsys.readouterr().err
    shutil.move(pair.path("raw", PLAIN), pair.folder / "gone")
    assert adapt() == 1
    assert "its raw images, to check them with, are gone" in capsys.readouterr().err
    shutil.rmtree(source(pair) / "nnUNetPlans_2d")
    shutil.move(pair.folder / "kept", source(pair) / "nnUNetPlans_2d")
    assert adapt() == 0 and check(pair).identifiers == CASES


def test_the_model_folder_alone_predicts_the_target(pair, tmp_path, monkeypatch):
    """Nothing of the target but its plans is needed: not its data, not the source's, on another machine."""
    make_ct(pair)
    assert adapt() == 0
    trainer = make_trainer(pair, configuration="2d", plans=PLANS)
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    model = shutil.copytree(trainer.output_folder_base, tmp_path / "other" / Path(trainer.output_folder_base).name)
    assert json.loads((model / "plans.json").read_text())[TARGET_KEY]["dataset_name"] == TARGET
    image = shutil.copy(pair.path("raw", TARGET, "imagesTr", f"{CASES[0]}_0000.nii.gz"), tmp_path)
    expected = nnUNetDatasetBlosc2(str(data(pair))).load_case(CASES[0])[0][:]
    shutil.rmtree(pair.folder)
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{kind}", raising=False)
    monkeypatch.setenv(VARIABLE, with_trainers(""))
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    (labels,) = predictor.predict_from_files_sequential([[image]], None)
    assert labels.shape == SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(image)).shape
    assert set(np.unique(labels)) <= {0, 1, 2, 3}

    # what the predictor does to an image is what adapt did to the target
    manager = PlansManager(str(model / "plans.json"))
    predicted_on, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [image], None, manager, manager.get_configuration("2d"), {})  # fmt: skip
    np.testing.assert_array_equal(predicted_on, expected)


@pytest.mark.commands
def test_2d_images_in_png(tmp_path, monkeypatch):
    project = Planned(tmp_path)
    for name, value in project.variables.items():
        monkeypatch.setenv(name, value)
    for kind in ("raw", "preprocessed", "results"):
        project.path(kind).mkdir()
    for identifier, contrast in ((985, "cine"), (986, "late_enhancement")):
        write_dataset(project.path("raw"), 5, 0, contrast, seed=identifier, dataset_id=identifier, name="Flat", size=(40, 40),
                      spacing=(3.0, 3.0))  # fmt: skip
    project.run("nnUNetv2_plan_and_preprocess", "-d", 985, "-c", "2d", "-np", 2, prelude=FORKED + FEW_SAMPLES)
    assert adapt(source="985", target="986") == 0
    plans = json.loads(project.path("preprocessed", "Dataset985_Flat", "nnUNetPlans_to986.json").read_text())
    target = check_adapted_plans(plans, "2d")
    image = nnUNetDatasetBlosc2(str(target.folder)).load_case(CASES[0])[0][:]
    assert image.shape[:2] == (1, 1) and abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-2
