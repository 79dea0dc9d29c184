"""Trainings as jobs of a real SLURM of one node, started for these tests (tests/slurm_cluster.py)."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import slurm_cluster
from planned import PLAIN
from test_slurm_jobs import wait_for
from test_training_runs import alive, mode, stub, trainings  # noqa: F401 (a fixture)
from train_stub import calls

from nnunet_l2g.compare import slurm_runs
from nnunet_l2g.compare.slurm_runs import SlurmOptions, check_slurm, job_name, train_on_slurm
from nnunet_l2g.errors import UserError

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=f"no SLURM to start: {slurm_cluster.why_not()}"),
]
COMPARE = """
import sys
from nnunet_l2g import cli
from nnunet_l2g.compare import slurm_runs
slurm_runs.ASK = 1
sys.exit(cli.main(["compare", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture
def on_cluster(cluster, stub, monkeypatch):  # noqa: F811
    """The cluster for this process, and nnUNetv2_train as the stub."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_runs, "ASK", 0.5)
    yield cluster
    cluster.run("scancel", "--user=root", "--signal=KILL", check=False)
    cluster.run("scancel", "--user=root", check=False)


def later(action, *conditions):
    """Runs `action` in a thread as soon as all conditions hold."""

    def run():
        for condition in conditions:
            wait_for(condition)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_slurm_runs_folds_at_the_same_time(on_cluster, stub, tmp_path, capsys):  # noqa: F811
    for fold in "01":
        mode(stub, fold, "meet")
    options = SlurmOptions("low", gpus=0, time=5, memory=0.2, cpus=1)
    check_slurm()
    with pytest.raises(UserError, match=r"sbatch refuses the job: (.|\n)*invalid partition"):
        train_on_slurm(trainings(tmp_path, "2"), SlurmOptions("nowhere"), tmp_path / "report")
    train_on_slurm(trainings(tmp_path, "01"), options, tmp_path / "report")
    assert not trainings(tmp_path, "01")
    assert capsys.readouterr().out.count(" COMPLETED\n") == 2


def test_slurm_gives_each_fold_its_gpus(on_cluster, stub, tmp_path):  # noqa: F811
    for fold in "01":
        mode(stub, fold, "meet")
    train_on_slurm(trainings(tmp_path, "01", "cuda"), SlurmOptions(gpus=1, cpus=1), tmp_path / "report")
    assert sorted(record["cuda"] for record in calls(stub)) == ["0", "1"]
    train_on_slurm(trainings(tmp_path, "2", "cuda", gpus=2), SlurmOptions(gpus=2), tmp_path / "report")
    last = calls(stub)[-1]
    assert last["cuda"] == "0,1" and last["argv"][-2:] == ["-num_gpus", "2"]


def test_slurm_jobs_that_fail_are_cancelled_or_refused(on_cluster, stub, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"sbatch refuses the job: (.|\n)*emory"):
        train_on_slurm(trainings(tmp_path, "2"), SlurmOptions(gpus=0, memory=500), tmp_path / "report")
    mode(stub, 0, "fail")
    mode(stub, 1, "slow")

    def cancel():
        name = job_name(trainings(tmp_path, "1")[0])
        on_cluster.run("scancel", f"--name={name}")

    thread = later(cancel, lambda: any("slow" in record for record in calls(stub)))
    with pytest.raises(UserError) as error:
        train_on_slurm(trainings(tmp_path, "01"), SlurmOptions(gpus=0, cpus=1), tmp_path / "report")
    thread.join()
    text = str(error.value)
    assert "fold 0 failed: job" in text and "ended (FAILED)" in text and "RuntimeError: the stub broke" in text
    assert "fold 1 failed: job" in text and "ended (CANCELLED)" in text
    wait_for(lambda: not any(alive(record["pid"]) for record in calls(stub)))


def test_slurm_job_of_another_report_is_found_and_not_submitted_again(on_cluster, stub, tmp_path, capsys):  # noqa: F811
    (stub / "seconds").write_text("1")
    options = SlurmOptions(gpus=0, cpus=1)
    (training,) = trainings(tmp_path, "0")
    number = slurm_runs.submit(training, options, tmp_path / "report" / slurm_runs.JOBS)
    other = dataclasses.replace(training, output=tmp_path / "another report")
    train_on_slurm([other], options, other.output)
    printed = capsys.readouterr().out
    assert f"job {number} is on the cluster already" in printed and f"job {number} COMPLETED" in printed
    assert len(calls(stub)) == 1 and not trainings(tmp_path, "0") and not other.log.exists()


def test_slurm_requeues_at_the_signal_and_at_a_preemption_and_each_time_the_training_continues(on_cluster, stub, tmp_path):  # noqa: F811
    (stub / "seconds").write_text("3")
    (training,) = trainings(tmp_path, "0")

    def reached(epoch):
        return lambda: training.log.is_file() and f"Epoch {epoch}\n" in training.log.read_text()

    def signal_and_preempt():
        number = on_cluster.run("squeue", "--noheader", "--format=%i", f"--name={job_name(training)}").strip()
        on_cluster.run("scancel", f"--signal={slurm_runs.stop_signal().name}", number)  # SLURM does so before the time limit
        wait_for(reached(3))
        on_cluster.run("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")

    thread = later(signal_and_preempt, reached(1))
    train_on_slurm([training], SlurmOptions("low", gpus=0, time=30, cpus=2), tmp_path / "report")
    thread.join()
    records = calls(stub)
    assert [record["argv"][-1] for record in records] == ["cpu", "--c", "--c"]
    assert [record["end"] is None for record in records] == [True, True, False]
    assert not any(alive(record["pid"]) for record in records)
    log = training.log.read_text()
    assert log.count("Epoch 0\n") == 1 and all(log.count(f"Epoch {epoch}\n") in (1, 2) for epoch in range(1, 6))
    (errors,) = (tmp_path / "report" / "slurm").glob("*/*_0_log.err")
    assert "Caught signal SIGUSR2" in errors.read_text() and "DUE TO PREEMPTION" in errors.read_text()


def test_slurm_time_limit_continues_in_the_same_job(on_cluster, stub, tmp_path, capsys):  # noqa: F811
    (stub / "seconds").write_text("8")  # 48 s in all, and the signal comes 90 s before the end of 120 s
    train_on_slurm(trainings(tmp_path, "0"), SlurmOptions(gpus=0, time=2), tmp_path / "report")
    records = calls(stub)
    assert len(records) > 1 and all(record["argv"][-1] == "--c" for record in records[1:])
    assert not trainings(tmp_path, "0") and not any(alive(record["pid"]) for record in records)
    printed = capsys.readouterr().out
    assert printed.count(" submitted\n") == 1 and printed.count("PENDING (BeginTime)") == len(records) - 1


@pytest.mark.commands
def test_slurm_trains_with_nnunet_through_a_preemption(cluster, planned, tmp_path):
    """Two real trainings at once, both preempted: they continue with --c, the report is written, no process is left."""
    (tmp_path / "results").mkdir()
    trainers = ["nnUNetTrainerL2GNet_6epochs_2iterations", "nnUNetTrainerL2GNetNearestReference_4epochs_2iterations"]
    variables = planned.environment | cluster.variables | {"nnUNet_results": str(tmp_path / "results")}
    output, jobs = str(tmp_path / "report"), ["--slurm-partition", "low", "--slurm-cpus", "1", "--slurm-time", "30"]
    command = ["-d", "981", "-c", "3d_fullres", "-f", "0", "-tr", *trainers, "-o", output, "-np", "1"]
    argv = [sys.executable, "-c", COMPARE, *command, "--train", "--device", "cpu", "--executor", "slurm", *jobs]
    folds = [tmp_path / "results" / PLAIN / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0" for trainer in trainers]
    logs = [tmp_path / "report" / "logs" / f"{fold.parent.name}_fold_0.log" for fold in folds]
    process = subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: all((fold / "checkpoint_latest.pth").exists() for fold in folds) or process.poll(), 300)
        assert process.poll() is None, process.stdout.read()
        before = [processes_with(log) for log in logs]
        cluster.run("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
        wait_for(lambda: not any(alive(pid) for pids in before for pid in pids), 60)
        assert all(before)
        printed = process.communicate(timeout=400)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    for log, epochs in zip(logs, (6, 4), strict=True):
        text = log.read_text()
        first, second = (line for line in text.splitlines() if line.startswith("### nnUNetv2_train"))
        assert "--c" not in first and second.endswith(" --c"), text
        begun = re.findall(r": Epoch (\d+)\s*$", text, re.MULTILINE)
        assert begun.count("0") == 1 and {*map(int, begun)} == {*range(epochs)} and len(begun) <= epochs + 1, text
        assert not processes_with(log)
    assert (tmp_path / "report" / "report.json").is_file()


def processes_with(file):
    """Processes that write to a file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                targets = [os.readlink(entry / "fd" / str(number)) for number in (1, 2)]
            except OSError:  # gone, or a zombie
                continue
            if str(file) in targets:
                found.append(int(entry.name))
    return found
