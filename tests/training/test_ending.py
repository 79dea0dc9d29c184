"""However a training ends, its workers end with it, and what was saved stays."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from planned import ADAPTED, PLAIN
from small_trainers import make

from nnunet_l2g.training.ending import ending_cleanly

TRAINER = "nnUNetTrainerL2GNet_9epochs_2iterations"
ARGUMENTS = (981, "2d", 0, "-device", "cpu", "-tr", TRAINER)
linux = pytest.mark.skipif(sys.platform != "linux", reason="prctl, tmpfs")


def fold(results):
    return results / PLAIN / f"{TRAINER}__nnUNetPlans__2d" / "fold_0"


def session(number):
    """Living processes of a session."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(number)], capture_output=True, text=True).stdout.split("\n")
    return [int(line.split()[0]) for line in found if line and "Z" not in line.split()[1]]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)
    return value


@linux
@pytest.mark.commands
def test_sigterm_ends_a_real_training_and_all_its_workers(planned, tmp_path):
    child = planned.start("nnUNetv2_train", *ARGUMENTS, nnUNet_results=str(tmp_path))
    wait_for(lambda: (fold(tmp_path) / "checkpoint_latest.pth").exists())
    assert len(session(child.pid)) >= 3  # with workers that load
    os.kill(child.pid, signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 143, output
    wait_for(lambda: not session(child.pid), 10)
    assert torch.load(fold(tmp_path) / "checkpoint_latest.pth", weights_only=False)["current_epoch"] >= 1
    assert not list(fold(tmp_path).glob("*.partial"))


def train_in_small(connection):
    """A process group of its own with two forked workers, that waits."""
    os.setsid()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2)]
    with ending_cleanly(lambda: connection.send("ended")):
        for worker in workers:
            worker.start()
        connection.send("started")
        time.sleep(600)


@linux
@pytest.mark.parametrize(
    ("number", "everybody", "status", "told"),
    [
        (signal.SIGTERM, False, 143, True),
        (signal.SIGTERM, True, 143, True),
        (signal.SIGINT, True, 1, True),
        (signal.SIGKILL, False, -9, False),
    ],
    ids=["SIGTERM", "SIGTERM-to-all", "Ctrl-C", "SIGKILL"],
)
def test_a_signal_ends_all_workers(number, everybody, status, told):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=train_in_small, args=(theirs,))
    child.start()
    assert ours.recv() == "started"
    assert len(session(child.pid)) == 3
    (os.killpg if everybody else os.kill)(child.pid, number)
    child.join(60)
    assert child.exitcode == status and ours.poll() == told
    wait_for(lambda: not session(child.pid), 10)


@linux
def test_a_read_only_results_folder_is_refused_before_anything_is_computed(adapted_folders, tmp_path, monkeypatch):
    results = tmp_path / "disk"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", results], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    monkeypatch.setenv("nnUNet_results", str(results))
    try:
        with pytest.raises(OSError, match=f"Read-only file system: '{results}"):
            make(adapted_folders, "L2GNet", "nnUNetPlans", results)
    finally:
        subprocess.run(["umount", "-l", results], check=True)


def test_a_training_that_fails_ends_its_loaders_at_once(adapted_folders, tmp_path, monkeypatch):
    """While the error is still held, as a notebook does: nothing is left to a destructor."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    before = set(multiprocessing.active_children())
    trainer = make(adapted_folders, "GLUANoTranslation", ADAPTED, tmp_path / "results")
    seen = []

    def fails(batch):
        seen.extend(set(multiprocessing.active_children()) - before)
        raise ValueError("no step")

    monkeypatch.setattr(trainer, "train_step", fails)
    with pytest.raises(ValueError, match="no step") as error:
        trainer.run_training()
    assert len(seen) >= 3 and not set(multiprocessing.active_children()) - before, error


def test_children_that_were_started_but_never_handed_over_are_ended_too():
    """Loaders that were still being made when SIGTERM came."""
    children = []
    with pytest.raises(SystemExit), ending_cleanly(lambda: None):
        children.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True))
        children[0].start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert not children[0].is_alive()


@linux
def test_a_workers_own_children_and_terminate_are_as_usual():
    def work(connection):
        connection.send(subprocess.run(["true"], preexec_fn=lambda: None).returncode)
        connection.send(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

    ours, theirs = multiprocessing.Pipe()
    with ending_cleanly(lambda: None):
        child = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
        child.start()
        assert (ours.recv(), ours.recv()) == (0, True)
        child.join(10)


def test_handlers_of_others_and_of_before_are_left_alone():
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with ending_cleanly(lambda: None):
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="143"), ending_cleanly(lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
