"""Trainings through nnU-Net's command line, here a stub of it: spread over GPUs, failing, interrupted, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import train_stub
from train_stub import calls, write_checkpoint

from nnunet_l2g.compare import local_runs
from nnunet_l2g.compare.local_runs import Place, cuda_devices, places, train_locally
from nnunet_l2g.compare.models import FINISHED, Model
from nnunet_l2g.compare.training import LOGS, case_names, check_trainable, missing_trainings
from nnunet_l2g.errors import UserError

DATASET = "Dataset993_Runs"
DRIVER = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import test_training_runs as here
from nnunet_l2g.compare.local_runs import Place, train_locally
from nnunet_l2g import processes as runner
runner.GRACE = (0.3, 0.3)
try:
    train_locally(here.trainings(Path(sys.argv[2]), "01"), [Place("a"), Place("b")])
except runner.Interrupted:
    sys.exit(130)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The stub's folder; nnUNetv2_train is the stub, results are in nnUNet_results beside it."""
    folder = tmp_path / "stub"
    for name, value in train_stub.install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local_runs, "POLL", 0.02)
    (tmp_path / "report").mkdir()
    return folder


def trainings(folder, folds, device="cpu", **options):
    """Of one model, below the test's folder."""
    results = folder / "nnUNet_results" / DATASET / "nnUNetTrainerAny__nnUNetPlans__2d"
    model = Model("Any", "nnUNetTrainerAny", "nnUNetPlans", "2d", results)
    return missing_trainings([model], list(folds), DATASET, device, folder / "report", **options)


def mode(stub, fold, text):
    (stub / f"nnUNetTrainerAny_{fold}.mode").write_text(text)


def folds_of(records):
    return [record["argv"][2] for record in records]


def alive(pid):
    """Zombies are dead: a container's first process may not collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# on one machine


def test_trainings_spread_over_the_gpus_each_seeing_its_own(stub, tmp_path, monkeypatch, capsys):
    for fold in "01":
        mode(stub, fold, "meet")
    monkeypatch.setattr(local_runs, "cuda_devices", lambda: ["3", "GPU-5c1f"])
    train_locally(trainings(tmp_path, "01234"), places("cuda", None))
    records = calls(stub)
    assert sorted(folds_of(records)) == list("01234") and {record["cuda"] for record in records[:2]} == {"3", "GPU-5c1f"}
    for device in ("3", "GPU-5c1f"):  # never two at once on one
        spans = sorted((record["begin"], record["end"]) for record in records if record["cuda"] == device)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert not trainings(tmp_path, "01234")  # all finished
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("[1/5] on GPU 3 nnUNetv2_train Dataset993_Runs 2d 0") for line in printed)
    assert sum(line.startswith("      Any, fold 4: epoch 5: train_loss -0.5") for line in printed) == 1
    assert not any(line.startswith("      epoch") for line in printed)


def test_on_a_cpu_one_after_the_other_and_nothing_is_set(stub, tmp_path, capsys):
    train_locally(trainings(tmp_path, "01"), places("cpu", None))
    first, second = calls(stub)
    assert first["cuda"] is None and second["cuda"] is None and first["end"] <= second["begin"]
    assert "      epoch 5: train_loss -0.5" in capsys.readouterr().out


def test_jobs_are_trainings_of_one_thread_side_by_side(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local_runs, "available_cores", lambda: 2)
    monkeypatch.setenv("PYTHONPATH", str(stub))  # without the tests' own way to one thread
    for fold in "01":
        mode(stub, fold, "meet")
    train_locally(trainings(tmp_path, "012"), places("cpu", 2))
    assert all(record["threads"] == [1, "1", "0"] for record in calls(stub)) and not trainings(tmp_path, "012")
    printed = capsys.readouterr().out
    assert "[1/3] on core 1 nnUNetv2_train" in printed and "      Any, fold 1: epoch 5: train_loss" in printed
    with pytest.raises(UserError, match="--jobs 3: this process may use 2 cores; expected 1 to 2"):
        places("cpu", 3)
    with pytest.raises(UserError, match="--jobs 2: for trainings on a CPU"):
        places("cuda", 2)


def test_after_a_failure_what_runs_is_finished_and_nothing_is_started(stub, tmp_path, capsys):
    (stub / "seconds").write_text("0.3")
    mode(stub, 0, "fail")
    with pytest.raises(UserError) as error:
        train_locally(trainings(tmp_path, "0123"), [Place("a"), Place("b")])
    assert sorted(folds_of(calls(stub))) == ["0", "1"]
    assert [training.fold for training in trainings(tmp_path, "0123")] == ["0", "2", "3"]
    text = str(error.value)
    assert text.count("failed (exit status 1)") == 1 and "training Any, fold 0 failed" in text
    assert "RuntimeError: the stub broke" in text and "2 more not started" in text and "same command again" in text
    assert str(tmp_path / "report" / LOGS / "nnUNetTrainerAny__nnUNetPlans__2d_fold_0.log") in text
    assert "demo" not in text and "what runs is finished first" in capsys.readouterr().out


def test_every_failure_is_named(stub, tmp_path):
    for fold in "01":
        mode(stub, fold, "fail")
    with pytest.raises(UserError) as error:
        train_locally(trainings(tmp_path, "01"), [Place("a"), Place("b")])
    assert all(f"training Any, fold {fold} failed" in str(error.value) for fold in "01")
    assert "not started" not in str(error.value)


def test_a_training_that_ends_well_but_unfinished_is_not_believed(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "state", lambda *_: "missing")
    with pytest.raises(UserError, match=r"ended without an error, but .*fold_0 is missing; see .*log"):
        train_locally(trainings(tmp_path, "0"), [Place()])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_all_trainings_and_their_workers(stub, tmp_path):
    for fold in "01":
        mode(stub, fold, "hang")
    argv = [sys.executable, "-c", DRIVER, json.dumps([str(Path(__file__).parent)]), str(tmp_path)]
    process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while sum("worker" in record for record in calls(stub)) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = [record[key] for record in calls(stub) for key in ("pid", "worker")]
    assert len(pids) == 4 and all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, process.stderr.read()
    end = time.monotonic() + 5
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("5, 2", ["5", "2"]), ("MIG-a,MIG-b,-1", ["MIG-a", "MIG-b"])],
)
def test_the_devices_are_those_that_torch_sees(tmp_path, monkeypatch, visible, expected):
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = lambda: 2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices() == expected


# from where a fold stands


def test_a_half_written_checkpoint_is_set_aside_and_the_one_before_continued(stub, tmp_path):
    (training,) = trainings(tmp_path, "0")
    training.folder.mkdir(parents=True)
    write_checkpoint(training.folder / "checkpoint_best.pth", 4)
    write_checkpoint(training.folder / "checkpoint_latest.pth", 5)
    latest = training.folder / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-10])
    train_locally([training], [Place()])
    assert calls(stub)[0]["argv"][-1] == "--c"
    assert "Epoch 3\n" not in training.log.read_text() and "Epoch 4\n" in training.log.read_text()
    assert (training.folder / "checkpoint_latest.broken").exists()


def test_only_half_of_a_checkpoint_begins_anew(stub, tmp_path):
    (training,) = trainings(tmp_path, "0")
    training.folder.mkdir(parents=True)
    (training.folder / "checkpoint_best.pth").write_bytes(b"PK\x03\x04 and no more")
    train_locally([training], [Place()])
    assert "--c" not in calls(stub)[0]["argv"] and training.model.state("0") == FINISHED


def test_arguments_follow_the_state(stub, tmp_path):
    (training,) = trainings(tmp_path, "0", "cuda", gpus=2)
    plain = [DATASET, "2d", "0", "-tr", "nnUNetTrainerAny", "-p", "nnUNetPlans", "-device", "cuda", "-num_gpus", "2"]
    assert training.arguments() == plain
    training.folder.mkdir(parents=True)
    (training.folder / "stage_autoencoder.pth").touch()
    assert training.arguments() == [*plain, "--c"]
    write_checkpoint(training.folder / "checkpoint_final.pth", 1)
    assert training.arguments() == [*plain, "--val"]


# what has to be there


@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    (folder / "nnUNetPlans_2d").mkdir(parents=True)
    plans = {"configurations": {f"{n}d": {"data_identifier": f"nnUNetPlans_{n}d", "architecture": {}} for n in "23"}}
    (folder / "nnUNetPlans.json").write_text(json.dumps({"plans_name": "nnUNetPlans"} | plans))
    for number in range(7):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (folder / "nnUNetPlans_2d" / f"case_{number}{ending}").touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setattr("nnunet_l2g.lookup.find_trainer", lambda name: object)
    return folder


def test_the_splits_are_written_once_as_nnunet_would(preprocessed, tmp_path):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    models = [training.model for training in trainings(tmp_path, "0")]
    check_trainable(models, ["0", "1"], DATASET)
    splits = preprocessed / "splits_final.json"
    assert json.loads(splits.read_text()) == generate_crossval_split([f"case_{i}" for i in range(7)], seed=12345, n_splits=5)
    splits.write_text("mine")
    check_trainable(models, ["0", "1"], DATASET)
    assert splits.read_text() == "mine"


def test_too_few_cases_no_configuration_and_no_data_are_refused(preprocessed, tmp_path):
    models = [training.model for training in trainings(tmp_path, "0")]
    for number in range(3):
        for path in (preprocessed / "nnUNetPlans_2d").glob(f"case_{number}*"):
            path.unlink()
    with pytest.raises(UserError, match="4 cases, and nnU-Net splits 5 or more"):
        check_trainable(models, ["0"], DATASET)
    check_trainable(models, ["all"], DATASET)  # is not split
    assert not (preprocessed / "splits_final.json").exists()
    with pytest.raises(UserError, match="-c 4d: nnUNetPlans has 2d, 3d"):
        case_names(preprocessed, "nnUNetPlans", "4d")
    with pytest.raises(UserError, match="nnUNetPlans_3d: no preprocessed data; run nnUNetv2_preprocess"):
        case_names(preprocessed, "nnUNetPlans", "3d")


def test_the_environment_of_a_child_has_our_trainers(stub, tmp_path, monkeypatch):
    from nnunet_l2g.compare.training import child_environment

    monkeypatch.setenv("nnUNet_extTrainer", "mine")
    first, *rest = child_environment()["nnUNet_extTrainer"].split(os.pathsep)
    assert first == "mine" and any((Path(path) / "nnunet_l2g_trainers.py").is_file() for path in rest)
