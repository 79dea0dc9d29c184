"""The demo: what it refuses, what it keeps, what it says when a step fails, and that Ctrl-C leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_l2g import cli, nnunet
from nnunet_l2g.autoload import VARIABLE, trainers_folder
from nnunet_l2g.demo import command, report
from nnunet_l2g.errors import UserError

STUB = Path(__file__).with_name("demo_stub.py")
DRIVER = """
import sys
from nnunet_l2g import cli, nnunet
stub, control, *argv = sys.argv[1:]
nnunet.nnunet_command = lambda script, args, prelude: [sys.executable, stub, control, script, *args]
sys.exit(cli.main(argv))
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """The stub's folder. The stub replaces nnU-Net's commands."""
    path = tmp_path / "control"
    path.mkdir()
    monkeypatch.setattr(
        nnunet, "nnunet_command", lambda script, args, prelude: [sys.executable, str(STUB), str(path), script, *args]
    )
    for name, value in {"NUM_TRAINING": 5, "NUM_TEST": 2, "SIZE": (32, 32, 6)}.items():
        monkeypatch.setattr(command, name, value)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "demo folder"


def demo(target, *args):
    return cli.main(["demo", "-o", str(target), "--device", "cpu", *args])


def calls(control):
    """nnU-Net's command lines since the last call, without `nnUNetv2_`."""
    path = control / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return [line.removeprefix("nnUNetv2_").split() for line in lines]


def names(control):
    return [words[0] for words in calls(control)]


def test_all_steps_then_nothing_left_to_do(control, target, capsys):
    assert demo(target) == 0
    assert names(control) == ["plan_and_preprocess", "train", "predict"]
    output = capsys.readouterr().out
    assert all(f"[{number}/5]" in output for number in range(1, 6))
    assert any("train_loss -0.5" in line and "0.75" in line for line in output.splitlines())
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert f"export {name}='{target / name}'" in output
    assert f"nnUNetv2_train 980 2d 0 -tr {command.DEFAULT_TRAINER}" in output
    assert (target / "demo.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((target / "demo_summary.json").read_text())
    assert summary["mean_foreground_dice"] == 1.0
    assert summary["dice"]["right_ventricle"] == {"phantom_ts000": 1.0, "phantom_ts001": 1.0}

    assert demo(target) == 0
    assert names(control) == []
    output = capsys.readouterr().out
    assert output.count("done before") == 4 and "mean foreground Dice 1.000" in output


def test_a_missing_result_is_made_again_with_all_after_it(control, target):
    demo(target)
    calls(control)
    (target / "nnUNet_results/Dataset980_CardiacPhantom").rename(target / "elsewhere")
    assert demo(target) == 0
    assert names(control) == ["train", "predict"]


def test_other_or_damaged_settings_need_overwrite_or_another_folder(control, target, capsys):
    assert demo(target) == 0
    (target / "my notes.txt").write_text("keep me")
    calls(control)
    for other in (["--seed", "1"], ["-tr", "nnUNetTrainer"]):
        assert demo(target, *other) == 1
        message = capsys.readouterr().err
        assert "other settings" in message and other[1] in message and "--overwrite" in message and "-o" in message
    assert names(control) == []
    assert demo(target, "--seed", "1", "--overwrite") == 0
    assert len(names(control)) == 3
    assert (target / "my notes.txt").read_text() == "keep me"
    (target / ".nnunet_l2g_demo").write_text("[]")
    assert demo(target) == 1
    message = capsys.readouterr().err
    assert ".nnunet_l2g_demo cannot be read" in message and "--overwrite" in message


def test_a_foreign_folder_is_left_alone(control, target, capsys):
    (target / "nnUNet_raw").mkdir(parents=True)
    assert demo(target, "--overwrite") == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["nnUNet_raw"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(control, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "choose_device", lambda _: pytest.fail("computed before refusing"))
    (tmp_path / "file").write_text("")
    assert demo(tmp_path / "file" / "demo") == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "file" / "demo") in message and "-o" in message


def test_a_failing_step_names_command_log_and_cause_and_is_repeated(control, target, capsys):
    (control / "nnUNetv2_predict.mode").write_text("fail")
    assert demo(target) == 1
    message = capsys.readouterr().err
    assert "step predict failed (exit status 3)" in message
    assert f"command: nnUNetv2_predict -d {command.DATASET_ID}" in message
    assert str(target / "logs" / "predict.log") in message
    assert "RuntimeError: the stub broke" in message
    assert "Traceback" not in message
    calls(control)
    (control / "nnUNetv2_predict.mode").unlink()
    assert demo(target) == 0
    assert names(control) == ["predict"]


def test_a_training_that_broke_off_is_continued(control, target):
    (control / "nnUNetv2_train.mode").write_text("fail")
    assert demo(target) == 1
    assert "--c" not in calls(control)[-1]
    (control / "nnUNetv2_train.mode").unlink()
    assert demo(target) == 0
    train, predict = calls(control)
    assert train[0] == "train" and train[-1] == "--c" and predict[0] == "predict"


def test_a_command_that_leaves_no_result_is_not_taken_for_done(control, target, capsys):
    (control / "nnUNetv2_train.mode").write_text("vanish")
    assert demo(target) == 1
    assert "summary.json is missing" in capsys.readouterr().err


def alive(pid):
    """Zombies are dead. The first process of a container may not collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_an_interrupted_demo_leaves_no_process_and_can_go_on(control, target, number):
    (control / "nnUNetv2_train.mode").write_text("hang")
    argv = [sys.executable, "-c", DRIVER, STUB, control, "demo", "-o", target, "--device", "cpu"]
    # in a group of its own, as a shell starts it: the signal reaches the demo alone, which has to pass it on
    process = subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (control / "pids").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the stub's training did not start"
        time.sleep(0.05)
    pids = [int(pid) for pid in (control / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    os.kill(process.pid, number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in message and "Traceback" not in message
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (control / "nnUNetv2_train.mode").unlink()
    calls(control)
    assert demo(target) == 0
    train, predict = calls(control)
    assert train[0] == "train" and train[-1] == "--c" and predict[0] == "predict"


def test_an_interruption_within_the_demo_itself(control, target, capsys, monkeypatch):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_l2g.phantom.write_dataset", interrupted)
    assert demo(target) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_bad_seed_and_missing_command(target, capsys, monkeypatch):
    assert demo(target, "--seed", "-1") == 1
    assert "--seed -1: expected 0 or more" in capsys.readouterr().err
    assert not target.exists()
    monkeypatch.setattr(nnunet, "entry_points", lambda **_: ())
    assert demo(target) == 1
    assert "nnUNetv2_plan_and_preprocess is not installed" in capsys.readouterr().err


def test_a_trainer_of_somebody_else_is_named(control, target, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(f"class {command.DEFAULT_TRAINER}: pass")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path), trainers_folder()]))
    assert demo(target) == 0
    assert f"{command.DEFAULT_TRAINER} from {tmp_path / 'mine.py'}, not from nnunet_l2g" in capsys.readouterr().out


def test_children_see_nnunets_variables_and_our_trainers(tmp_path, monkeypatch):
    monkeypatch.setenv("NNUNET_L2G_AUTOLOAD", "0")
    monkeypatch.setenv(VARIABLE, "mine")
    environment = nnunet.child_environment(tmp_path)
    assert environment[VARIABLE].split(os.pathsep) == ["mine", trainers_folder()]
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert 1 <= int(environment["nnUNet_n_proc_DA"]) <= 4


def test_progress_shows_cases_and_nothing_that_it_does_not_know():
    shown = nnunet.Progress(Path("log")).shown
    assert shown("Using splits from existing split file") is None
    for line in ("predicting phantom_tr001", "Mean Validation Dice:  0.9"):
        assert shown(f"2026-01-01 00:00:00.1: {line} ") == line


def test_dice_and_slice():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    half = np.array([[True, True], [False, False]])
    assert report.dice(full, full) == 1 and report.dice(full, half) == pytest.approx(2 / 3) and report.dice(half, empty) == 0
    assert np.isnan(report.dice(empty, empty))
    reference = np.zeros((5, 3, 3), int)
    reference[1:4, 0, 0], reference[2:4, 1, 1] = 1, 2
    assert report.middle_slice(reference, 2) == 3


def test_an_image_that_was_not_written_to_its_end_is_named(tmp_path):
    path = tmp_path / "a.nii.gz"
    nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(8, 8, 4)), np.eye(4)).to_filename(path)
    assert report.read_voxels(path).shape == (4, 8, 8)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.nii\.gz cannot be read .* --overwrite"):
        report.read_voxels(path)


@pytest.mark.long
def test_the_real_demo_learns(tmp_path):
    subprocess.run([sys.executable, "-m", "nnunet_l2g.cli", "demo", "-o", tmp_path / "demo", "--device", "cpu"], check=True)
    summary = json.loads((tmp_path / "demo" / "demo_summary.json").read_text())
    assert summary["mean_foreground_dice"] > 0.9
    assert (tmp_path / "demo" / "demo.png").stat().st_size < 300_000
