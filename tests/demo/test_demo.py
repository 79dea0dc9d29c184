"""The demo: what it refuses, what it keeps, what it says when a step fails, and that Ctrl-C leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_l2g import cli, nnunet
from nnunet_l2g.demo import folder as demo_folder
from nnunet_l2g.demo import steps
from nnunet_l2g.nnunet import Progress

STUB = Path(__file__).with_name("demo_stub.py")
DRIVER = """
import sys
from nnunet_l2g import cli
from nnunet_l2g import nnunet
stub, control, grace, *argv = sys.argv[1:]
nnunet.GRACE = float(grace)
nnunet.nnunet_command = lambda script, args, prelude: [sys.executable, stub, control, script, *args]
sys.exit(cli.main(argv))
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """The stub's folder; nnU-Net's commands are replaced by the stub."""
    path = tmp_path / "control"
    path.mkdir()
    monkeypatch.setattr(
        nnunet, "nnunet_command", lambda script, args, prelude: [sys.executable, str(STUB), str(path), script, *args]
    )
    monkeypatch.setattr(steps, "NUM_TRAINING", 5)
    monkeypatch.setattr(steps, "NUM_TEST", 2)
    monkeypatch.setattr(steps, "SIZE", (32, 32, 6))
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "demo folder"


def demo(target, *args):
    return cli.main(["demo", "-o", str(target), "--device", "cpu", *args])


def calls(control):
    path = control / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return [line.split()[0].removeprefix("nnUNetv2_") for line in lines], lines


def alive(pid):
    """Zombies are dead: a container's first process may not collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_steps_then_nothing_left_to_do(control, target, capsys):
    assert demo(target) == 0
    assert calls(control)[0] == ["plan_and_preprocess", "train", "predict", "evaluate_folder"]
    output = capsys.readouterr().out
    for number in range(1, 7):
        assert f"[{number}/6]" in output
    assert "Epoch 0, train_loss -0.5, val_loss -0.4, Pseudo dice [0.75, nan, 0.5], Epoch time: 2.4 s" in output
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert f"{name}='{target / name}'" in output
    assert (target / "demo.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((target / "demo_summary.json").read_text())
    assert summary["mean_foreground_dice"] == pytest.approx((1.0 + 0.5 + 0.9) / 3)
    assert summary["dice"]["right_ventricle"]["cases"] == {"phantom_ts000": None, "phantom_ts001": 0.9}
    assert all(command in output for command in summary["commands"])

    assert demo(target) == 0
    assert calls(control)[0] == []
    assert capsys.readouterr().out.count("done before") == 6


def test_a_lost_result_is_made_again_with_all_that_depends_on_it(control, target):
    demo(target)
    calls(control)
    (target / "predictions" / "dataset.json").unlink()
    assert demo(target) == 0
    assert calls(control)[0] == ["predict", "evaluate_folder"]


def test_other_settings_need_overwrite_or_another_folder(control, target, capsys):
    assert demo(target) == 0
    before = (target / "state.json").read_text()
    mine = target / "my notes.txt"
    mine.write_text("keep me")
    calls(control)
    for other in (["--seed", "1"], ["-tr", "nnUNetTrainer"]):
        assert demo(target, *other) == 1
        message = capsys.readouterr().err
        assert "other settings" in message
        assert "--overwrite" in message
        assert "-o" in message
    assert (target / "state.json").read_text() == before
    assert calls(control)[0] == []
    assert demo(target, "--seed", "1", "--overwrite") == 0
    assert len(calls(control)[0]) == 4
    assert mine.read_text() == "keep me"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_foreign_folder_is_left_alone(control, target, overwrite, capsys):
    target.mkdir()
    (target / "nnUNet_raw").mkdir()
    assert demo(target, *overwrite) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["nnUNet_raw"]


def test_an_empty_folder_will_do(control, target):
    target.mkdir()
    assert demo(target) == 0


@pytest.mark.parametrize("where", ["file", "below a file", "/proc/nnunet_l2g_demo"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(control, tmp_path, where, capsys, monkeypatch):
    monkeypatch.setattr("nnunet_l2g.demo.command.choose_device", lambda _: pytest.fail("computed before refusing"))
    (tmp_path / "file").write_text("")
    path = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "demo"}.get(where, Path(where))
    assert demo(path) == 1
    message = capsys.readouterr().err
    assert str(path) in message
    assert "-o" in message


def test_too_little_space_is_refused(control, target, capsys, monkeypatch):
    monkeypatch.setattr(demo_folder, "NEEDED_BYTES", 2**60)
    assert demo(target) == 1
    assert "free" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"settings": {}', "[]", '{"settings": {}, "finished": 3, "started": []}'])
def test_an_unreadable_state_is_named(control, target, content, capsys):
    demo(target)
    (target / "state.json").write_text(content)
    assert demo(target) == 1
    message = capsys.readouterr().err
    assert "state.json cannot be read" in message
    assert "--overwrite" in message
    assert demo(target, "--overwrite") == 0


def test_a_failing_step_names_command_log_and_cause_and_is_repeated(control, target, capsys):
    (control / "nnUNetv2_predict.mode").write_text("fail")
    assert demo(target) == 1
    message = capsys.readouterr().err
    assert "step predict failed (exit status 3)" in message
    assert f"command: nnUNetv2_predict -d {steps.DATASET_ID}" in message
    assert str(target / "logs" / "predict.log") in message
    assert "RuntimeError: the stub broke" in message
    assert "Traceback" not in message
    calls(control)
    (control / "nnUNetv2_predict.mode").unlink()
    assert demo(target) == 0
    assert calls(control)[0] == ["predict", "evaluate_folder"]


def test_a_training_that_broke_off_is_continued(control, target):
    (control / "nnUNetv2_train.mode").write_text("fail")
    assert demo(target) == 1
    assert "--c" not in calls(control)[1][-1].split()
    (control / "nnUNetv2_train.mode").unlink()
    assert demo(target) == 0
    names, lines = calls(control)
    assert names == ["train", "predict", "evaluate_folder"]
    assert lines[0].split()[-1] == "--c"


def test_a_command_that_leaves_no_result_is_not_taken_for_done(control, target, capsys):
    (control / "nnUNetv2_train.mode").write_text("vanish")
    assert demo(target) == 1
    assert "checkpoint_final.pth is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "grace", "number"), [("hang", 20, signal.SIGINT), ("stubborn", 0.3, signal.SIGINT), ("hang", 20, signal.SIGTERM)]
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_an_interrupted_demo_leaves_no_process_and_can_go_on(control, target, mode, grace, number):
    (control / "nnUNetv2_train.mode").write_text(mode)
    argv = [sys.executable, "-c", DRIVER, STUB, control, grace, "demo", "-o", target, "--device", "cpu"]
    # a group of its own, as a shell gives a job: the signal reaches the demo alone, which has to pass it on
    process = subprocess.Popen(
        list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
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
    assert "done: phantom, plan\n" in message
    assert "not done: train, predict, evaluate, report" in message
    assert "run the same command again" in message
    assert "Traceback" not in message
    for _ in range(40):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    state = json.loads((target / "state.json").read_text())
    assert list(state["finished"]) == ["phantom", "plan"]

    (control / "nnUNetv2_train.mode").unlink()
    calls(control)
    assert demo(target) == 0
    assert calls(control)[1][0].split()[-1] == "--c"


def test_an_interruption_within_the_demo_itself(control, target, capsys, monkeypatch):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_l2g.phantom.write_dataset", interrupted)
    assert demo(target) == 130
    assert "done: nothing" in capsys.readouterr().err


def test_bad_seed_and_missing_command(target, capsys, monkeypatch):
    assert demo(target, "--seed", "-1") == 1
    assert "--seed -1: expected 0 or more" in capsys.readouterr().err
    assert not target.exists()
    monkeypatch.setattr(nnunet, "entry_points", lambda **_: ())
    assert demo(target) == 1
    assert "nnUNetv2_plan_and_preprocess is not installed" in capsys.readouterr().err


def test_children_see_nnunets_variables_and_our_trainers(tmp_path, monkeypatch):
    monkeypatch.setenv("NNUNET_L2G_AUTOLOAD", "0")
    monkeypatch.setenv("nnUNet_extTrainer", "mine")
    environment = nnunet.child_environment(tmp_path)
    first, *rest = environment["nnUNet_extTrainer"].split(os.pathsep)
    assert first == "mine"
    assert any((Path(path) / "nnunet_l2g_trainers.py").is_file() for path in rest)
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert 1 <= int(environment["nnUNet_n_proc_DA"]) <= 4


def test_training_progress_ignores_what_it_does_not_know():
    progress = Progress(Path("log")).shown
    assert progress("Using splits from existing split file") is None
    assert progress("2026-01-01 00:00:00.1: predicting phantom_tr001 ") == "predicting phantom_tr001"
    assert progress("2026-01-01 00:00:00.1: Mean Validation Dice:  0.9 ") == "Mean Validation Dice:  0.9"


def test_help_is_quick_to_import():
    code = (
        "import sys; from nnunet_l2g.cli import main\ntry: main(['demo', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'SimpleITK', 'matplotlib', 'numpy', 'nnunetv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.long
def test_the_real_demo_learns(tmp_path):
    subprocess.run([sys.executable, "-m", "nnunet_l2g.cli", "demo", "-o", tmp_path / "demo", "--device", "cpu"], check=True)
    summary = json.loads((tmp_path / "demo" / "demo_summary.json").read_text())
    assert summary["mean_foreground_dice"] > 0.8
    assert (tmp_path / "demo" / "demo.png").stat().st_size < 300_000
