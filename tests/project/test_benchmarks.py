"""Benchmark scripts whose result is a promise of ours. Each takes minutes, so all are in the long tail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planned import finish

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILLS = 3

pytestmark = pytest.mark.long


def script(name, *args, fails=False, cwd=None, timeout=600):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, args)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )
    done = subprocess.CompletedProcess(command, None, *finish(child, timeout))
    done.returncode = child.returncode
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def test_a_training_step_of_ours_waits_no_more_often_than_vanillas(tmp_path):
    output = tmp_path / "sync.json"
    names = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
    script("host_sync.py", "--device", "cpu", "--threads", 1, "-tr", *names, "-o", output, cwd=tmp_path)
    rows = json.loads(output.read_text())["trainers"]
    waits = {name: row["waits"] for name, row in rows.items()}
    assert {name: waits[name] for name in ("nnUNetTrainer", *names)} == dict.fromkeys(("nnUNetTrainer", *names), 1)
    assert waits["nnUNetTrainerGRCSF, autoencoder"] == 1
    assert any("trainers/glua.py" in key and "chosen.any()" in key for key in rows["nnUNetTrainerGLUA"]["places"])


@pytest.mark.skipif(sys.platform != "linux", reason="kills forked processes, and looks for orphans with ps")
def test_nothing_is_lost_to_a_kill(tmp_path):
    """A few kills of the many in benchmarks/kills_cpu.json: at random moments and in checkpoint writes."""
    result = tmp_path / "kills.json"
    script("kills.py", "--kills", KILLS, "--trainers", "GRCSF", "--seed", 5, "--folder", tmp_path / "data", "--json", result)
    assert json.loads(result.read_text())["kills"] == KILLS


def test_adapted_it_finds_what_source_only_training_does_not(tmp_path, monkeypatch):
    """A few minutes of training, no label of the target. The ceiling is 0.96; one run with half the translation had 0.34."""
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "2")
    output = tmp_path / "gain.json"
    command = (
        "adaptation.py", "--pair", "phantom", "--folder", tmp_path, "--device", "cpu", "--iterations", 200, "--batch-size", 4,
        "--translation-share", 3, "--translator-width", 8, "--slices", 4, "--methods", "source only", "GLUA",
    )  # fmt: skip
    script(*command, "--epochs", 3, "-o", output, timeout=2700)
    (rows,) = json.loads(output.read_text())["repeats"]
    before, after = rows["source only"], rows["GLUA"]
    assert len(after["dice"]) == 12
    assert before["mean_dice"] < 0.15 and after["mean_dice"] > before["mean_dice"] + 0.2
    assert sum(after["dice"][case] > before["dice"][case] for case in after["dice"]) >= 11
    assert not (tmp_path / "raw" / "Dataset902_PhantomBlackBlood" / "labelsTr").exists()
    other = script(*command, "--epochs", 4, fails=True)  # what is there would be taken for it
    assert "epochs: there 3, here 4" in other.stderr and "name another --folder" in other.stderr
