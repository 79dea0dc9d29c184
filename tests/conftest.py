"""Fixtures shared by test modules."""

import subprocess
import sys

import pytest
from throwaway import USER_TRAINERS, Environment, copy_project


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
