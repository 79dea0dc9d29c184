"""Trainings as jobs of a real SLURM of one node, started for these tests (tests/slurm_cluster.py)."""

import threading

import pytest
import slurm_cluster
from test_slurm_jobs import options
from test_training_runs import alive, mode, stub, trainings  # noqa: F401 (a fixture)
from train_stub import calls, wait_for

from nnunet_l2g.compare import slurm_executor
from nnunet_l2g.compare.slurm_executor import check_slurm, job_name, train_on_slurm
from nnunet_l2g.errors import UserError

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=f"no SLURM to start: {slurm_cluster.why_not()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture
def on_cluster(cluster, stub, monkeypatch):  # noqa: F811
    """The cluster for this process, and nnUNetv2_train as the stub."""
    monkeypatch.setenv("SLURM_CONF", cluster.conf)
    monkeypatch.setattr(slurm_executor, "ASK", 0.5)
    yield cluster
    cluster.run("scancel", "--user=root", "--signal=KILL", check=False)
    cluster.run("scancel", "--user=root", check=False)


def later(condition, action):
    """Runs `action` in a thread as soon as the condition holds."""
    thread = threading.Thread(target=lambda: (wait_for(condition), action()))
    thread.start()
    return thread


def train(folder, folds, asked):
    train_on_slurm(trainings(folder, folds), options(asked), folder / "report")


def test_folds_run_at_the_same_time_each_with_its_gpus(on_cluster, stub, tmp_path, capsys):  # noqa: F811
    for fold in "01":
        mode(stub, fold, "meet")
    check_slurm()
    train(tmp_path, "01", "--slurm-partition low --slurm-time 5 --slurm-cpus 1")
    assert not trainings(tmp_path, "01") and capsys.readouterr().out.count(" ended\n") == 2
    assert sorted(record["cuda"] for record in calls(stub)) == ["0", "1"]
    train(tmp_path, "2", "--slurm-gpus 2")
    last = calls(stub)[-1]
    assert last["cuda"] == "0,1" and last["argv"][-2:] == ["-num_gpus", "2"]


def test_jobs_that_fail_are_cancelled_or_refused(on_cluster, stub, tmp_path):  # noqa: F811
    for asked, message in (("--slurm-partition nowhere", "invalid partition"), ("--slurm-memory 500", "emory")):
        with pytest.raises(UserError, match=rf"sbatch refuses the job: (.|\n)*{message}"):
            train(tmp_path, "2", asked)
    mode(stub, 0, "fail")
    mode(stub, 1, "hang")
    name = job_name(trainings(tmp_path, "1")[0])
    hangs = lambda: any("worker" in record for record in calls(stub))  # noqa: E731
    thread = later(hangs, lambda: on_cluster.run("scancel", f"--name={name}"))
    with pytest.raises(UserError) as error:
        train(tmp_path, "01", "--slurm-gpus 0 --slurm-cpus 1")
    thread.join()
    text = str(error.value)
    assert "fold 0 failed: job" in text and "RuntimeError: the stub broke" in text
    assert "fold 1 failed: job" in text and "CANCELLED" in text
    wait_for(lambda: not any(alive(record["pid"]) for record in calls(stub)))


def test_a_signal_and_a_preemption_requeue_the_job_and_each_time_the_training_continues(on_cluster, stub, tmp_path):  # noqa: F811
    (stub / "seconds").write_text("3")
    (training,) = trainings(tmp_path, "0")
    log = training.log(tmp_path / "report")

    def reached(epoch):
        return lambda: log.is_file() and f"Epoch {epoch}\n" in log.read_text()

    def signal_and_preempt():
        number = on_cluster.run("squeue", "--noheader", "--format=%i", f"--name={job_name(training)}").strip()
        on_cluster.run("scancel", "--signal=USR2", number)  # SLURM does so before the time limit
        wait_for(reached(3))
        on_cluster.run("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")

    thread = later(reached(1), signal_and_preempt)
    train(tmp_path, "0", "--slurm-partition low --slurm-gpus 0 --slurm-time 30 --slurm-cpus 2")
    thread.join()
    records = calls(stub)
    assert ["--c" in record["argv"] for record in records] == [False, True, True]
    assert [record["end"] is None for record in records] == [True, True, False]
    assert not any(alive(record["pid"]) for record in records)
    text = log.read_text()
    assert text.count("Epoch 0\n") == 1 and all(text.count(f"Epoch {epoch}\n") in (1, 2) for epoch in range(1, 6))
    (errors,) = (tmp_path / "report" / "slurm").glob("*/*_0_log.err")
    assert "Caught signal SIGUSR2" in errors.read_text() and "DUE TO PREEMPTION" in errors.read_text()
