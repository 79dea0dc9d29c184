"""Fixtures shared by test modules."""

import subprocess
import sys

import pytest
from planned import SIZE, SPACING, Planned
from throwaway import USER_TRAINERS, Environment, copy_project

from nnunet_l2g.phantom import write_dataset


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
    """An environment with the wheel, for tests that change nothing in it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "env")
    environment.pip("install", wheel)
    return environment


@pytest.fixture
def editable(tmp_path):
    """An environment with an editable install of a copy of the project, not registered, and its files before."""
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
def planned(tmp_path_factory):
    """Two phantom datasets, planned and preprocessed for 3d_fullres and 2d."""
    project = Planned(tmp_path_factory.mktemp("nnunet"))
    for kind in ("raw", "preprocessed", "results"):
        project.path(kind).mkdir()
    write_dataset(project.path("raw"), 6, 2, dataset_id=981, name="PhantomPlain", size=SIZE, spacing=SPACING)
    write_dataset(
        project.path("raw"), 5, 1, ("cine", "late_enhancement"), True, dataset_id=982, name="PhantomRich", size=SIZE,
        spacing=SPACING, regions=True, ignore_label=True,
    )  # fmt: skip
    project.run("nnUNetv2_plan_and_preprocess", "-d", 981, 982, "-c", "3d_fullres", "2d", "-np", 2)
    return project


@pytest.fixture
def nnunet_folders(planned, monkeypatch, tmp_path):
    """nnU-Net's variables in this process: planned data, results of this test's own."""
    for name, value in planned.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    return planned
