"""The fuzz targets without a fuzzer: what one found stays mended, and a thousand spoilt inputs more."""

import json
import random
from pathlib import Path

import pytest
import torch
from fuzz import targets
from test_hostile_files import edit_json, find_source, source  # noqa: F401 (a fixture)

from nnunet_l2g.architectures import PlanNetwork
from nnunet_l2g.compare import slurm_executor
from nnunet_l2g.compare.curves import Curves, read_logs
from nnunet_l2g.compare.models import dataset_name
from nnunet_l2g.compare.summaries import read_summary
from nnunet_l2g.compare.training import case_names
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import read_labels
from nnunet_l2g.files import is_plain_name
from nnunet_l2g.nnunet import Progress
from nnunet_l2g.training.stages import load_stage

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def folder():
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{kind}", str(targets.FOLDER / kind))
        yield
    targets.clean()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name[:14]}")
def test_what_the_fuzzer_found(path):
    targets.TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_spoilt_inputs(name, capfd):
    generator = random.Random(0)
    for length in [0, 3, 10, 60] * 10:
        targets.TARGETS[name](generator.randbytes(length))


# each finding by itself


@pytest.mark.parametrize("text", ["²", "9" * 5000, "-1", "1e3", " 1", "٣"])
def test_a_dataset_number_that_is_none(text):
    with pytest.raises(UserError, match="no such dataset"):
        dataset_name(text)


def test_lines_that_only_look_like_nnunets(tmp_path, monkeypatch):
    show = Progress(tmp_path / "log").shown
    assert [show(line) for line in ("Epoch 3", "Epoch", "val_loss", "the Epoch time: 3 s")] == [None] * 4
    (tmp_path / "training_log_2026_1_1.txt").write_text(f"Epoch {'9' * 5000}\nEpoch 1\ntrain_loss 0.5\nEpoch time: 2 s\n")
    assert read_logs(tmp_path).train_loss == [0.5]
    answer = type("Answer", (), {"returncode": 0, "stdout": "slurm_load: warning\n1|RUNNING (None)|a|b\n", "stderr": ""})
    monkeypatch.setattr(slurm_executor.subprocess, "run", lambda *_, **__: answer)
    assert slurm_executor.live_jobs(1) == {"1": ("a|b", "RUNNING (None)")}


def test_curves_of_different_lengths_are_no_log():
    log = {key: [1.0] for key in ("epoch_end_timestamps", "epoch_start_timestamps", "train_losses", "val_losses")}
    assert Curves.from_logging(log | {"mean_fg_dice": [0.5]}).epochs == 1
    with pytest.raises(ValueError, match="different lengths"):
        Curves.from_logging(log | {"mean_fg_dice": [0.5, 0.6]})


@pytest.mark.parametrize(
    "change",
    [{"file_ending": 3}, {"file_ending": ""}, {"file_ending": "./x"}, {"channel_names": [1]},
     {"labels": {"background": 0, "a": float("inf")}}, {"labels": {"background": 0, "a": []}}],
)  # fmt: skip
def test_a_dataset_json_of_another_kind(tmp_path, change):
    good = {"labels": {"background": 0, "a": 1}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (tmp_path / "dataset.json").write_text(json.dumps(good))
    assert read_labels(tmp_path / "dataset.json").names == ["a"]
    (tmp_path / "dataset.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=r"dataset.json: "):
        read_labels(tmp_path / "dataset.json")


def test_a_source_whose_segmentations_are_gone(source):  # noqa: F811
    """It was an IndexError."""
    for path in (source / "gt_segmentations").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="gt_segmentations, which comes last, is missing or empty"):
        find_source()


def test_a_source_without_file_ending(source):  # noqa: F811
    edit_json(source / "dataset.json", lambda content: content.pop("file_ending"))
    with pytest.raises(UserError, match="names no file_ending"):
        find_source()


def test_configurations_that_are_a_list(source):  # noqa: F811
    edit_json(source / "nnUNetPlans.json", lambda content: content.update(configurations=[1, None]))
    with pytest.raises(UserError, match=r"nnUNetPlans.json: not nnU-Net.s plans"):
        case_names(source, "nnUNetPlans", "2d")


def test_a_summary_of_numbers_beyond_all_floats(tmp_path):
    entry = {"prediction_file": "a.nii.gz", "metrics": {"1": {"Dice": 10**400}}}
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [entry]}))
    with pytest.raises(UserError, match=r"summary.json: not a summary of nnU-Net \(OverflowError"):
        read_summary(tmp_path / "summary.json")


@pytest.mark.parametrize("content", [b".", b"J", b"settings", b"names"])
def test_a_stages_checkpoint_of_a_few_bytes(tmp_path, content):
    """IndexError and struct.error out of torch.load, and settings that are no names."""
    good = {"name": "s", "owner": "", "epoch": 0} | {key: {} for key in ("history", "module", "network", "stage")}
    good |= {"extra": {}, "random_state": {}, "settings": 3 if content == b"settings" else {1: 2}}
    path = tmp_path / "stage_s.pth"
    path.write_bytes(content) if len(content) == 1 else torch.save(good, path)
    with pytest.raises(UserError, match=r"stage_s.pth"):
        load_stage(path, type("Stage", (), {"name": "s", "settings": {"epochs": 1}}))


@pytest.mark.parametrize("text", ["", "3", "[", "[" * 100_000])
def test_settings_in_weights_that_are_no_settings(text):
    mine, theirs = (torch.tensor(list(content.encode()), dtype=torch.uint8) for content in ('{"network": "A"}', text))
    network = type("Network", (), {"settings": mine})
    with pytest.raises(RuntimeError, match="settings"):
        PlanNetwork._check_settings(network, {"settings": theirs})


@pytest.mark.parametrize("name", ["a", "Dataset001_A", "a b", "é", ".hidden", "a..b", "x" * 200])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "C:a", "a\0", "\ud800", "x" * 201, "é" * 101, None, 3, ["a"]]
)
def test_names_that_are_not_plain(name):
    assert not is_plain_name(name)
