"""Fixtures shared by test modules."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from planned import PLAIN, RICH, SIZE, SPACING, TARGET, Planned, plan_phantoms
from throwaway import USER_TRAINERS, Environment, copy_project

from nnunet_l2g.cli import main
from nnunet_l2g.phantom import write_dataset

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set by a shell script that started the suite in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # child processes would inherit it, and Ctrl-C is tested

# There are as many test processes as cores, and nnU-Net's own processes besides: more threads would only wait for each other,
# some of oneDNN's at full speed. OMP_THREAD_LIMIT is not used because oneDNN then waits for threads that are never started.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "one_thread"), os.environ.get("PYTHONPATH")))
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built once."""
    folder = tmp_path_factory.mktemp("wheel")
    project = copy_project(folder / "project")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, project]
    subprocess.run(list(map(str, command)), check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory, wheel):
    """An environment with the wheel, for tests that do not change it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "env")
    environment.pip("install", wheel)
    return environment


@pytest.fixture
def editable(tmp_path):
    """An environment with an editable install of a copy of the project, not registered; `before`: its files before that."""
    environment = Environment(tmp_path / "env")
    environment.before = environment.files()
    environment.project = copy_project(tmp_path / "project")
    environment.pip("install", "-e", environment.project)
    return environment


@pytest.fixture
def user_folder(tmp_path):
    folder = tmp_path / "trainers of a user"
    folder.mkdir()
    (folder / "mine.py").write_text(USER_TRAINERS)
    return folder


@pytest.fixture(scope="session")
def planned(tmp_path_factory, worker_id):
    """Two phantom datasets, planned and preprocessed for 3d_fullres and 2d. Made once, and copied for each test process."""
    folder = tmp_path_factory.mktemp("nnunet")
    if worker_id == "master":
        return plan_phantoms(folder)
    shared = tmp_path_factory.getbasetemp().parent / "planned"  # of all test processes of this run
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            partial = shared.with_name("planned.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            plan_phantoms(partial)
            partial.rename(shared)
    shutil.copytree(shared, folder, dirs_exist_ok=True)
    return Planned(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Without nnU-Net's figure of progress, which takes longer than the epochs of a test."""
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png", lambda *_: None)


@pytest.fixture
def threads_for_processes(monkeypatch):
    """Threads instead of the two pools of processes of nnU-Net's validation, each of which imports torch for ten seconds."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: SimpleNamespace(Pool=ThreadPool))


@pytest.fixture
def nnunet_folders(planned, undrawn, monkeypatch, tmp_path):
    """Sets nnU-Net's variables in this process: the planned data, and a results folder of this test."""
    for name, value in planned.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    return planned


@pytest.fixture(scope="session")
def adapted(planned, tmp_path_factory):
    """Cine phantoms with labels, adapted to late enhancement phantoms without labels."""
    project = Planned(tmp_path_factory.mktemp("adapted"))
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, PLAIN), project.path(kind, PLAIN))
    shutil.copytree(planned.path("preprocessed", RICH), project.path("preprocessed", RICH))
    write_dataset(project.path("raw"), 5, 2, "late_enhancement", seed=7, dataset_id=983, name="Late", size=SIZE,
                  spacing=SPACING)  # fmt: skip
    shutil.rmtree(project.path("raw", TARGET, "labelsTr"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in project.variables.items():
            patch.setenv(name, value)
        assert main(["adapt", "-s", "981", "-t", "983", "-c", "2d", "3d_fullres", "-np", "1"]) == 0
    return project


@pytest.fixture
def adapted_folders(adapted, undrawn, monkeypatch, tmp_path):
    """Sets nnU-Net's variables for `adapted`, with loaders without workers, a results folder of this test, and no figures."""
    for module in ("nnunet_l2g.training.stages", "nnunet_l2g.trainers.base"):
        monkeypatch.setattr(f"{module}.draw_diagnostics", lambda *_: None)
    for name, value in adapted.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return adapted


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source and a target made of names alone, with nnU-Net's variables set."""
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    from small_source import write_small_source  # it imports torch

    return write_small_source(tmp_path)
