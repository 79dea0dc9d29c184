"""Trainings as SLURM jobs, without SLURM: what is refused, what a job does when it is told to stop, how jobs are followed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_training_runs import DATASET, alive, mode, stub, trainings  # noqa: F401 (a fixture)
from train_stub import calls, wait_for

from nnunet_l2g import cli
from nnunet_l2g.compare import slurm_executor
from nnunet_l2g.compare.slurm_executor import TrainingJob, add_arguments, job_name, slurm_options, train_on_slurm
from nnunet_l2g.errors import UserError
from nnunet_l2g.nnunet import Interrupted

submitit = pytest.importorskip("submitit")
JOB = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_training_runs import trainings
from nnunet_l2g.compare.slurm_executor import TrainingJob
folder = Path(sys.argv[1])
TrainingJob(trainings(folder, "0")[0], folder / "report", ["-device", "cpu"])()
"""


def options(text=""):
    """What --slurm-... options ask submitit for."""
    parser = cli.argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(train=True, device="auto")
    return slurm_options(parser.parse_args(["--executor", "slurm", *text.split()]))


CPU = "--slurm-gpus 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--train --slurm-gpus 2 --slurm-time 60", "--slurm-gpus --slurm-time: belongs to --executor slurm"),
        ("--executor slurm", "--executor slurm: says where --train runs"),
        ("--train --executor slurm --slurm-gpus -1", "--slurm-gpus -1: expected 0 or more"),
        ("--train --executor slurm --slurm-memory nan", "--slurm-memory nan: expected 1 or more"),
        ("--train --executor slurm --device cpu --slurm-gpus 1", "--device cpu and --slurm-gpus 1: do not fit together"),
        ("--train --executor slurm --device cuda --slurm-gpus 0", "--device cuda and --slurm-gpus 0: do not fit together"),
        ("--train --executor slurm --slurm-extra qos=", "--slurm-extra qos=: expected an option of sbatch"),
        ("--train --executor slurm", "sbatch, srun, squeue not found on PATH"),
    ],
)
def test_what_does_not_fit_is_one_error_before_anything(stub, tmp_path, monkeypatch, capsys, text, message):  # noqa: F811
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["compare", "-d", DATASET, "-c", "2d", "-tr", "a", "b", "-o", str(tmp_path / "new"), *text.split()]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists() and not calls(stub)


def commands(folder, **scripts):
    """A PATH with stubs of SLURM's commands: name = shell text."""
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue"):
        (folder / name).write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 1')}\n")
        (folder / name).chmod(0o755)
    return str(folder) + os.pathsep + os.environ["PATH"]


def test_the_words_of_sbatch_are_passed_on_and_a_silent_slurm_is_named(stub, tmp_path, monkeypatch):  # noqa: F811
    refusal = "echo 'sbatch: error: Invalid account or account/partition combination' >&2; exit 1"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", sbatch=refusal, squeue="exit 0"))
    with pytest.raises(UserError, match=r"Any, fold 0: sbatch refuses the job: .*Invalid account"):
        train_on_slurm(trainings(tmp_path, "0"), options(), tmp_path / "report")
    monkeypatch.setenv("PATH", commands(tmp_path / "silent"))
    with pytest.raises(UserError, match="squeue does not answer"):
        train_on_slurm(trainings(tmp_path, "0"), options(), tmp_path / "report")


def test_what_sbatch_is_asked_for(stub, tmp_path, monkeypatch):  # noqa: F811
    environment = "echo $SBATCH_ACCOUNT $SLURM_JOB_ID $SLURM_CONF > $(dirname $0)/env"
    sbatch = f"cp $1 $(dirname $0)/sent; {environment}; echo Submitted batch job 17"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", sbatch=sbatch))
    for name, value in (("SBATCH_ACCOUNT", "mine"), ("SLURM_JOB_ID", "5"), ("SLURM_CONF", "/conf")):
        monkeypatch.setenv(name, value)
    (training,) = trainings(tmp_path, "0")
    asked = "--slurm-partition gpu --slurm-gpus 2 --slurm-time 90 --slurm-memory 30.5 --slurm-cpus 12 --slurm-extra account=me "
    assert slurm_executor.submit(training, options(asked + "exclusive"), tmp_path / "report") == "17"
    sent = (tmp_path / "bin" / "sent").read_text()
    for line in (
        "--partition=gpu", "--gpus-per-node=2", "--time=90", "--mem=31232MB", "--cpus-per-task=12", "--signal=USR2@90",
        "--requeue", "--account=me", "--exclusive", "--open-mode=append", f"--job-name={job_name(training)}",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in sent.splitlines()
    assert "--cpus-per-task=12" in next(line for line in sent.splitlines() if line.startswith("srun"))
    assert (tmp_path / "bin" / "env").read_text().split() == ["mine", "/conf"]  # nothing of the job we may be in
    (job,) = (tmp_path / "report" / "slurm" / "17").glob("*submitted.pkl")
    asked = submitit.core.utils.DelayedSubmission.load(job).function.options
    assert asked == ["-device", "cuda", "-num_gpus", "2"]

    names = [job_name(one) for folder in (tmp_path, tmp_path / "other") for one in trainings(folder, "01")]
    assert len(set(names)) == 4 and names[0] == job_name(training)  # of one fold of one nnUNet_results
    slurm_executor.submit(training, options(CPU), tmp_path / "report")
    sent = (tmp_path / "bin" / "sent").read_text()
    assert not any(word in sent for word in ("gpus", "--mem", "cpus-per-task", "partition"))


# a job that is told to stop: submitit's local executor sends the same signals as SLURM


def test_a_preempted_job_is_requeued_and_continues(stub, tmp_path, monkeypatch):  # noqa: F811
    (stub / "seconds").write_text("0.5")
    start, started = submitit.local.local.start_controller, []

    def start_and_hold(*arguments, **keywords):
        """submitit starts a job and makes its folder afterwards: on a busy machine the job looks for it before it is there."""
        started.append(start(*arguments, **keywords))
        os.kill(started[-1].pid, signal.SIGSTOP)
        return started[-1]

    monkeypatch.setattr(submitit.local.local, "start_controller", start_and_hold)
    (training,) = trainings(tmp_path, "0")
    executor = submitit.LocalExecutor(tmp_path / "jobs" / "%j", max_num_timeout=10)
    executor.update_parameters(timeout_min=5)
    job = executor.submit(TrainingJob(training, tmp_path / "report", ["-device", "cpu"]))
    os.kill(started[-1].pid, signal.SIGCONT)
    wait_for(lambda: (training.folder / "checkpoint_latest.pth").exists())
    first = calls(stub)[0]["pid"]
    # the job's number is that of the parent of the process that runs TrainingJob; SLURM signals nnU-Net, too
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    for pid in (first, int(children[0])):
        os.kill(pid, signal.SIGUSR2)
    job.result()
    one, two = calls(stub)
    assert "--c" not in one["argv"] and "--c" in two["argv"] and one["end"] is None and two["end"]
    assert not alive(first) and not trainings(tmp_path, "0")
    log = training.log(tmp_path / "report").read_text()
    assert log.count("Epoch 0\n") == 1 and log.count("Epoch 5\n") == 1 and log.count("### nnUNetv2_train") == 2
    assert "Requeued job" in job.stdout()


def test_after_sigterm_nnunet_is_ended_and_the_job_stays_for_slurm_to_requeue(stub, tmp_path):  # noqa: F811
    mode(stub, 0, "hang")
    argv = [sys.executable, "-W", "ignore", "-c", JOB, tmp_path, Path(__file__).parent, Path(__file__).parents[1]]
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: any("worker" in record for record in calls(stub)))
        nnunet = calls(stub)[0]["pid"]
        for pid in (nnunet, job.pid):
            os.kill(pid, signal.SIGTERM)
        assert "waiting for SLURM" in job.stderr.readline()
        assert not alive(nnunet) and job.poll() is None
    finally:
        job.kill()
        job.communicate()


# waiting for jobs


@pytest.fixture
def cluster_of_none(stub, monkeypatch):  # noqa: F811
    """SLURM played by submitit's local executor; the list holds what was submitted."""
    jobs = []

    auto = submitit.AutoExecutor

    def executor(folder, cluster, slurm_max_num_timeout):
        made = auto(folder, cluster="local", local_max_num_timeout=slurm_max_num_timeout)
        update, plain, names = made.update_parameters, made.submit, []
        made.update_parameters = lambda name, **more: (names.append(name), update(name=name, **more))
        made.submit = lambda function: jobs.append((plain(function), names[-1])) or jobs[-1][0]
        return made

    def live_jobs(attempts):
        return {job.job_id: (name, job.state) for job, name in jobs if job.state == "RUNNING"}

    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    monkeypatch.setattr(slurm_executor, "live_jobs", live_jobs)
    monkeypatch.setattr(slurm_executor, "ASK", 0.1)
    yield jobs
    for job, _ in jobs:
        wait_for(job.done)  # a few quick epochs


def test_jobs_are_followed_and_a_failing_one_is_named_with_its_logs(cluster_of_none, stub, tmp_path, capsys):  # noqa: F811
    mode(stub, 0, "fail")
    with pytest.raises(UserError) as error:
        train_on_slurm(trainings(tmp_path, "01"), options(CPU), tmp_path / "report")
    text, (failed, finished) = str(error.value), [job.job_id for job, _ in cluster_of_none]
    assert f"training Any, fold 0 failed: job {failed} ended" in text and "fold_0 is missing" in text and "fold 1" not in text
    assert "RuntimeError: the stub broke" in text and "nnUNetTrainerAny__nnUNetPlans__2d_fold_0.log" in text
    assert (tmp_path / "report" / "slurm" / failed / f"{failed}_0_log.err").is_file() and f"{failed}_0_log.err" in text
    assert [training.fold for training in trainings(tmp_path, "01")] == ["0"]
    printed = capsys.readouterr().out
    for line in ("submitted", "RUNNING", "ended"):
        assert f"      Any, fold 1: job {finished} {line}\n" in printed
    assert "      Any, fold 1: Epoch 5, train_loss -0.5" in printed


def test_ctrl_c_leaves_the_jobs_and_a_second_call_finds_them(cluster_of_none, stub, tmp_path, capsys):  # noqa: F811
    (stub / "seconds").write_text("0.5")
    latest = trainings(tmp_path, "0")[0].folder / "checkpoint_latest.pth"
    interrupt = threading.Thread(target=lambda: wait_for(latest.exists) and os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(Interrupted):
        train_on_slurm(trainings(tmp_path, "0"), options(CPU), tmp_path / "report")
    interrupt.join()
    ((job, _),) = cluster_of_none
    assert f"`scancel {job.job_id}` ends them" in capsys.readouterr().err and not job.done()
    train_on_slurm(trainings(tmp_path, "0"), options(CPU), tmp_path / "another report")  # the logs stay in the first
    assert len(cluster_of_none) == 1 and not trainings(tmp_path, "0")
    printed = capsys.readouterr().out
    assert f"job {job.job_id} is on the cluster already" in printed
