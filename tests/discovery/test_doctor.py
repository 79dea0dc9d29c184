"""`nnunet_l2g doctor` and the other discovery commands say what is wrong, why, and what to do."""

import configparser
import importlib
import os
import shutil
import sys

import pytest
from throwaway import ROOT, TRAINER, Environment

from nnunet_l2g import autoload, cli, compatibility, doctor, installation, lookup
from nnunet_l2g.errors import UserError

# doctor, in real environments


@pytest.mark.slow
def test_doctor_finds_every_trainer(installed):
    done = installed.l2g("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"{installed.site / 'nnunet_l2g'}" in done.stdout
    assert "(wheel)" in done.stdout
    assert "<- nnunet_l2g" in done.stdout
    assert f"found              {TRAINER}  (nnunet_l2g.trainers" in done.stdout
    assert "PROBLEM" not in done.stdout
    assert "Searching in" not in done.stdout  # nnU-Net's chatter


def test_doctor_names_the_opt_out_and_the_names_that_exist(monkeypatch, capsys):
    monkeypatch.setenv("NNUNET_L2G_AUTOLOAD", "0")
    monkeypatch.delenv(autoload.VARIABLE, raising=False)
    assert cli.main(["doctor", "-tr", TRAINER, f"{TRAINER}_fast"]) == 1
    output = capsys.readouterr().out
    assert "NNUNET_L2G_AUTOLOAD=0 switches it off" in output
    assert f"NOT FOUND          {TRAINER}_fast" in output
    assert "nnunet_l2g has it, but nnU-Net does not search" in output
    assert "<Trainer>_<N>epochs_<M>iterations" in output


def test_doctor_names_the_users_folder_that_cannot_be_imported(user_folder, monkeypatch, capsys):
    (user_folder / "mine.py").write_text("import a_module_of_theirs")
    folders = [autoload.trainers_folder(), f"{user_folder}/nowhere", str(user_folder)]
    monkeypatch.setenv(autoload.VARIABLE, os.pathsep.join(folders))
    assert cli.main(["doctor", "-tr", TRAINER, f"{TRAINER}_0epochs", "nnUNetTrainerOfMine"]) == 1
    output = capsys.readouterr().out
    assert f"PROBLEM            a module in {user_folder} cannot be imported" in output
    assert "cause: ModuleNotFoundError: No module named 'a_module_of_theirs'" in output
    assert f"{user_folder}/nowhere in nnUNet_extTrainer does not exist" in output
    assert f"found              {TRAINER}  (" in output  # its folder comes first
    assert "NOT FOUND          nnUNetTrainerOfMine" in output
    assert "cause: ValueError: " in output  # a schedule of no epochs


def test_the_cause_names_a_torchvision_that_does_not_fit(tmp_path, monkeypatch):
    """As nnU-Net's look-up meets it: its trainers import timm, which imports torchvision."""
    for name, content in (
        ("timm", "import torchvision"),
        ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
    ):
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
    metadata = tmp_path / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\nRequires-Dist: torch==1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = "\n".join(lookup.explain(failing(lambda: importlib.import_module("timm"))))
    assert "cause: RuntimeError: operator torchvision::nms does not exist" in lines
    assert "timm -> torchvision" in lines
    assert "torchvision 0.1, which asks for torch==1.0" in lines
    assert "pip uninstall -y torchvision, then pip install" in lines


def test_doctor_without_nnunet(tmp_path, wheel):
    environment = Environment(tmp_path / "env", without=("nnunetv2",))
    environment.pip("install", wheel)
    done = environment.l2g("doctor")
    assert done.returncode == 1
    assert "nnunetv2 is not installed in this Python, nnunet_l2g needs >=2.8.0,<2.9; install one with: pip" in done.stdout
    assert (environment.scripts / "python").name in done.stdout


def test_doctor_sends_an_editable_install_to_register(editable):
    shutil.rmtree(editable.folder / "links")  # nothing heavy: it must answer without nnU-Net, too
    done = editable.l2g("doctor")
    assert done.returncode == 1
    assert "(editable)" in done.stdout
    assert "run: nnunet_l2g register" in done.stdout


def test_python_without_site_is_named(monkeypatch):
    class Flags:
        no_site = 1

    monkeypatch.setattr(doctor.sys, "flags", Flags)
    assert "-S" in doctor.why_absent()


# the cause


def failing(function):
    try:
        function()
    except Exception as error:
        return error


def test_cause_is_the_root_of_the_chain():
    def wrapped():
        try:
            import no_such_module_anywhere  # noqa: F401
        except ImportError as error:
            raise RuntimeError("could not load the extension") from error

    lines = lookup.explain(failing(wrapped))
    assert lines[0] == "cause: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert "'no_such_module_anywhere'" in lines[-1]


def test_suppressed_context_is_not_the_cause():
    def replaced():
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            raise ValueError("N must be positive") from None

    assert lookup.explain(failing(replaced))[0] == "cause: ValueError: N must be positive"


# the range of nnU-Net versions


def test_range_equals_the_one_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert f"nnunetv2{compatibility.NNUNET_RANGE}" in config["options"]["install_requires"].split()


@pytest.mark.parametrize("version", ["2.8.0", "2.8", "2.8.1", "2.8.12.post1", "2.8.3+local"])
def test_supported_versions_pass(monkeypatch, version):
    monkeypatch.setattr(compatibility, "installed_version", lambda name: version)
    assert compatibility.check_nnunet() == version


@pytest.mark.parametrize("version", ["2.7.0", "2.9", "2.9.0.dev0", "2.10.1", "3.0", "1.7.1", "unknown"])
def test_other_versions_are_refused_in_one_sentence(monkeypatch, version):
    monkeypatch.setattr(compatibility, "installed_version", lambda name: version)
    with pytest.raises(UserError, match=f"nnunetv2 {version} is installed, nnunet_l2g needs >=2.8.0,<2.9"):
        compatibility.check_nnunet()


# register where it cannot work


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site-packages folder with the metadata of an editable install, met first by importlib.metadata."""
    metadata = tmp_path / "nnunet_l2g-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nnunet-l2g\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text(f"{metadata.name}/METADATA,,\n{metadata.name}/RECORD,,")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_register_says_which_folder_it_cannot_write(site, monkeypatch, capsys):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    before = sorted(site.rglob("*"))
    monkeypatch.setattr(installation.os, "replace", refuse)  # root may write anywhere, so a chmod would prove nothing
    assert cli.main(["register"]) == 1
    error = capsys.readouterr().err
    assert str(site) in error
    assert "nnunet_l2g env" in error
    assert sorted(site.rglob("*")) == before  # no temporary file either


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_register_on_a_read_only_folder(site, capsys):
    site.chmod(0o555)
    try:
        assert cli.main(["register"]) == 1
    finally:
        site.chmod(0o755)
    assert "nnunet_l2g env" in capsys.readouterr().err


def test_register_keeps_record_lines_whole(site):
    """A RECORD need not end with a newline; an egg-info on the path is no installation."""
    assert cli.main(["register"]) == 0
    record = (site / "nnunet_l2g-0.1.0.dist-info" / "RECORD").read_text().splitlines()
    assert [line.split(",")[0].rpartition("/")[2] for line in record] == [
        "METADATA",
        "RECORD",
        "nnunet_l2g.pth",
        "nnunet_l2g.start",
    ]


def test_register_needs_an_installation(monkeypatch, capsys):
    monkeypatch.setattr("nnunet_l2g.register.find_installation", lambda: None)
    assert cli.main(["register"]) == 1
    assert "not installed in this Python" in capsys.readouterr().err


# the line for other shells


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("sh", "export nnUNet_extTrainer='/it'\"'\"'s{}'"),
        ("fish", "set -gx nnUNet_extTrainer '/it\\'s{}'"),
        ("powershell", "$env:nnUNet_extTrainer = '/it''s{}'"),
        ("cmd", 'set "nnUNet_extTrainer=/it\'s{}"'),
    ],
)
def test_env_quotes_for_each_shell(monkeypatch, capsys, shell, line):
    monkeypatch.setenv("nnUNet_extTrainer", "/it's")
    assert cli.main(["env", "--shell", shell]) == 0
    assert capsys.readouterr().out == line.format(os.pathsep + autoload.trainers_folder()) + "\n"
