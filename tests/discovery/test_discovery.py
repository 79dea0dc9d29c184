"""Stock nnU-Net finds our trainers, in real environments and fresh processes, and an uninstall leaves nothing behind."""

import importlib.util
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from throwaway import ROOT, TRAINER, Environment

from nnunet_l2g import autoload

EXT_FOLDER = ROOT / "nnunet_l2g" / "_nnunet_ext"
# Look-ups in a fresh process, and in a process that it spawns: a class made on request must arrive there as the same.
LOOK_UP = """
import json, multiprocessing, os, sys

def find(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    return recursive_find_trainer_class_by_name(name)

def in_child(trainer):
    return [find(trainer.__name__) is trainer, os.environ["nnUNet_extTrainer"]]

if __name__ == "__main__":
    found = {name: find(name) for name in sys.argv[2:]}
    report = {name: trainer.__module__ for name, trainer in found.items()}
    if sys.argv[1] == "spawn":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            report["child"] = pool.apply(in_child, (found[sys.argv[2]],))
        report["same"] = all(find(name) is trainer for name, trainer in found.items() if name == sys.argv[2])
    print("REPORT " + json.dumps(report))
"""


def look_up(environment, *names, mode="plain", **variables):
    script = environment.folder / "look_up.py"
    script.write_text(LOOK_UP)
    done = environment.check(script, mode, *names, **variables)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])


# the variable


def test_variable_keeps_the_users_value_first_and_is_idempotent(monkeypatch):
    monkeypatch.delenv("NNUNET_L2G_AUTOLOAD", raising=False)
    monkeypatch.setenv("nnUNet_extTrainer", f"/a{os.pathsep}/b")
    for _ in range(2):
        autoload.append_trainers()
        assert os.environ[autoload.VARIABLE].split(os.pathsep) == ["/a", "/b", autoload.trainers_folder()]
    monkeypatch.delenv("nnUNet_extTrainer")
    autoload.append_trainers()
    assert os.environ[autoload.VARIABLE] == autoload.trainers_folder()
    assert Path(autoload.trainers_folder(), "nnunet_l2g_trainers.py").is_file()


def test_variable_is_left_alone_when_opted_out_or_on_error(monkeypatch, capfd):
    monkeypatch.setenv("nnUNet_extTrainer", "/a")
    monkeypatch.setenv("NNUNET_L2G_AUTOLOAD", "0")
    autoload.append_trainers()
    assert os.environ[autoload.VARIABLE] == "/a"
    monkeypatch.delenv("NNUNET_L2G_AUTOLOAD")
    monkeypatch.setattr(autoload, "with_trainers", lambda value: 1 / 0)
    autoload.append_trainers()
    assert os.environ[autoload.VARIABLE] == "/a"
    assert capfd.readouterr() == ("", "")


def test_both_startup_files_name_the_same_function():
    folder = ROOT / "nnunet_l2g" / "_startup"
    pth, start = (
        [line for line in (folder / f"nnunet_l2g.{suffix}").read_text().splitlines() if not line.startswith("#")]
        for suffix in ("pth", "start")
    )
    assert len(pth) == 1
    assert pth[0].startswith("import ")  # site runs such lines only
    assert "from nnunet_l2g.autoload import append_trainers" in pth[0]
    assert [pkgutil.resolve_name(line) for line in start] == [autoload.append_trainers]


# the folder nnU-Net searches


def import_ext_module(*path, then=""):
    code = f"import sys; sys.path[:0] = {[str(EXT_FOLDER), *map(str, path)]}; import nnunet_l2g_trainers as module; {then}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=path[0] if path else "/", capture_output=True, text=True
    )


def test_ext_folder_holds_one_module_only():
    assert [module.name for module in pkgutil.iter_modules([str(EXT_FOLDER)])] == ["nnunet_l2g_trainers"]


def test_ext_module_is_empty_where_nnunet_l2g_is_missing():
    done = import_ext_module(then=f"print(hasattr(module, '{TRAINER}'), hasattr(module, '{TRAINER}_2epochs'))")
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("problem", ["import no_such_dependency", "raise ModuleNotFoundError('broken', name='x')", "1 / 0"])
def test_ext_module_shows_any_other_error(tmp_path, problem):
    package = tmp_path / "nnunet_l2g"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trainers.py").write_text(problem)
    done = import_ext_module(tmp_path)
    assert done.returncode == 1
    assert "trainers.py" in done.stderr


def test_ext_module_passes_on_trainers_and_requests_and_nothing_else(tmp_path):
    package = tmp_path / "nnunet_l2g"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trainers.py").write_text(
        "import os\nclass nnUNetTrainerA: pass\n"
        "def __getattr__(name):\n"
        "    if name != 'nnUNetTrainerA_2epochs': raise AttributeError(name)\n"
        "    globals()[name] = type(name, (), {})\n"
        "    return globals()[name]\n"
    )
    names = "('nnUNetTrainerA', 'nnUNetTrainerA_2epochs', 'nnUNetTrainerA_myloss', 'os', '__path__')"
    same = "module.nnUNetTrainerA_2epochs is module.nnUNetTrainerA_2epochs"
    done = import_ext_module(tmp_path, then=f"print([hasattr(module, name) for name in {names}], {same})")
    assert done.stdout == "[True, True, False, False, False] True\n", done.stderr


# wheels


def test_wheel_starts_silently_and_imports_only_the_autoload_module(installed):
    code = "import sys; print([name for name in sys.modules if name.startswith(('nnunet', 'torch', 'numpy'))])"
    done = installed.check("-c", code)
    assert done.stdout == "['nnunet_l2g', 'nnunet_l2g.autoload']\n"
    assert done.stderr == ""
    assert installed.variable() == [str(installed.site / "nnunet_l2g" / "_nnunet_ext")]
    assert installed.variable(NNUNET_L2G_AUTOLOAD="0", nnUNet_extTrainer="/a") == ["/a"]


@pytest.mark.slow
def test_wheel_is_found_here_and_in_a_spawned_child_beside_the_users_trainers(installed, user_folder):
    on_request = f"{TRAINER}_2epochs_5iterations"
    ours_first = f"{installed.site / 'nnunet_l2g' / '_nnunet_ext'}{os.pathsep}{user_folder}"
    names = (on_request, TRAINER, "nnUNetTrainerOfMine", f"{TRAINER}_myloss")
    report = look_up(installed, *names, mode="spawn", nnUNet_extTrainer=ours_first)
    assert report[on_request].startswith("nnunet_l2g.trainers")
    assert report[TRAINER].startswith("nnunet_l2g.trainers")
    assert report["nnUNetTrainerOfMine"] == report[f"{TRAINER}_myloss"] == "mine"
    assert report["child"] == [True, ours_first]
    assert report["same"]


def test_wheel_refuses_unregister_and_needs_no_register(installed):
    before = installed.files()
    registered, unregistered = installed.l2g("register"), installed.l2g("unregister")
    assert (registered.returncode, unregistered.returncode) == (0, 1)
    assert "installed from a wheel" in registered.stdout
    assert "NNUNET_L2G_AUTOLOAD=0" in unregistered.stderr
    assert installed.files() == before


def test_wheel_uninstall_leaves_nothing(tmp_path, wheel):
    environment = Environment(tmp_path / "env")
    before = environment.files()
    environment.pip("install", wheel)
    assert {"nnunet_l2g.pth", "nnunet_l2g.start", "nnunet_l2g"} <= environment.files() - before
    assert environment.variable()
    environment.pip("uninstall", "-y", "nnunet-l2g")
    assert environment.files() == before
    assert environment.variable() == []


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_env_line_is_understood_by_sh(installed, tmp_path):
    user = f'{tmp_path}/it\'s "mine" $HOME'
    command = f'eval "$(\'{installed.scripts / "nnunet_l2g"}\' env)" && printf %s "$nnUNet_extTrainer"'
    expected = os.pathsep.join([user, str(installed.site / "nnunet_l2g" / "_nnunet_ext")])
    done = installed.start("sh", "-c", command, nnUNet_extTrainer=user, NNUNET_L2G_AUTOLOAD="0")
    assert (done.stdout, done.stderr) == (expected, "")


# editable installs


def test_editable_registers_unregisters_and_uninstalls_without_a_trace(editable):
    plain, record = editable.files(), next(editable.site.glob("nnunet_l2g-*.dist-info/RECORD"))
    lines = record.read_text()
    assert editable.variable() == []
    done = editable.l2g("register")
    assert done.returncode == 0, done.stderr
    assert "from now on" in done.stdout
    assert editable.files() - plain == {"nnunet_l2g.pth", "nnunet_l2g.start"}
    assert editable.variable() == [str(editable.project / "nnunet_l2g" / "_nnunet_ext")]

    registered = record.read_text()
    assert registered.count("nnunet_l2g.pth,sha256=") == registered.count("nnunet_l2g.start,sha256=") == 1
    assert "Already registered" in editable.l2g("register").stdout
    assert record.read_text() == registered

    assert editable.l2g("unregister").returncode == 0
    assert (editable.files(), record.read_text(), editable.variable()) == (plain, lines, [])
    assert "Nothing to do" in editable.l2g("unregister").stdout

    assert editable.l2g("register").returncode == 0
    editable.pip("uninstall", "-y", "nnunet-l2g")
    assert editable.files() == editable.before
    assert editable.variable() == []


@pytest.mark.long
def test_registered_editable_is_found(editable):
    assert editable.l2g("register").returncode == 0
    report = look_up(editable, TRAINER, f"{TRAINER}_50epochs")
    assert all(module.startswith("nnunet_l2g.trainers") for module in report.values())


@pytest.mark.long
def test_editable_nnunet_and_an_interpreter_without_nnunet_l2g(tmp_path, wheel, user_folder):
    environment = Environment(tmp_path / "env", without=("nnunetv2",))
    checkout = tmp_path / "nnUNet"
    nnunet = Path(importlib.util.find_spec("nnunetv2").origin).parent
    shutil.copytree(nnunet, checkout / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "setup.py").write_text(
        "import setuptools; setuptools.setup(name='nnunetv2', version='2.8.1', packages=['nnunetv2'])"
    )
    backend = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    (checkout / "pyproject.toml").write_text(backend)  # without it an old pip takes its legacy way, which downloads
    environment.pip("install", "-e", checkout)
    assert not (environment.site / "nnunetv2").exists()
    inherited = f"{EXT_FOLDER}{os.pathsep}{user_folder}"  # from another interpreter's process
    assert look_up(environment, "nnUNetTrainerOfMine", nnUNet_extTrainer=inherited) == {"nnUNetTrainerOfMine": "mine"}
    environment.pip("install", wheel)
    assert look_up(environment, TRAINER)[TRAINER].startswith("nnunet_l2g.trainers")
