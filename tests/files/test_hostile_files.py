"""Files that mean harm, or are broken: nothing in them is run, nothing outside our folders is touched, one error names them."""

import gzip
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from fuzz.project import CASES, DATASET_JSON
from planned import PLAIN, TARGET
from test_compare import compare, finished, folders, model  # noqa: F401 (fixtures)
from tiny_model import make_plans, write_case, write_model

from nnunet_l2g import files as json_files
from nnunet_l2g.adapt import datasets
from nnunet_l2g.adapt.geometry import source_directions
from nnunet_l2g.adapt.preprocessing import read_manifest
from nnunet_l2g.cli import main
from nnunet_l2g.compare.measure import _first_case, measure
from nnunet_l2g.compare.models import Model
from nnunet_l2g.compare.results import Run
from nnunet_l2g.compare.training import case_names
from nnunet_l2g.errors import UserError
from nnunet_l2g.images import check_whole
from nnunet_l2g.nnunet_files import read_properties, read_voxels

BRACKETS = b"[" * 100_000
SOURCE = "Dataset990_Tiny"


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The file that a payload would make; it must not be there in the end."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_file()  # the payload works
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A stock trainer's model, an image, its label."""
    folder = tmp_path_factory.mktemp("plain")
    return write_model(folder), *write_case(folder / "in")


@pytest.fixture
def copied(plain, tmp_path):
    """The model folder to spoil."""
    model_folder, *rest = plain
    return (shutil.copytree(model_folder, tmp_path / model_folder.name), *rest)


def inspect(model_folder, image, output, label=None):
    arguments = ["inspect", "-m", model_folder, "-f", 0, "-i", image, "-o", output, "--device", "cpu"]
    return main([str(argument) for argument in (*arguments, *(["-l", label] if label else []))])


def one_error(capsys, status, *words):
    """Exit status 1 and one line that has all words."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("nnunet_l2g ")]
    assert status == 1 and "Traceback" not in error and len(lines) == 1, error
    assert all(str(word) in lines[0] for word in words), lines[0]


def compare_folders(folder, output, *more):
    named = [f"{name}={folder / name}" for name in ("a", "b")]
    return main(["compare", "--predictions", *named, "--reference", str(folder / "ref"), "-np", "1", "-o", str(output), *more])


@pytest.fixture
def predictions(tmp_path):
    """Two folders of predictions and their references."""
    folder = tmp_path / "predictions"
    for name in ("ref", "a", "b"):
        _, label = write_case(folder / name)
        (folder / name / "case_0000.nii.gz").unlink()
        label.rename(folder / name / "case.nii.gz")
    dataset_json = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "x"}}
    (folder / "ref" / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    """nnU-Net's folders with a source that is preprocessed by name, and a raw target of the same name in Dataset991_Other."""
    folder = tmp_path / "preprocessed" / SOURCE
    (folder / "tiny").mkdir(parents=True)
    (folder / "gt_segmentations").mkdir()
    raw = tmp_path / "raw" / "Dataset991_Other" / "imagesTr"
    raw.mkdir(parents=True)
    for name, content in (("nnUNetPlans", make_plans() | {"plans_name": "nnUNetPlans"}), ("dataset", DATASET_JSON),
                          ("dataset_fingerprint", {})):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    (raw.parent / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for case in CASES:
        for part in (".b2nd", "_seg.b2nd", ".pkl"):
            (folder / "tiny" / f"{case}{part}").write_bytes(b"x")
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()
        (raw / f"{case}_0000.nii.gz").touch()
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir(exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    return folder


def find_source():
    return datasets.find_source("990", "nnUNetPlans", None)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- payloads ----


def bombs(good: dict, marker: Path) -> dict[str, bytes]:
    """Ways to plant a payload in a checkpoint."""
    torch_file, archive = io.BytesIO(), io.BytesIO()
    torch.save(good | {"extra": Bomb(marker)}, torch_file)
    with zipfile.ZipFile(archive, "w") as content:  # torch's layout, by hand
        content.writestr("archive/data.pkl", pickle.dumps({"network_weights": Bomb(marker)}))
        content.writestr("archive/version", "3\n")
    return {"torch.save": torch_file.getvalue(), "pickle": pickle.dumps(Bomb(marker)), "zip": archive.getvalue()}


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "zip"])
def test_a_payload_in_a_checkpoint(copied, tmp_path, capsys, marker, kind):
    model_folder, image, _ = copied
    path = model_folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(bombs(torch.load(path, weights_only=False), marker)[kind])
    one_error(capsys, inspect(model_folder, image, tmp_path / "out"), path, "never unpickled")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "zip"])
def test_a_payload_in_a_compared_checkpoint(folders, tmp_path, marker, kind):  # noqa: F811
    path = model(folders, "nnUNetTrainer") / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(bombs({}, marker)[kind])
    assert compare(tmp_path / "report", folds="0 1") == 0


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "zip"])
def test_a_payload_in_a_stages_checkpoint(tmp_path, marker, kind):
    from nnunet_l2g.training.stages import load_stage

    path = tmp_path / "stage_autoencoder.pth"
    path.write_bytes(bombs({}, marker)[kind])
    with pytest.raises(UserError, match=r"stage_autoencoder.pth cannot be read"):
        load_stage(path, type("Stage", (), {"name": "autoencoder", "settings": {}}))


def call(command: str) -> dict:
    """Plans whose network has `command` for its nonlinearity: nnU-Net calls what the name stands for, with these arguments."""
    plans = make_plans()
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"nonlin": "os.system", "nonlin_kwargs": {"command": command}}
    return plans


def hub(folder: Path, marker: Path) -> dict:
    """Plans whose network is a script beside them."""
    (folder / "hubconf.py").write_text(f"def x(**_):\n    open({str(marker)!r}, 'w').close()\n")
    plans = make_plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "torch.hub.load"
    architecture["arch_kwargs"] = {"repo_or_dir": str(folder), "model": "x", "source": "local"}
    architecture["_kw_requires_import"] = []
    return plans


def test_plans_that_name_a_command_or_a_script_as_network(copied, tmp_path, capsys, marker, monkeypatch):
    model_folder, image, _ = copied
    path = model_folder / "plans.json"
    command = f"{sys.executable} -c \"open('{marker}', 'w')\""
    subprocess.run(command, shell=True, check=True)
    assert marker.is_file()  # the payload works
    marker.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    module = make_plans()
    module["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "evil_module.Net"
    named = ((call(command), "os.system"), (hub(tmp_path, marker), "torch.hub.load"), (module, "evil_module.Net"))
    for plans, word in named:
        path.write_text(json.dumps(plans))
        one_error(capsys, inspect(model_folder, image, tmp_path / "out"), path, word, "torch.nn.Module")
        entry = Model("any", "nnUNetTrainer", "tinyPlans", "3d_fullres", model_folder)
        with pytest.raises(UserError, match=word):
            measure([entry], [Run("any", {"case": path})], SOURCE, "cpu")


def test_a_payload_in_preprocessed_properties(source, tmp_path, marker):
    for case in CASES:
        (source / "tiny" / f"{case}.pkl").write_bytes(pickle.dumps({"sitk_stuff": Bomb(marker)}))
    with pytest.raises(UserError, match=r"case_0.pkl: cannot be read .*it names pathlib"):
        source_directions(find_source())


def test_adapt_with_payloads_in_all_of_the_sources_properties(planned, tmp_path, monkeypatch, capsys, marker):
    from nnunet_l2g.phantom import write_dataset

    shutil.copytree(planned.path("raw", PLAIN), tmp_path / "raw" / PLAIN)
    shutil.copytree(planned.path("preprocessed", PLAIN), tmp_path / "preprocessed" / PLAIN)
    write_dataset(
        tmp_path / "raw", 5, 0, "late_enhancement", dataset_id=983, name="Late", size=(32, 32, 8), spacing=(3.6, 3.6, 10.0)
    )
    assert TARGET == "Dataset983_Late"
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    for path in (tmp_path / "preprocessed" / PLAIN).rglob("*.pkl"):
        path.write_bytes(pickle.dumps(Bomb(marker)))
    one_error(capsys, main(["adapt", "-s", "981", "-t", "983", "-c", "2d", "-np", "1"]), ".pkl", "it names pathlib")


def test_measuring_reads_voxels_and_no_properties(source, marker):
    import blosc2

    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    (source / "tiny" / "case_0.b2nd").unlink()
    blosc2.asarray(image, urlpath=str(source / "tiny" / "case_0.b2nd"), chunks=(1, 2, 3, 4), blocks=(1, 1, 3, 4))
    (source / "tiny" / "case_0.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    found = _first_case(Run("any", {"case_0": Path()}), "tiny", SOURCE)
    assert np.array_equal(found.numpy(), image)
    with pytest.raises(UserError, match=r"case_1.b2nd: cannot be read as a preprocessed image"):
        read_voxels(source / "tiny", "case_1")
    np.savez(source / "tiny" / "case_3.npz", data=np.array([Bomb(marker)], dtype=object))
    with pytest.raises(UserError, match=r"case_3.npz: cannot be read"):
        read_voxels(source / "tiny", "case_3")


def test_properties_of_every_protocol_are_read_whole(tmp_path):
    properties = {"sitk_stuff": {"direction": (1.0, 0.0)}, "spacing": [np.float64(2)], "class_locations": {(1, 2): np.eye(3)}}
    for protocol in (3, 4, 5):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(properties, protocol=protocol))
        found = read_properties(path)
        assert found["spacing"] == [2] and np.array_equal(found["class_locations"][1, 2], np.eye(3))
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="holds a list"):
        read_properties(path)


def test_doctor_reads_no_data_of_a_folder(tmp_path, monkeypatch, capsys, marker):
    for name in ("a.pkl", "a.pth", "checkpoint_final.pth", "plans.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert main(["doctor", "-tr", "nnUNetTrainer"]) == 0


# ---- names that lead elsewhere ----


@pytest.mark.parametrize("name", ["../../precious", "/precious", "..", "", "a/b", "a\\b", "a\0b", "\ud800", "x" * 250, 3, None])
def test_names_in_plans_and_descriptions(source, tmp_path, name):
    """Adapting writes to, and clears, folders of these names."""
    plans = source / "nnUNetPlans.json"
    good = plans.read_text()
    edit_json(plans, lambda content: content["configurations"]["3d_fullres"].update(data_identifier=name))
    with pytest.raises(UserError, match="data_identifier of 3d_fullres"):
        find_source()
    with pytest.raises(UserError, match="data_identifier of 3d_fullres"):
        case_names(source, "nnUNetPlans", "3d_fullres")
    with pytest.raises(UserError, match="data_identifier"):
        _first_case(Run("any", {"case_0": Path()}), name, SOURCE)
    for key in ("plans_name", "dataset_name"):
        plans.write_text(good)
        edit_json(plans, lambda content, key=key: content.update({key: name}))
        with pytest.raises(UserError, match=key):
            find_source()
    plans.write_text(good)
    if isinstance(name, str):
        images = {name: {"images": ["imagesTr/case_0_0000.nii.gz"]}}
        description = tmp_path / "raw" / "Dataset991_Other" / "dataset.json"
        edit_json(description, lambda content: content.update(dataset=images))
        with pytest.raises(UserError, match=r"dataset.json: a case is .*without slashes"):
            datasets.find_target("991", find_source())
        with pytest.raises(UserError, match=r"^-s|^-p"):
            datasets.find_source("990", name, None)


def test_names_in_the_manifest_of_a_target(tmp_path):
    good = {
        "inputs": "",
        "settings": "",
        "files": {f"case{s}": {"size": 1, "digest": ""} for s in (".b2nd", "_seg.b2nd", ".pkl")},
    }
    manifest = {"format": 1, "settings": "", "complete": True, "cases": {"case": good}}
    (tmp_path / "data.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "data")["cases"] == {"case": good}
    files = good["files"]
    for case, record in (
        ("../case", good | {"files": {f"../{name}": entry for name, entry in files.items()}}),
        ("case", good | {"files": {name.replace("case", "/case"): entry for name, entry in files.items()}}),
        ("case", good | {"files": files | {"../precious": {"size": 1, "digest": ""}}}),
    ):
        (tmp_path / "data.json").write_text(json.dumps(manifest | {"cases": {case: record}}))
        assert read_manifest(tmp_path / "data") == {}


def test_names_in_adapted_plans(source):
    from nnunet_l2g.adapt import TARGET_KEY, check_adapted_plans

    entry = {"settings": "", "source_data": "", "source_plans": "", "source_normalization_schemes": [],
             "source_use_mask_for_norm": []}  # fmt: skip
    for data in ("../precious", "/precious", "Dataset991_Other/../../precious", "a//b", "a\\..\\b"):
        target = {"format": 1, "dataset_name": "Dataset991_Other", "source_plans_name": "nnUNetPlans",
                  "configurations": {"3d_fullres": entry | {"data": data}}}  # fmt: skip
        with pytest.raises(UserError, match="do not say what they were adapted from"):
            check_adapted_plans(make_plans() | {TARGET_KEY: target}, "3d_fullres")


def test_a_marker_names_folders_and_what_is_no_name(plain, tmp_path):
    model_folder, image, _ = plain
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "precious.txt").write_text("mine")
    (tmp_path / "precious.txt").write_text("mine")
    names = ["sub", "sub/precious.txt", "../precious.txt", str(tmp_path / "precious.txt"), "a\0b", "x" * 300, ["a"], None]
    for content in (json.dumps(names).encode(), b"5", BRACKETS, b"\xff"):
        (folder / ".nnunet_l2g_inspect").write_bytes(content)
        assert inspect(model_folder, image, folder) == 0
        assert (folder / "sub" / "precious.txt").is_file() and (tmp_path / "precious.txt").is_file()


def test_names_in_a_summary_and_in_splits_choose_no_file(folders, tmp_path, capsys):  # noqa: F811
    summary = model(folders, "nnUNetTrainer") / "fold_0" / "validation" / "summary.json"
    splits = next((folders / "preprocessed").glob("*/splits_final.json"))
    splits.write_text(json.dumps([{"train": [], "val": ["../../../precious"]}]))
    assert compare(tmp_path / "report", folds="0 1") == 0
    assert "another fold 0 than the models validated" in capsys.readouterr().out
    for content in (b"{}", BRACKETS, b'[{"val": 3}]', b'{"0": 1}'):
        splits.write_bytes(content)
        assert compare(tmp_path / "report", folds="0 1") == 0
        assert "splits_final.json cannot be read" in capsys.readouterr().out or content == b"{}"
    edit_json(summary, lambda content: content["metric_per_case"][0].update(prediction_file="../../precious.nii.gz"))
    one_error(capsys, compare(tmp_path / "report", folds="0 1"), "summary.json", "validate again")


# ---- absurd sizes, and files that end too early ----


def huge_image() -> bytes:
    """A NIfTI header that claims 30000 x 30000 x 30000 voxels of 4 bytes, and nothing after it."""
    image = io.BytesIO()
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 16, 32)  # float32
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    image.write(header)
    return gzip.compress(image.getvalue())


def broken_images(good: Path) -> list[bytes]:
    whole = good.read_bytes()
    return [huge_image(), whole[: len(whole) // 2], b"", b"\x1f\x8b", gzip.compress(gzip.decompress(whole)[:352])]


def test_inspect_with_broken_images(plain, tmp_path, capsys):
    model_folder, image, _ = plain
    bad = tmp_path / "bad_0000.nii.gz"
    for content in broken_images(image):
        bad.write_bytes(content)
        one_error(capsys, inspect(model_folder, bad, tmp_path / "out"), bad, "the file again")
        one_error(capsys, inspect(model_folder, image, tmp_path / "out", bad), bad, "the file again")
    assert not (tmp_path / "out").exists()


def test_compare_with_broken_images(predictions, tmp_path, capsys):
    assert compare_folders(predictions, tmp_path / "report") == 0
    capsys.readouterr()
    path = predictions / "b" / "case.nii.gz"
    for number, content in enumerate(broken_images(path)):
        path.write_bytes(content)
        one_error(capsys, compare_folders(predictions, tmp_path / f"report{number}"), path, "the file again")


def test_a_shift_of_a_broken_image(tmp_path):
    from nnunet_l2g.evaluation.shifts import perturb_file

    path = tmp_path / "case_0000.nii.gz"
    for content in (huge_image(), b"no image"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"case_0000.nii.gz.* (copy|replace) the file"):
            perturb_file(path, tmp_path / "out.nii.gz", "noise", 0.1)
    assert not (tmp_path / "out.nii.gz").exists()


def test_adapt_with_broken_images(plain, tmp_path):
    from nnunet_l2g.adapt.fingerprint import CaseJob, read_case

    _, image, _ = plain
    for reader in ("SimpleITKIO", "NibabelIO"):
        for content in broken_images(image):
            (tmp_path / "bad.nii.gz").write_bytes(content)
            with pytest.raises(UserError, match=r"bad.nii.gz.* (copy|replace) the file"):
                read_case(CaseJob("a", [str(tmp_path / "bad.nii.gz")], reader, 1))


BROKEN_JSON = {
    "brackets": BRACKETS,
    "objects": b'{"a":' * 100_000,
    "truncated": b'{"labels": {"background": 0',
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "a number of 5000 digits": b'{"labels": ' + b"9" * 5000 + b"}",
    "no object": b"3",
    "other": b'{"labels": 1e999, "configurations": 1e999, "settings": 1e999}',
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_json_files_that_are_broken(copied, predictions, source, tmp_path, capsys, kind):
    content = BROKEN_JSON[kind]
    model_folder, image, _ = copied
    for name in ("plans.json", "dataset.json"):
        good = (model_folder / name).read_bytes()
        (model_folder / name).write_bytes(content)
        one_error(capsys, inspect(model_folder, image, tmp_path / "out"), model_folder / name)
        (model_folder / name).write_bytes(good)
    (predictions / "ref" / "dataset.json").write_bytes(content)
    one_error(capsys, compare_folders(predictions, tmp_path / "report"), predictions / "ref" / "dataset.json")
    for name in ("nnUNetPlans.json", "dataset.json", *(("dataset_fingerprint.json",) if kind != "other" else ())):
        good = (source / name).read_bytes()
        (source / name).write_bytes(content)
        one_error(capsys, main(["adapt", "-s", "990", "-t", "991", "-np", "1"]), source / name)
        (source / name).write_bytes(good)
    description = tmp_path / "raw" / "Dataset991_Other" / "dataset.json"
    description.write_bytes(content)
    one_error(capsys, main(["adapt", "-s", "990", "-t", "991", "-np", "1"]), "Dataset991_Other")


@pytest.mark.parametrize("value", [10**30, 1e999, -1, 70_000, "x", [], [[1]], None, {"a": 1}])
def test_labels_that_no_image_can_hold(copied, predictions, tmp_path, capsys, value):
    model_folder, image, _ = copied
    for path in (model_folder / "dataset.json", predictions / "ref" / "dataset.json"):
        edit_json(path, lambda content: content["labels"].update(lesion=value))
    one_error(capsys, inspect(model_folder, image, tmp_path / "out"), model_folder / "dataset.json")
    one_error(capsys, compare_folders(predictions, tmp_path / "report"), predictions / "ref" / "dataset.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("patch_size", [10**30] * 3), ("patch_size", [8, 32]), ("spacing", [1e999] * 3), ("spacing", [0, 1, 1]),
     ("batch_size", -1), ("normalization_schemes", None), ("inherits_from", "3d_fullres"), ("architecture", {})],
)  # fmt: skip
def test_plans_of_absurd_numbers(copied, tmp_path, capsys, key, value):
    model_folder, image, _ = copied
    path = model_folder / "plans.json"
    edit_json(path, lambda content: content["configurations"]["3d_fullres"].update({key: value}))
    one_error(capsys, inspect(model_folder, image, tmp_path / "out"), path)


def test_a_json_file_beyond_all_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST", 1 << 20)
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(ValueError, match="more than 1 MiB"):
        json_files.read_json(path)
    path.write_bytes(b" " * ((1 << 20) - 1) + b"1")
    assert json_files.read_json(path) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_whole_images_are_left_alone_and_one_byte_less_is_found(tmp_path, ending, dtype):
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((3, 4, 5), dtype)), str(path))
    check_whole(path)
    if ending.startswith(".nii"):
        content = path.read_bytes()
        path.write_bytes(gzip.compress(gzip.decompress(content)[:-1]) if ending == ".nii.gz" else content[:-1])
        with pytest.raises(UserError, match=rf"holds {412 - 60 + 60 * np.dtype(dtype).itemsize - 1} bytes, its header claims"):
            check_whole(path)
