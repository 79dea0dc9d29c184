"""Every Python starts, whatever became of us: half-removed packages, hostile variables and folders, read-only site-packages."""

import os
import shutil
import subprocess
import sys

import pytest
from throwaway import ROOT, Environment

STARTUP = ROOT / "nnunet_l2g" / "_startup" / "nnunet_l2g.pth"
READ = "import os, sys; value = os.environ.get('nnUNet_extTrainer', ''); sys.stdout.buffer.write(os.fsencode(value))"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("startup") / "env")


@pytest.fixture
def environment(shared):
    """An environment with the start-up file and what Python starts of the package; a test may spoil it."""
    package = shared.site / "nnunet_l2g"
    package.mkdir()
    for name in ("__init__.py", "autoload.py"):
        shutil.copy(ROOT / "nnunet_l2g" / name, package)
    shutil.copytree(ROOT / "nnunet_l2g" / "_nnunet_ext", package / "_nnunet_ext")
    shutil.copy(STARTUP, shared.site)
    yield shared
    shutil.rmtree(package)
    (shared.site / STARTUP.name).unlink()


def ours(environment) -> str:
    return str(environment.site / "nnunet_l2g" / "_nnunet_ext")


def start(environment, cwd=None, **variables) -> bytes:
    """The variable as a fresh Python sees it, which has to start silently."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet_", "NNUNET_", "PYTHON"))}
    done = subprocess.run(
        [str(environment.python), "-c", READ], env=inherited | variables, cwd=cwd or environment.folder, capture_output=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_what_the_others_are_compared_with(environment):
    assert start(environment).decode() == ours(environment)


@pytest.mark.parametrize(
    "content",
    [b"", b"def append_tr", b"raise SystemExit(3)", b"raise RuntimeError", b"\0\0\0", b"\xff\xfe", b"append_trainers = 1",
     b"def append_trainers(): raise SystemExit('no')", b"import a_module_that_is_gone"],
)  # fmt: skip
def test_a_broken_autoload_module(environment, content):
    (environment.site / "nnunet_l2g" / "autoload.py").write_bytes(content)
    assert start(environment) == b""


@pytest.mark.parametrize("left", ["nothing", "a folder", "a file for the package", "a broken package"])
def test_remains_of_a_package(environment, left):
    package = environment.site / "nnunet_l2g"
    if left == "a folder":
        (package / "autoload.py").unlink()
        (package / "autoload.py").mkdir()
    elif left == "a broken package":
        (package / "__init__.py").write_text("raise SystemExit(1)")
    else:
        shutil.rmtree(package)
        if left == "a file for the package":
            package.write_text("")
    try:
        assert start(environment) == b""
    finally:
        if package.is_file():
            package.unlink()
        package.mkdir(exist_ok=True)


def test_a_folder_of_trainers_that_is_gone_is_named_and_hurts_nobody(environment):
    """nnU-Net skips folders that do not exist."""
    shutil.rmtree(ours(environment))
    assert start(environment).decode() == ours(environment)


@pytest.mark.parametrize(
    "value",
    [os.pathsep * 4, "\udcff\udcfe/é", "x" * 100_000, "a\nb", "relative", " ", f"/a{os.pathsep}{os.pathsep}/b", "$HOME;`id`"],
    ids=["separators", "bytes", "long", "newline", "relative", "blank", "empty part", "shell"],
)
def test_a_hostile_variable_keeps_what_it_holds(environment, value):
    found = start(environment, nnUNet_extTrainer=value)
    assert found == os.fsencode(value) + os.fsencode(os.pathsep + ours(environment))


def test_our_folder_is_named_once_more_by_nobody(environment):
    value = os.pathsep.join([ours(environment), "/a", ours(environment)])
    assert start(environment, nnUNet_extTrainer=value).decode() == value


def test_modules_of_our_and_pythons_names_in_the_current_folder(environment, tmp_path):
    """Start-up comes before the current folder is searched; from PYTHONPATH such a module hides the package, and may end."""
    for name in ("nnunet_l2g", "os", "site"):
        (tmp_path / f"{name}.py").write_text(f"open('ran_{name}', 'w'); raise SystemExit(7)")
    assert start(environment, cwd=tmp_path, HOME=str(tmp_path / "nowhere")).decode() == ours(environment)
    assert not list(tmp_path.glob("ran_*"))
    (tmp_path / "os.py").unlink()
    (tmp_path / "site.py").unlink()
    assert start(environment, cwd=environment.folder, PYTHONPATH=str(tmp_path)) == b""


# site-packages that cannot be written


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_read_only_site_packages_is_one_clear_line(editable):
    """In a mount namespace of its own, since root may write anywhere else."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && touch "$0/probe" 2>/dev/null || exec "$@"'
    probe = subprocess.run(["unshare", "-m", "sh", "-c", 'mount --bind "$0" "$0"', str(editable.site)], capture_output=True)
    if probe.returncode:
        pytest.skip("no mount namespaces here")
    before = editable.files()
    command = editable.scripts / "nnunet_l2g"
    for verb, words in (("register", "cannot write nnunet_l2g.pth, nnunet_l2g.start to"), ("unregister", "Nothing to do")):
        done = editable.start("unshare", "-m", "sh", "-c", script, editable.site, command, verb)
        printed = done.stdout + done.stderr
        assert words in printed and str(editable.site) in printed and printed.count("\n") == 1, printed
        assert done.returncode == (1 if verb == "register" else 0)
    assert editable.files() == before

    assert editable.l2g("register").returncode == 0
    registered = editable.files()
    done = editable.start("unshare", "-m", "sh", "-c", script, editable.site, command, "unregister")
    assert done.returncode == 1 and "cannot change" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert editable.files() == registered and editable.variable()


# commands that have to be quick


@pytest.mark.parametrize("command", ["--help", "--version", "env", "register", "unregister"])
def test_light_commands_import_no_torch(tmp_path, command):
    """Not installed anywhere, so that `register` finds nothing to write."""
    (tmp_path / "nnunet_l2g").symlink_to(ROOT / "nnunet_l2g")
    code = (
        "import sys; from nnunet_l2g.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as error: status = error.code\n"
        "print(status, [name for name in sys.modules if name.split('.')[0] in ('torch', 'nnunetv2', 'numpy')])"
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", code, command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    status = 1 if "register" in command else 0
    assert child.stdout.splitlines()[-1:] == [f"{status} []"], child.stdout + child.stderr
    assert not any(path.suffix in (".pth", ".start") for path in tmp_path.iterdir())
