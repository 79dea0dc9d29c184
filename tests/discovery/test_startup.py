"""Every Python starts, whatever became of us: broken or half-removed packages, unusual variables."""

import os
import shutil
import subprocess
import sys

import pytest
from throwaway import ROOT, Environment

READ = "import os, sys; value = os.environ.get('nnUNet_extTrainer', ''); sys.stdout.buffer.write(os.fsencode(value))"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("startup") / "env")


@pytest.fixture
def environment(shared):
    """An environment with the start-up file and the modules that it imports. A test may damage them."""
    package = shared.site / "nnunet_l2g"
    if package.is_dir():
        shutil.rmtree(package)
    package.unlink(missing_ok=True)
    shutil.copytree(ROOT / "nnunet_l2g" / "_nnunet_ext", package / "_nnunet_ext")
    for name in ("__init__.py", "autoload.py"):
        shutil.copy(ROOT / "nnunet_l2g" / name, package)
    shutil.copy(ROOT / "nnunet_l2g" / "_startup" / "nnunet_l2g.pth", shared.site)
    return shared


def ours(environment) -> str:
    return str(environment.site / "nnunet_l2g" / "_nnunet_ext")


def start(environment, **variables) -> bytes:
    """The variable as a fresh Python sees it, which has to start silently."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet_", "NNUNET_", "PYTHON"))}
    command = [str(environment.python), "-c", READ]
    done = subprocess.run(command, env=kept | variables, cwd=environment.folder, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def a_file_for_the_package(package):
    shutil.rmtree(package)
    package.write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        a_file_for_the_package,
        lambda package: (package / "__init__.py").write_text("raise SystemExit(1)"),
        *(
            lambda package, content=content: (package / "autoload.py").write_bytes(content)
            for content in (b"", b"def append_tr", b"raise SystemExit(3)", b"\0\0", b"append_trainers = 1", b"import gone")
        ),
    ],
)
def test_a_broken_package(environment, damage):
    damage(environment.site / "nnunet_l2g")
    assert start(environment) == b""


@pytest.mark.parametrize(
    "value",
    ["", os.pathsep * 4, "\udcff\udcfe/é", "a\nb", f"/a{os.pathsep}{os.pathsep}/b", "$HOME;`id`"],
    ids=["empty", "separators", "bytes", "newline", "empty part", "shell"],
)
def test_the_variable_keeps_what_it_holds(environment, value):
    found = start(environment, nnUNet_extTrainer=value)
    assert found == os.fsencode(value + (os.pathsep if value else "") + ours(environment))


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["env"], ["demo", "--help"]])
def test_light_commands_import_no_torch(command):
    code = (
        "import sys; from nnunet_l2g.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as error: status = error.code\n"
        "print(status, [name for name in sys.modules if name.split('.')[0] in ('torch', 'nnunetv2', 'numpy', 'matplotlib')])"
    )
    child = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert child.stdout.splitlines()[-1:] == ["0 []"], child.stdout + child.stderr
