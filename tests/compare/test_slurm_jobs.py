"""Trainings as SLURM jobs, without SLURM: what is refused, what a job does when it is told to stop, how jobs are followed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from planned import PLAIN
from test_training_runs import alive, folds_of, mode, stub, trainings  # noqa: F401 (a fixture)
from train_stub import calls

from nnunet_l2g import cli
from nnunet_l2g.compare import slurm_runs
from nnunet_l2g.compare.slurm_runs import FoldJob, SlurmOptions, job_name, train_on_slurm
from nnunet_l2g.errors import UserError
from nnunet_l2g.processes import Interrupted

submitit = pytest.importorskip("submitit")
JOB = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_training_runs import trainings
from nnunet_l2g.compare.slurm_runs import FoldJob
FoldJob(trainings(Path(sys.argv[2]), "0")[0], {}, 60)()
"""


def wait_for(condition, seconds=60, what="it"):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return value


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train --slurm-gpus 2 --slurm-time 60", "--slurm-gpus --slurm-time: belongs to --executor slurm"),
        ("--executor slurm", "--executor slurm: says where --train runs"),
        ("--train --executor slurm --slurm-gpus -1", "--slurm-gpus -1: expected 0 or more"),
        ("--train --executor slurm --slurm-time 4", "--slurm-time 4: expected 5 or more"),
        ("--train --executor slurm --slurm-cpus 0", "--slurm-cpus 0: expected 1 or more"),
        ("--train --executor slurm --slurm-memory nan", "--slurm-memory nan: expected a number of GB above 0"),
        ("--train --executor slurm --device cpu --slurm-gpus 1", "--device cpu and --slurm-gpus 1: leave one of them out"),
        ("--train --executor slurm --device cuda --slurm-gpus 0", "use --device cpu"),
        ("--train --executor slurm --slurm-extra qos=", "--slurm-extra qos=: expected an option of sbatch"),
        ("--train --executor slurm --slurm-extra --qos=x", "expected at least one argument"),
        ("--train --executor slurm --slurm-extra time=5", "--slurm-extra time=5: nnunet_l2g sets time itself"),
        ("--train --executor slurm --slurm-extra no-requeue", "nnunet_l2g sets no-requeue itself"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, options, message):
    command = f"compare -d 1 -c 2d -tr a b -o {tmp_path / 'report'} {options}"
    try:
        assert cli.main(command.split()) == 1
    except SystemExit as stop:  # argparse's own
        assert stop.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_no_slurm_is_one_clear_error_before_anything(stub, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "nnUNet_results" / PLAIN).mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--train", "--executor", "slurm", "-o", str(tmp_path / "new")]
    assert cli.main(["compare", "-d", "981", "-c", "2d", "-tr", "nnUNetTrainer", "nnUNetTrainerL2GNet", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--executor local" in error
    assert "sbatch, srun, squeue not found on PATH" in error
    assert not (tmp_path / "new").exists() and not calls(stub)


def commands(folder, **scripts):
    """A PATH with stubs of SLURM's commands: name = shell text."""
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue"):
        (folder / name).write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 1')}\n")
        (folder / name).chmod(0o755)
    return str(folder) + os.pathsep + os.environ["PATH"]


def test_the_words_of_sbatch_are_passed_on(stub, tmp_path, monkeypatch):  # noqa: F811
    refusal = "echo 'sbatch: error: Invalid account or account/partition combination' >&2; exit 1"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", sbatch=refusal, squeue="exit 0"))
    with pytest.raises(UserError, match=r"Any, fold 0: sbatch refuses the job: .*Invalid account"):
        train_on_slurm(trainings(tmp_path, "0"), SlurmOptions(), tmp_path / "report")


def test_what_sbatch_is_asked_for(stub, tmp_path, monkeypatch):  # noqa: F811
    environment = "echo $SBATCH_ACCOUNT $SLURM_JOB_ID $SLURM_CONF > $(dirname $0)/env"
    sbatch = f"cp $1 $(dirname $0)/sent; {environment}; echo Submitted batch job 17"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", sbatch=sbatch))
    for name, value in (("SBATCH_ACCOUNT", "mine"), ("SLURM_JOB_ID", "5"), ("SLURM_CONF", "/conf")):
        monkeypatch.setenv(name, value)
    (training,) = trainings(tmp_path, "0", "cuda", gpus=2)
    options = SlurmOptions("gpu", 2, 90, 30.5, 12, {"account": "a b", "exclusive": True})
    assert slurm_runs.submit(training, options, tmp_path / "jobs") == "17"
    sent = (tmp_path / "bin" / "sent").read_text()
    lines = sent.splitlines()
    for line in (
        "--partition=gpu", "--gpus-per-node=2", "--time=90", "--mem=31232M", "--cpus-per-task=12", "--signal=USR2@90",
        "--requeue", "--account='a b'", "--exclusive", "--open-mode=append", f"--job-name={job_name(training)}",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    assert "--cpus-per-task=12" in next(line for line in lines if line.startswith("srun"))
    assert (tmp_path / "bin" / "env").read_text().split() == ["mine", "/conf"]  # nothing of the job we may be in
    assert os.environ["SLURM_JOB_ID"] == "5"

    slurm_runs.submit(training, SlurmOptions(gpus=0), tmp_path / "jobs")
    sent = (tmp_path / "bin" / "sent").read_text()
    assert not any(word in sent for word in ("gpus", "--mem", "cpus-per-task", "partition"))


def test_a_job_name_belongs_to_one_fold_of_one_results_folder(stub, tmp_path):  # noqa: F811
    names = [job_name(training) for training in trainings(tmp_path, "01")]
    assert len({*names, job_name(trainings(tmp_path / "other", "0")[0])}) == 3
    elsewhere = trainings(tmp_path, "0")[0]
    object.__setattr__(elsewhere, "output", Path("another report"))
    assert job_name(elsewhere) == names[0] and names[0].startswith("nnUNetTrainerAny__nnUNetPlans__2d__fold_0__")


# a job that is told to stop, without SLURM: submitit's local executor sends the same signals


@pytest.fixture
def local(stub, tmp_path, monkeypatch):  # noqa: F811
    """Submits a FoldJob for fold 0, as SLURM would run it."""
    (stub / "seconds").write_text("0.5")
    start, started = submitit.local.local.start_controller, []

    def start_and_hold(*arguments, **keywords):
        """submitit starts a job and makes its folder afterwards: on a busy machine the job looks for it before it is there."""
        started.append(start(*arguments, **keywords))
        os.kill(started[-1].pid, signal.SIGSTOP)
        return started[-1]

    monkeypatch.setattr(submitit.local.local, "start_controller", start_and_hold)

    def submit(minutes=60.0):
        executor = submitit.LocalExecutor(tmp_path / "jobs" / "%j", max_num_timeout=10_000)
        executor.update_parameters(timeout_min=5)
        job = executor.submit(FoldJob(trainings(tmp_path, "0")[0], {}, minutes))
        os.kill(started[-1].pid, signal.SIGCONT)
        return job

    return submit


def interrupt(job):
    """What SLURM sends before the time limit, to the process that runs FoldJob (the job's number is that of its parent)."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(children[0]), slurm_runs.stop_signal())


def test_a_preempted_job_is_requeued_and_continues(stub, local, tmp_path):  # noqa: F811
    (training,) = trainings(tmp_path, "0")
    job = local()
    wait_for(lambda: (training.folder / "checkpoint_latest.pth").exists())
    first = calls(stub)[0]["pid"]
    interrupt(job)
    job.result()
    one, two = calls(stub)
    assert "--c" not in one["argv"] and two["argv"][-1] == "--c" and one["end"] is None and two["end"]
    assert not alive(first) and not trainings(tmp_path, "0")
    log = training.log.read_text()
    assert log.count("Epoch 0\n") == 1 and log.count("Epoch 5\n") == 1 and log.count("### nnUNetv2_train") == 2
    assert "Requeued job" in job.stdout()


def test_a_time_limit_without_progress_is_an_error_and_not_a_loop(stub, local, tmp_path):  # noqa: F811
    mode(stub, 0, "slow")
    job = local(minutes=0.001)
    wait_for(lambda: any("slow" in record for record in calls(stub)))
    pid = calls(stub)[0]["pid"]
    interrupt(job)
    assert "checkpoint function returned None" in str(job.exception())
    assert "No checkpoint of" in job.stderr() and "--slurm-time" in job.stderr()
    assert len(calls(stub)) == 1 and not alive(pid)


def test_a_failing_training_fails_its_job(stub, local, tmp_path):  # noqa: F811
    mode(stub, 0, "fail")
    assert "RuntimeError: the stub broke" in str(local().exception())


def test_after_sigterm_nnunet_is_ended_and_the_job_stays_for_slurm_to_requeue(stub, tmp_path):  # noqa: F811
    mode(stub, 0, "slow")
    argv = [sys.executable, "-c", JOB, str(Path(__file__).parent), str(tmp_path)]
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: any("slow" in record for record in calls(stub)))
        nnunet = calls(stub)[0]["pid"]
        for pid in (nnunet, job.pid):  # SLURM signals every process
            os.kill(pid, signal.SIGTERM)
        assert "waiting for SLURM" in job.stderr.readline()
        assert not alive(nnunet) and job.poll() is None
    finally:
        job.kill()
        job.communicate()


# waiting for jobs


@pytest.fixture
def cluster_of_none(stub, tmp_path, monkeypatch):  # noqa: F811
    """SLURM played by submitit's local executor; the list holds what was submitted."""
    jobs = []

    def executor(folder, training, options):
        made = submitit.LocalExecutor(folder / "%j", max_num_timeout=10)
        made.update_parameters(timeout_min=5)
        plain = made.submit
        made.submit = lambda function: jobs.append((plain(function), job_name(training))) or jobs[-1][0]
        return made

    def states():
        state = {"RUNNING": "RUNNING", "FINISHED": "COMPLETED"}
        return {job.job_id: (state.get(job.state, "FAILED"), "None", name) for job, name in jobs}

    monkeypatch.setattr(slurm_runs, "open_executor", executor)
    monkeypatch.setattr(slurm_runs, "job_states", states)
    monkeypatch.setattr(slurm_runs, "ASK", 0.1)
    yield jobs
    for job, _ in jobs:
        wait_for(job.done)  # a few quick epochs


def test_jobs_are_followed_to_their_end(cluster_of_none, stub, tmp_path, capsys):  # noqa: F811
    train_on_slurm(trainings(tmp_path, "01"), SlurmOptions(gpus=0), tmp_path / "report")
    assert not trainings(tmp_path, "01") and sorted(folds_of(calls(stub))) == ["0", "1"]
    printed = capsys.readouterr().out
    for fold, (job, _) in zip("01", cluster_of_none, strict=True):
        assert f"Any, fold {fold}: job {job.job_id} submitted" in printed
        assert f"Any, fold {fold}: job {job.job_id} COMPLETED" in printed
        assert f"Any, fold {fold}: epoch 5: train_loss -0.5" in printed


def test_a_failing_job_is_named_with_its_logs_and_the_others_go_on(cluster_of_none, stub, tmp_path):  # noqa: F811
    mode(stub, 0, "fail")
    with pytest.raises(UserError) as error:
        train_on_slurm(trainings(tmp_path, "01"), SlurmOptions(gpus=0), tmp_path / "report")
    text, job_id = str(error.value), cluster_of_none[0][0].job_id
    assert f"training Any, fold 0 failed: job {job_id} ended" in text and "fold_0 is missing" in text and "fold 1" not in text
    assert "RuntimeError: the stub broke" in text and "nnUNetTrainerAny__nnUNetPlans__2d_fold_0.log" in text
    assert (tmp_path / "report" / "slurm" / job_id / f"{job_id}_0_log.err").is_file() and f"{job_id}_0_log.err" in text
    assert [training.fold for training in trainings(tmp_path, "01")] == ["0"]


def test_ctrl_c_leaves_the_jobs_and_a_second_call_finds_them(cluster_of_none, stub, tmp_path, capsys):  # noqa: F811
    (stub / "seconds").write_text("0.3")
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Interrupted):
        train_on_slurm(trainings(tmp_path, "0"), SlurmOptions(gpus=0), tmp_path / "report")
    ((job, _),) = cluster_of_none
    assert f"`scancel {job.job_id}` ends them" in capsys.readouterr().err and not job.done()
    train_on_slurm(trainings(tmp_path, "0"), SlurmOptions(gpus=0), tmp_path / "another report")  # the logs stay in the first
    assert len(cluster_of_none) == 1 and not trainings(tmp_path, "0")
    printed = capsys.readouterr().out
    assert f"job {job.job_id} is on the cluster already" in printed and "epoch 5: train_loss" in printed


def test_a_controller_that_falls_silent(cluster_of_none, stub, tmp_path, monkeypatch, capsys):  # noqa: F811
    states, answers = slurm_runs.job_states, iter([{}, None, None])
    monkeypatch.setattr(slurm_runs, "job_states", lambda: next(answers, states()))
    train_on_slurm(trainings(tmp_path, "0"), SlurmOptions(gpus=0), tmp_path / "report")
    assert capsys.readouterr().err.count("squeue does not answer; asking again") == 1
    monkeypatch.setattr(slurm_runs, "job_states", lambda: None)
    with pytest.raises(UserError, match="squeue does not answer; is SLURM up"):
        train_on_slurm([], SlurmOptions(), tmp_path / "report")
    answers = iter([{}])
    monkeypatch.setattr(slurm_runs, "job_states", lambda: next(answers, None))
    monkeypatch.setattr(slurm_runs, "SILENT", 3)
    with pytest.raises(UserError, match="does not answer any more; the jobs may go on"):
        train_on_slurm(trainings(tmp_path, "1"), SlurmOptions(gpus=0), tmp_path / "report")
