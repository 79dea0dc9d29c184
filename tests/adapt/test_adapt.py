"""`nnunet_l2g adapt`: what it writes, and what happens when it is interrupted, repeated, or its files are changed."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import ADAPTED as PLANS
from planned import PLAIN, TARGET, Planned
from small_source import edit_json
from test_trainers import CPU
from test_trainers import make as make_trainer

from nnunet_l2g.adapt import preprocessing
from nnunet_l2g.adapt.fingerprint import body_mask
from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.training.adapted_plans import TARGET_KEY, check_adapted_plans, complete_marker

CASES = [f"phantom_tr{i:03d}" for i in range(5)]


@pytest.fixture
def done(adapted, tmp_path, monkeypatch):
    """A copy of what `adapt` made for 2d and 3d_fullres, to spoil, with nnU-Net's variables set."""
    project = Planned(tmp_path / "nnunet")
    shutil.copytree(adapted.folder, project.folder)
    for name, value in project.variables.items():
        monkeypatch.setenv(name, value)
    return project


@pytest.fixture
def pair(done):
    """A copy of source and target before `adapt`."""
    shutil.rmtree(done.path("preprocessed", TARGET))
    plans_file(done).unlink()
    return done


def adapt(*args, source="981", target="983", configurations=("2d",)):
    """The command's exit status, in this process unless -np says otherwise."""
    return main(["adapt", "-s", source, "-t", target, "-c", *configurations, "-np", "1", *args])


def source(project) -> Path:
    return project.path("preprocessed", PLAIN)


def images(project) -> Path:
    return project.path("raw", TARGET, "imagesTr")


def plans_file(project, name=PLANS) -> Path:
    return source(project) / f"{name}.json"


def read_plans(project, name=PLANS) -> dict:
    return json.loads(plans_file(project, name).read_text())


def check(project, configuration="2d"):
    return check_adapted_plans(read_plans(project), configuration)


def data(project, configuration="2d") -> Path:
    return project.path("preprocessed", TARGET, "from_981_nnUNetPlans", f"nnUNetPlans_{configuration}")


def load(project, configuration="2d", case=CASES[0]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Image, mask and properties of a preprocessed case, by nnU-Net's loader."""
    image, mask, _, properties = nnUNetDatasetBlosc2(str(data(project, configuration))).load_case(case)
    return image[:], mask[:], properties


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_images(folder: Path, change, names="*.nii.gz") -> None:
    for path in sorted(folder.glob(names)):
        SimpleITK.WriteImage(change(SimpleITK.ReadImage(str(path))), str(path))


def make_ct(project) -> None:
    edit_json(project.path("raw", TARGET, "dataset.json"), lambda d: d.update(channel_names={"0": "CT"}))


def test_target_is_preprocessed_as_nnunet_preprocesses_an_unlabelled_image_with_the_adapted_plans(pair, capsys):
    before = tree(source(pair))
    assert adapt(configurations=("2d", "3d_fullres")) == 0
    printed, manager = capsys.readouterr().out, PlansManager(read_plans(pair))
    for configuration in ("2d", "3d_fullres"):
        assert f"nnUNetv2_train 981 {configuration} 0 -tr nnUNetTrainerGLUA -p {PLANS}" in printed
        target, resolved = check(pair, configuration), manager.get_configuration(configuration)
        assert (target.dataset_name, target.folder, target.identifiers) == (TARGET, data(pair, configuration), CASES)
        assert {p.name for p in target.folder.iterdir()} == {c + s for c in CASES for s in (".b2nd", "_seg.b2nd", ".pkl")}
        for case in CASES:
            image = str(images(pair) / f"{case}_0000.nii.gz")
            expected, mask, _ = DefaultPreprocessor(verbose=False).run_case([image], None, manager, resolved, {})
            found, stored_mask, properties = load(pair, configuration, case)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(stored_mask, mask)
            assert properties["class_locations"] == {}
    after = tree(source(pair))
    assert after.pop(f"{PLANS}.json") and after == before


def test_plans_are_the_sources_but_for_name_normalisation_and_target(pair):
    make_ct(pair)
    assert adapt() == 0
    source, plans = read_plans(pair, "nnUNetPlans"), read_plans(pair)
    assert plans.pop(TARGET_KEY)["dataset_name"] == TARGET
    assert plans.pop("plans_name") == PLANS and source.pop("plans_name")
    statistics = plans.pop("foreground_intensity_properties_per_channel")["0"]
    assert source.pop("foreground_intensity_properties_per_channel")["0"] != statistics
    for configuration in plans["configurations"].values():
        assert configuration["normalization_schemes"] == ["CTNormalization"]
        configuration["normalization_schemes"] = ["ZScoreNormalization"]
    assert plans == source
    arrays = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in images(pair).iterdir()]
    body = np.concatenate([array[body_mask(array)] for array in arrays])
    np.testing.assert_allclose([statistics["mean"], statistics["std"]], [body.mean(), body.std()], rtol=0.02)
    low = (statistics["percentile_00_5"] - statistics["mean"]) / statistics["std"]
    np.testing.assert_allclose(load(pair)[0].min(), low, rtol=1e-3)
    assert check(pair).source_normalization_schemes == ["ZScoreNormalization"]


def test_zeros_around_the_target_switch_masked_normalisation_on_for_the_target_only(pair):
    def surround(image):
        array = SimpleITK.GetArrayFromImage(image)
        array[:, :10], array[:, 26:] = 0, 0
        array[:, 10:12, :8] = 0  # within the box: outside the mask
        result = SimpleITK.GetImageFromArray(array)
        result.CopyInformation(image)
        return result

    edit_images(images(pair), surround)
    assert adapt() == 0
    assert read_plans(pair)["configurations"]["2d"]["use_mask_for_norm"] == [True]
    assert check(pair).source_use_mask_for_norm == [False]
    image, mask, _ = load(pair)
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


def test_several_targets_and_plans_live_side_by_side(done):
    first = tree(done.path("preprocessed", TARGET))
    shutil.copytree(done.path("raw", TARGET), done.path("raw", "Dataset984_Other"))
    plans_file(done, "otherPlans").write_text(json.dumps(read_plans(done, "nnUNetPlans") | {"plans_name": "otherPlans"}))
    assert adapt(target="Dataset984_Other") == 0 and adapt("-p", "otherPlans") == 0
    for name, target in ((PLANS, TARGET), ("nnUNetPlans_to984", "Dataset984_Other"), ("otherPlans_to983", TARGET)):
        assert check_adapted_plans(read_plans(done, name), "2d").dataset_name == target
    assert first.items() < tree(done.path("preprocessed", TARGET)).items()


def test_configurations_adapted_earlier_stay_and_are_kept_up_to_date(pair):
    assert adapt(configurations=("2d",)) == 0
    make_ct(pair)
    assert adapt(configurations=("3d_fullres",)) == 0
    assert set(read_plans(pair)[TARGET_KEY]["configurations"]) == {"2d", "3d_fullres"}
    for configuration in ("2d", "3d_fullres"):
        assert check(pair, configuration).identifiers == CASES and abs(load(pair, configuration)[0].mean()) > 0.1


def test_cascades_are_left_out_of_adapted_plans(pair):
    def add(plans):
        plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"] | {"next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    edit_json(plans_file(pair, "nnUNetPlans"), add)
    assert main(["adapt", "-s", "981", "-t", "983", "-np", "1"]) == 0
    plans = read_plans(pair)
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_lowres"} and "next_stage" not in str(plans)
    assert len({entry["data"] for entry in plans[TARGET_KEY]["configurations"].values()}) == 2  # two share theirs


def test_labels_of_the_target_are_neither_listed_nor_opened(pair):
    """They are not needed either: `adapted` has deleted them."""
    labels = pair.path("raw", TARGET, "labelsTr")
    labels.mkdir()
    for case in CASES:
        (labels / f"{case}.nii.gz").write_bytes(b"not an image")
    touched, listening = [], True

    def spy(event, args):
        if listening and event in ("open", "os.listdir", "os.scandir"):
            touched.append(str(args[0]))

    sys.addaudithook(spy)  # there is no way to remove it
    assert adapt() == 0
    listening = False
    assert not [path for path in touched if "labelsT" in path] and [path for path in touched if "imagesTr" in path]


def flip(image):
    return SimpleITK.Flip(image, [True, False, False])[:, :, :]


@pytest.mark.parametrize(
    ("change", "names"),
    [(flip, "*"), (flip, "phantom_tr00[34]*"), (lambda image: SimpleITK.PermuteAxes(image, [1, 2, 0]), "*")],
)
def test_images_in_another_orientation_are_warned_of_and_used(pair, capsys, change, names):
    edit_images(images(pair), change, names)
    assert adapt() == 0
    count = 5 if names == "*" else 2
    assert re.search(f"Warning: {count} of 5 images .* axes are swapped or flipped", capsys.readouterr().out)
    assert check(pair).identifiers == CASES


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_again_there_is_nothing_to_do(done, capsys):
    before = stamps(done.path("preprocessed"))
    (images(done) / "phantom_tr000_0000.nii.gz").touch()  # a new time, the same content
    assert adapt() == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert stamps(done.path("preprocessed")) == before


def brighter(image):
    return image + SimpleITK.Cast(image > 100, image.GetPixelID()) * 9


CHANGES = {
    "an image": lambda p: edit_images(images(p), brighter, "phantom_tr001*"),
    "an image less": lambda p: (images(p) / "phantom_tr004_0000.nii.gz").unlink(),
    "the normalisation": make_ct,
    "a preprocessed file": lambda p: (data(p) / "phantom_tr003_seg.b2nd").unlink(),
    "the marker": lambda p: complete_marker(data(p)).unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changed_the_folder_is_made_again(done, name):
    before = stamps(data(done))
    (data(done) / "stranger.b2nd").touch()
    CHANGES[name](done)
    assert adapt() == 0
    after = stamps(data(done))
    assert check(done).identifiers == CASES[: 4 if name == "an image less" else 5]
    assert {file.split(".")[0].removesuffix("_seg") for file in after} == set(check(done).identifiers)
    assert all(stamp != before[file] for file, stamp in after.items())


def test_after_an_interruption_trainers_refuse_and_the_next_run_completes(done, monkeypatch):
    real = preprocessing.preprocess_case

    def interrupted(item, **settings):
        if item[0] == CASES[2]:
            raise KeyboardInterrupt
        real(item, **settings)

    make_ct(done)
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", interrupted)
        assert adapt() == 130
    with pytest.raises(UserError, match="not complete: adapt was interrupted"):
        check(done)
    assert adapt() == 0 and check(done).identifiers == CASES and abs(load(done)[0].mean()) > 0.1


def plans_with(change):
    return lambda p: edit_json(plans_file(p), lambda plans: change(plans[TARGET_KEY]))


def entry_with(**values):
    return plans_with(lambda target: target["configurations"]["2d"].update(values))


BROKEN = {
    "plans without a target": (lambda p: edit_json(plans_file(p), lambda d: d.pop(TARGET_KEY)),
                               "name no target; make some with `nnunet_l2g adapt -s 981 -t TARGET"),
    "another format": (plans_with(lambda target: target.update(format=1)), "target format 1, expected 2"),
    "no entry": (plans_with(lambda target: target["configurations"].update({"2d": 3})), "are not as adapt writes them"),
    "another configuration": (plans_with(lambda d: d["configurations"].pop("2d")), "for 3d_fullres, not for 2d.* -c 2d"),
    "a name that leaves": (entry_with(data="../precious"), "expected a name without slashes"),
    "another source": (entry_with(source_data="0"), "are not those that"),
    "target deleted": (lambda p: shutil.rmtree(p.path("preprocessed", TARGET)),
                       "are gone .*nnunet_l2g adapt -s 981 -t 983 -c 2d -p nnUNetPlans"),
    "a file deleted": (lambda p: (data(p) / "phantom_tr002_seg.b2nd").unlink(), "phantom_tr002_seg.b2nd is missing"),
    "other settings": (lambda p: edit_json(complete_marker(data(p)), lambda d: d.update(settings="0")), "with other settings"),
    "a damaged marker": (lambda p: complete_marker(data(p)).write_text("{"), "are not complete"),
    "source data deleted": (lambda p: shutil.rmtree(source(p) / "nnUNetPlans_2d"), "data of the source .* are missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_trainer_is_told_what_is_broken(done, name):
    assert check(done).identifiers == CASES
    spoil, message = BROKEN[name]
    spoil(done)
    with pytest.raises(UserError, match=message):
        check(done)


def test_plans_and_data_hold_no_absolute_path(done, monkeypatch):
    """So that nnUNet_preprocessed can be copied to another machine, where the files have other times."""
    found = tree(done.path("preprocessed"))
    assert not [name for name, content in found.items() if name.endswith(".json") and str(done.folder).encode() in content]
    plans, elsewhere = read_plans(done), done.folder.with_name("elsewhere")
    shutil.copytree(done.path("preprocessed"), elsewhere, copy_function=shutil.copyfile)
    shutil.rmtree(done.folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(elsewhere))
    target = check_adapted_plans(plans, "2d")
    assert target.folder.is_relative_to(elsewhere) and target.identifiers == CASES


def test_source_data_overwritten_through_adapted_plans_are_found_out(pair, capsys, threads_for_processes):
    """What `nnUNetv2_preprocess -plans_name nnUNetPlans_to983` does, in this process."""
    make_ct(pair)
    assert adapt() == 0
    DefaultPreprocessor(verbose=False).run(981, "2d", PLANS, 1)
    with pytest.raises(UserError, match="target's normalisation on them: run `nnUNetv2_preprocess -d 981 -plans_name nnUNetPl"):
        check(pair)
    assert adapt() == 1  # adapting again does not accept wrong data
    assert "are not those that nnUNetPlans_to983 was adapted for" in capsys.readouterr().err
    DefaultPreprocessor(verbose=False).run(981, "2d", "nnUNetPlans", 1)
    assert check(pair).identifiers == CASES and adapt() == 0


def test_a_source_changed_on_purpose_is_adapted_again_after_its_plans_are_deleted(done, capsys):
    for path in [*source(done).glob("nnUNetPlans_*/phantom_tr005*"), *source(done).glob("gt_segmentations/phantom_tr005.*")]:
        path.unlink()
    assert adapt() == 1
    assert f"delete {plans_file(done)} and adapt again" in capsys.readouterr().err
    plans_file(done).unlink()
    assert adapt() == 0 and check(done).identifiers == CASES


def test_the_model_folder_alone_predicts_the_target(done, tmp_path, monkeypatch):
    """Nothing of the target but its plans is needed: not its data, not the source's, on another machine."""
    trainer = make_trainer(done, configuration="2d", plans=PLANS)
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    model = shutil.copytree(trainer.output_folder_base, tmp_path / "other" / Path(trainer.output_folder_base).name)
    image = shutil.copy(images(done) / f"{CASES[0]}_0000.nii.gz", tmp_path)
    shutil.rmtree(done.folder)
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{kind}")
    monkeypatch.setenv(VARIABLE, with_trainers(""))
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    (labels,) = predictor.predict_from_files_sequential([[image]], None)
    assert labels.shape == SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(image)).shape
