"""Files that mean harm or are damaged: nothing in them is run, nothing outside our folders is touched, one error names them."""

import contextlib
import copy
import gzip
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import PLAIN
from small_source import DATASET_JSON, edit_json, write_small_source
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g import files
from nnunet_l2g.adapt.datasets import find_source, find_target
from nnunet_l2g.adapt.fingerprint import read_case
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import read_labels
from nnunet_l2g.nnunet_files import check_network_classes, check_plans, read_properties, read_voxels
from nnunet_l2g.training.adapted_plans import FORMAT, TARGET_KEY, check_adapted_plans


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The file that a payload would make. The test fails if it is there in the end."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_file()  # the payload works
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A stock trainer's model folder, an image and its label."""
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder), *write_case(folder / "in")


@pytest.fixture
def copied(model, tmp_path):
    """The same, with a model folder to spoil."""
    return (shutil.copytree(model[0], tmp_path / model[0].name), *model[1:])


@pytest.fixture
def predictions(tmp_path):
    """A folder with two folders of predictions, `a` and `b`, and their references, `ref`."""
    for name in ("ref", "a", "b"):
        image, label = write_case(tmp_path / "predictions" / name)
        image.unlink()
        label.rename(label.with_name("case.nii.gz"))
    description = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "x"}}
    (tmp_path / "predictions" / "ref" / "dataset.json").write_text(json.dumps(description))
    return tmp_path / "predictions"


def inspect(model_folder, image, output, label=None):
    arguments = ["inspect", "-m", model_folder, "-f", 0, "-i", image, "-o", output, "--device", "cpu"]
    return main([str(argument) for argument in (*arguments, *(["-l", label] if label else []))])


def compare(folder, output):
    named = [f"{name}={folder / name}" for name in ("a", "b")]
    return main(["compare", "--predictions", *named, "--reference", str(folder / "ref"), "-np", "1", "-o", str(output)])


def adapt(source="990", target="991"):
    return main(["adapt", "-s", source, "-t", target, "-np", "1"])


def one_error(capsys, status, *words):
    """Exit status 1 and one line of ours, which has all words."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("nnunet_l2g ")]
    assert status == 1 and "Traceback" not in error and len(lines) == 1, error
    assert all(str(word) in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "zip"])
def test_a_payload_in_a_checkpoint(copied, tmp_path, capsys, marker, kind):
    path, content = copied[0] / "fold_0" / "checkpoint_final.pth", {"network_weights": {}, "extra": Bomb(marker)}
    if kind == "torch.save":
        torch.save(content, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        with zipfile.ZipFile(path, "w") as archive:  # torch's layout, by hand
            archive.writestr("archive/data.pkl", pickle.dumps(content))
            archive.writestr("archive/version", "3\n")
    one_error(capsys, inspect(*copied[:2], tmp_path / "out"), path)
    assert not (tmp_path / "out").exists()
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        files.load_safely(path)  # what other commands read checkpoints with


def plans_naming(network_class_name=None, **arguments) -> dict:
    """Plans of another network, or of nnU-Net's with other arguments."""
    plans = make_plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"] |= arguments
    if network_class_name:
        architecture |= {"network_class_name": network_class_name, "arch_kwargs": arguments, "_kw_requires_import": []}
    return plans


def test_plans_that_name_a_command_or_a_script_as_network(copied, tmp_path, capsys, marker, monkeypatch):
    script = f"open({str(marker)!r}, 'w').close()\n"
    (tmp_path / "evil_module.py").write_text(script)
    (tmp_path / "hubconf.py").write_text(f"def x(**_):\n    {script}")
    monkeypatch.syspath_prepend(tmp_path)
    command = {"command": f'{sys.executable} -c "{script.strip()}"'}
    hub = {"repo_or_dir": str(tmp_path), "model": "x", "source": "local"}
    for plans, word in (
        (plans_naming(nonlin="os.system", nonlin_kwargs=command), "os.system"),
        (plans_naming("torch.hub.load", **hub), "torch.hub.load"),
        (plans_naming("evil_module.Net"), "evil_module.Net"),
        (plans_naming("torch.nn.functional.relu"), "torch.nn.functional.relu"),
    ):
        (copied[0] / "plans.json").write_text(json.dumps(plans))
        one_error(capsys, inspect(*copied[:2], tmp_path / "out"), copied[0] / "plans.json", word, "torch.nn.Module")


def test_payloads_in_the_properties_of_a_source(adapted, tmp_path, monkeypatch, capsys, marker):
    for kind in ("raw", "preprocessed"):
        shutil.copytree(adapted.path(kind), tmp_path / kind)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    for path in (tmp_path / "preprocessed" / PLAIN).rglob("*.pkl"):
        path.write_bytes(pickle.dumps({"sitk_stuff": Bomb(marker)}))
    one_error(capsys, adapt("981", "983"), ".pkl", "it names pathlib")


def test_properties_of_every_protocol_are_read_whole(tmp_path):
    properties = {"sitk_stuff": {"direction": (1.0, 0.0)}, "spacing": [np.float64(2)], "class_locations": {(1, 2): np.eye(3)}}
    path = tmp_path / "a.pkl"
    for protocol in (3, 4, 5):
        path.write_bytes(pickle.dumps(properties, protocol=protocol))
        found = read_properties(path)
        assert found["spacing"] == [2] and np.array_equal(found["class_locations"][1, 2], np.eye(3))
    for content in (pickle.dumps([1]), b"", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.pkl: cannot be read as a case's properties"):
            read_properties(path)


def test_voxels_are_read_without_what_else_a_file_names(tmp_path, marker):
    import blosc2

    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    blosc2.asarray(image, urlpath=str(tmp_path / "good.b2nd"), chunks=(1, 2, 3, 4), blocks=(1, 1, 3, 4))
    assert np.array_equal(read_voxels(tmp_path, "good"), image)
    (tmp_path / "bad.b2nd").write_bytes((tmp_path / "good.b2nd").read_bytes()[:-40])
    np.savez(tmp_path / "pickled.npz", data=np.array([Bomb(marker)], dtype=object))
    np.savez(tmp_path / "flat.npz", data=np.zeros(3))
    for case in ("bad", "pickled", "flat", "missing"):
        with pytest.raises(UserError, match=rf"{case}\.\w+: cannot be read as a preprocessed image"):
            read_voxels(tmp_path, case)


def test_doctor_reads_no_data_of_a_folder(tmp_path, monkeypatch, marker):
    for name in ("a.pkl", "checkpoint_final.pth", "plans.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert main(["doctor", "-tr", "nnUNetTrainer"]) == 0


LEAVING = ["../../precious", "/precious", "..", ".", "", "a/b", "a\\b", "C:a", "a\0b", "\ud800", "x" * 250, "é" * 101, 3, None]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_their_folder_are_refused(small_source, name):
    """Commands write to folders with these names, and delete them."""
    assert not files.is_plain_name(name) and all(map(files.is_plain_name, ("a", "a b", "é", ".hidden", "a..b", "x" * 200)))
    for key in ("data_identifier", "plans_name", "dataset_name"):
        plans = make_plans()
        (plans["configurations"]["3d_fullres"] if key == "data_identifier" else plans)[key] = name
        with pytest.raises(UserError, match=f"plans.json: {key}"):
            check_plans(plans, Path("plans.json"))
    if isinstance(name, str):
        images = {name: {"images": ["imagesTr/case_0_0000.nii.gz"]}}
        edit_json(small_source.target / "dataset.json", lambda content: content.update(dataset=images))
        with pytest.raises(UserError, match=r"dataset.json: a case is .*without slashes"):
            find_target("991", find_source("990", "nnUNetPlans", None))
        with pytest.raises(UserError, match=r"^-s|^-p"):
            find_source("990", name, None)


BROKEN_JSON = {
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "cut off": b'{"labels": {"background": 0',
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "a number of 5000 digits": b'{"labels": ' + b"9" * 5000 + b"}",
    "no object": b"3",
    "other": b'{"labels": 1e999, "configurations": NaN, "settings": 1e999}',
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_damaged_json(copied, predictions, small_source, tmp_path, capsys, kind):
    for path, command in (
        (copied[0] / "plans.json", lambda: inspect(*copied[:2], tmp_path / "out")),
        (copied[0] / "dataset.json", lambda: inspect(*copied[:2], tmp_path / "out")),
        (predictions / "ref" / "dataset.json", lambda: compare(predictions, tmp_path / "report")),
        (small_source.plans, adapt),
        (small_source.source / "dataset.json", adapt),
        (small_source.target / "dataset.json", adapt),
    ):
        good = path.read_bytes()
        path.write_bytes(BROKEN_JSON[kind])
        one_error(capsys, command(), path)
        path.write_bytes(good)


def broken_images(good: Path) -> list[bytes]:
    """A header that claims 30000 x 30000 x 30000 voxels with nothing after it, and files that end too early."""
    header, whole = nibabel.Nifti1Header(), good.read_bytes()
    header.set_data_shape((30000, 30000, 30000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    huge = gzip.compress(header.binaryblock + bytes(4))
    return [huge, whole[: len(whole) // 2], b"", b"\x1f\x8b", gzip.compress(gzip.decompress(whole)[:352])]


def test_damaged_images(model, predictions, tmp_path, capsys):
    model_folder, image, _ = model
    bad, prediction = tmp_path / "bad_0000.nii.gz", predictions / "b" / "case.nii.gz"
    for number, content in enumerate(broken_images(image)):
        bad.write_bytes(content)
        one_error(capsys, inspect(model_folder, bad, tmp_path / "out"), bad, "the file again")
        one_error(capsys, inspect(model_folder, image, tmp_path / "out", bad), bad, "the file again")
        prediction.write_bytes(content)
        one_error(capsys, compare(predictions, tmp_path / f"report{number}"), prediction, "the file again")
        for reader in ("SimpleITKIO", "NibabelIO"):
            with pytest.raises(UserError, match=r"bad_0000.nii.gz.* (copy|replace) the file"):
                read_case("a", [str(bad)], reader, 1)
    assert not (tmp_path / "out").exists()


HOSTILE = [
    None, True, -1, 0, 1, 70000, 10**30, 10**400, 0.5, float("inf"), float("nan"), "", "..", "../../outside", "a\0b", "\ud800",
    "os.system", "torch.hub.load", [], {}, [[]], [None], [0, 0, 0], {"": None}, {"../outside": {}}, ["../outside"],
]  # fmt: skip


def adapted_plans() -> dict:
    entry = {"data": "Dataset991_Other/from/tiny", "settings": "0", "source_data": "0", "source_normalization_schemes": ["a"],
             "source_use_mask_for_norm": [False]}  # fmt: skip
    target = {"format": FORMAT, "dataset_name": "Dataset991_Other", "source_plans_name": "nnUNetPlans"}
    return make_plans() | {TARGET_KEY: target | {"configurations": {"3d_fullres": entry}}}


def places(value: object) -> list:
    """Every value inside a JSON value, as (container, key)."""
    found = []
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            found += [(value, key), *places(inner)]
    return found


def read_model_plans(_, plans):
    manager = check_plans(plans, Path("plans.json"))
    for name in plans["configurations"]:
        check_network_classes(manager.get_configuration(name), Path("plans.json"))


def read_dataset_json(home, content):
    (home.target.parent / "dataset.json").write_text(json.dumps(content))
    read_labels(home.target.parent / "dataset.json")


def read_source(home, plans):
    (home.source / "spoiltPlans.json").write_text(json.dumps(plans))
    find_source("990", "spoiltPlans", None)


def read_target(home, content):
    (home.target / "dataset.json").write_text(json.dumps(content))
    find_target("991", find_source("990", "nnUNetPlans", None))


IMAGES = {"case_0": {"images": ["imagesTr/case_0_0000.nii.gz"]}}
READERS = [
    (make_plans(), read_model_plans),
    (DATASET_JSON, read_dataset_json),
    (make_plans() | {"plans_name": "spoiltPlans"}, read_source),
    (DATASET_JSON | {"dataset": IMAGES}, read_target),
    (adapted_plans(), lambda _, plans: check_adapted_plans(plans, "3d_fullres")),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{kind}", str(folder / kind))
        yield write_small_source(folder)


@pytest.mark.parametrize(("good", "read"), READERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_spoilt_json_is_read_or_refused_in_one_error(home, good, read, data):
    spoilt = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(spoilt)))
        if data.draw(st.booleans()):
            container[key] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
        else:
            del container[key]
    with contextlib.suppress(UserError):
        read(home, spoilt)
