"""Stock nnU-Net finds our trainers, in real environments and fresh processes, and an uninstall leaves nothing behind."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys

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
    found = {name: find(name) for name in sys.argv[1:]}
    report = {name: trainer.__module__ for name, trainer in found.items()}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report["child"] = pool.apply(in_child, (found[sys.argv[1]],))
    report["same"] = find(sys.argv[1]) is found[sys.argv[1]]
    print("REPORT " + json.dumps(report))
"""


def look_up(environment, *names, **variables):
    script = environment.folder / "look_up.py"
    script.write_text(LOOK_UP)
    done = environment.check(script, *names, **variables)
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


# the folder that nnU-Net searches


def import_ext_module(*path, then=""):
    code = f"import sys; sys.path[:0] = {[str(EXT_FOLDER), *map(str, path)]}; import nnunet_l2g_trainers as module; {then}"
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, cwd=path[0] if path else "/", capture_output=True, text=True)


def test_ext_module_is_alone_and_empty_where_nnunet_l2g_is_missing():
    assert [module.name for module in pkgutil.iter_modules([str(EXT_FOLDER)])] == ["nnunet_l2g_trainers"]
    done = import_ext_module(then=f"print(hasattr(module, '{TRAINER}'), hasattr(module, '{TRAINER}_2epochs'))")
    assert done.stdout == "False False\n", done.stderr


def package_with_trainers(folder, content):
    (folder / "nnunet_l2g").mkdir()
    (folder / "nnunet_l2g" / "__init__.py").touch()
    (folder / "nnunet_l2g" / "trainers.py").write_text(content)


@pytest.mark.parametrize("problem", ["import no_such_dependency", "raise ModuleNotFoundError('broken', name='x')", "1 / 0"])
def test_ext_module_shows_any_other_error(tmp_path, problem):
    package_with_trainers(tmp_path, problem)
    done = import_ext_module(tmp_path)
    assert done.returncode == 1
    assert "trainers.py" in done.stderr


def test_ext_module_passes_on_trainers_and_requests_and_nothing_else(tmp_path):
    package_with_trainers(
        tmp_path,
        "import os\nclass nnUNetTrainerA: pass\n"
        "def __getattr__(name):\n"
        "    if name != 'nnUNetTrainerA_2epochs': raise AttributeError(name)\n"
        "    globals()[name] = type(name, (), {})\n"
        "    return globals()[name]\n",
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
    report = look_up(installed, *names, nnUNet_extTrainer=ours_first)
    assert report[on_request].startswith("nnunet_l2g.trainers")
    assert report[TRAINER].startswith("nnunet_l2g.trainers")
    assert report["nnUNetTrainerOfMine"] == report[f"{TRAINER}_myloss"] == "mine"
    assert report["child"] == [True, ours_first]
    assert report["same"]


def test_wheel_uninstall_leaves_nothing(tmp_path, wheel):
    environment = Environment(tmp_path / "env")
    before = environment.files()
    environment.pip("install", wheel)
    assert {"nnunet_l2g.pth", "nnunet_l2g.start", "nnunet_l2g/py.typed"} <= environment.files() - before
    assert environment.variable()
    environment.pip("uninstall", "-y", "nnunet-l2g")
    assert environment.files() == before
    assert environment.variable() == []


def env_line(environment, then, **variables):
    """Output of `then` in a shell after the line that `nnunet_l2g env` prints."""
    command = f"eval \"$('{environment.scripts / 'nnunet_l2g'}' env)\" && {then}"
    done = environment.start("sh", "-c", command, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_env_line_is_understood_by_sh(installed, tmp_path):
    user = f'{tmp_path}/it\'s "mine" $HOME'
    expected = os.pathsep.join([user, str(installed.site / "nnunet_l2g" / "_nnunet_ext")])
    printed = env_line(installed, 'printf %s "$nnUNet_extTrainer"', nnUNet_extTrainer=user, NNUNET_L2G_AUTOLOAD="0")
    assert printed == expected


# editable installs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_editable_is_found_with_the_env_line_and_uninstalls_without_a_trace(editable):
    assert editable.variable() == []
    printed = env_line(editable, f"'{editable.scripts / 'nnunet_l2g'}' doctor -tr {TRAINER}_50epochs")
    assert "(editable)" in printed and f"found              {TRAINER}_50epochs" in printed
    editable.pip("uninstall", "-y", "nnunet-l2g")
    assert editable.files() == editable.before
