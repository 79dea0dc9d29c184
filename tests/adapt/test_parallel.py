"""Worker processes of `run_parallel`: each item once, and no worker left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_l2g.errors import UserError
from nnunet_l2g.parallel import run_parallel

SLEEPING = "import time; from nnunet_l2g.parallel import run_parallel; list(run_parallel(time.sleep, [60, 60], 2, 'x'))"


@pytest.mark.parametrize("processes", [1, 2])
def test_each_item_is_done_once(processes):
    assert sorted(run_parallel(abs, [-3, -1, -2], processes, "title")) == [1, 2, 3]


def test_a_killed_worker_is_one_error():
    with pytest.raises(UserError, match=r"title: a worker process was killed.* fewer processes than -np 2"):
        list(run_parallel(os._exit, [1, 1, 1], 2, "title"))


def is_running(process: Path) -> bool:
    try:
        return ") Z" not in (process / "stat").read_text()  # a zombie has ended
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_workers_end_with_a_killed_parent():
    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    child = subprocess.Popen([sys.executable, "-c", SLEEPING], stderr=subprocess.DEVNULL)
    listed = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    wait_for(lambda: len(listed.read_text().split()) >= 3)  # two workers and Python's resource tracker
    workers = [Path("/proc", pid) for pid in listed.read_text().split()]
    child.kill()
    child.wait()
    wait_for(lambda: not any(is_running(worker) for worker in workers))
