"""`nnunet_l2g doctor` and `env` say what is wrong, why, and what to do."""

import os
import sys
from types import SimpleNamespace

import pytest
from throwaway import TRAINER

from nnunet_l2g import autoload, cli, compatibility, doctor, lookup, trainers
from nnunet_l2g.errors import UserError


@pytest.mark.slow
def test_doctor_finds_every_trainer(installed):
    done = installed.l2g("doctor")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert f"(wheel)  {installed.site / 'nnunet_l2g'}" in done.stdout
    assert "<- nnunet_l2g" in done.stdout
    assert f"found              {TRAINER}  (nnunet_l2g.trainers" in done.stdout
    assert "PROBLEM" not in done.stdout
    assert "Searching in" not in done.stdout  # nnU-Net's own output


def test_doctor_names_the_opt_out_and_the_names_that_exist(monkeypatch, capsys):
    monkeypatch.setenv("NNUNET_L2G_AUTOLOAD", "0")
    monkeypatch.delenv(autoload.VARIABLE, raising=False)
    assert cli.main(["doctor", "-tr", TRAINER, f"{TRAINER}_fast"]) == 1
    output = capsys.readouterr().out
    assert "NNUNET_L2G_AUTOLOAD=0 turns it off" in output
    assert f"NOT FOUND          {TRAINER}\n" in output
    assert f"NOT FOUND          {TRAINER}_fast\n" in output
    assert "<Trainer>[_<N>epochs[_<M>iterations]]" in output


@pytest.mark.parametrize("kind", ["editable", "wheel", "not installed"])
def test_why_our_folder_is_absent(monkeypatch, kind):
    monkeypatch.delenv("NNUNET_L2G_AUTOLOAD", raising=False)
    monkeypatch.setattr(doctor, "installed_as", lambda: kind)
    assert "pip install it" in doctor.why_absent() and 'eval "$(nnunet_l2g env)"' in doctor.why_absent()
    monkeypatch.setattr(doctor.sys, "flags", SimpleNamespace(no_site=1))
    assert "start it without -S" in doctor.why_absent()


@pytest.mark.parametrize("first", [True, False])
def test_doctor_names_the_users_file_that_cannot_be_imported(user_folder, monkeypatch, capsys, first):
    """If it comes before our folder, none of our trainers is found. The cause is printed once."""
    (user_folder / "mine.py").write_text("import a_module_of_theirs")
    folders = [str(user_folder), autoload.trainers_folder()][:: 1 if first else -1]
    monkeypatch.setenv(autoload.VARIABLE, os.pathsep.join([*folders, f"{user_folder}/nowhere"]))
    assert cli.main(["doctor", "-tr", TRAINER, f"{TRAINER}_0epochs", "nnUNetTrainerOfMine"]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM            a module that nnU-Net searches cannot be imported" in output
    assert output.count("cause: ModuleNotFoundError: No module named 'a_module_of_theirs'") == 1
    assert f"to do: correct or remove {user_folder / 'mine.py'}, or take {user_folder} out of nnUNet_extTrainer" in output
    assert (f"found              {TRAINER}  (" in output) != first
    assert "NOT FOUND          nnUNetTrainerOfMine" in output
    assert ("cause: ValueError: " in output) != first  # a training of no epochs


def test_a_class_of_our_name_in_a_folder_before_ours_is_a_problem(tmp_path, monkeypatch, capsys):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "mine.py"
    file.write_text(f"import x\n\nclass {TRAINER}(x.Base):\n    pass\n")
    (tmp_path / "other.py").write_text(f"class {TRAINER}Plus:\n    pass\n# class {TRAINER}\n")
    monkeypatch.setenv(autoload.VARIABLE, os.pathsep.join([autoload.trainers_folder(), str(tmp_path)]))
    assert lookup.file_that_wins(TRAINER) is None
    monkeypatch.setenv(autoload.VARIABLE, os.pathsep.join([str(tmp_path), autoload.trainers_folder()]))
    assert lookup.file_that_wins(TRAINER) == file
    assert lookup.file_that_wins(f"{TRAINER}_5epochs") is None
    monkeypatch.setattr(lookup, "find_trainer", lambda name: type("Foreign", (), {"__module__": "deep.mine"}))
    assert not doctor.report_trainer(TRAINER, trainers, [])
    found = capsys.readouterr().out
    assert f"{TRAINER}  ({file})" in found and f"PROBLEM            this is not nnunet_l2g's {TRAINER}" in found
    assert doctor.report_trainer("nnUNetTrainerOfTheirs", trainers, [])
    assert "PROBLEM" not in capsys.readouterr().out


def test_doctor_says_what_is_wrong_with_nnunets_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", f'"{tmp_path}"')
    monkeypatch.setenv("nnUNet_results", f"{tmp_path}/nowhere")
    doctor.report_variables()
    raw, preprocessed, results = capsys.readouterr().out.splitlines()[-3:]
    assert raw.startswith("note") and "nnUNet_raw is not set" in raw
    assert preprocessed.startswith("PROBLEM") and f'"{tmp_path}": nnU-Net takes the quotation marks' in preprocessed
    assert results.endswith("nowhere, which is no folder")


# the cause


def failing(code):
    with pytest.raises(Exception) as caught:
        exec(code, {"__name__": "theirs"})
    return caught.value


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (
            "try: import nowhere_at_all\nexcept ImportError as e: raise RuntimeError('no extension') from e",
            "ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        (
            "try: 1 / 0\nexcept ZeroDivisionError: raise ValueError('N must be positive') from None",
            "ValueError: N must be positive",
        ),
    ],
)
def test_cause_is_the_first_exception_that_is_not_suppressed(code, cause):
    lines = lookup.explain(failing(code))
    assert lines[0] == f"cause: {cause}"
    assert ("to do: install what provides the module 'nowhere_at_all'" in lines[-1]) == ("nowhere" in code)


def test_the_cause_names_a_torchvision_that_does_not_fit(tmp_path, monkeypatch):
    """As nnU-Net's look-up meets it: nnU-Net's trainers import timm, which imports torchvision."""
    (tmp_path / "timm.py").write_text("import torchvision")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in ("timm", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    lines = "\n".join(lookup.explain(failing("import timm")))
    assert "cause: RuntimeError: operator torchvision::nms does not exist" in lines
    assert "timm -> torchvision" in lines
    assert "pip uninstall -y torchvision, then pip install" in lines


# the range of nnU-Net versions


@pytest.mark.parametrize("version", ["2.8.0", "2.8", "2.8.12.post1", "2.8.3+local"])
def test_supported_versions_pass(monkeypatch, version):
    monkeypatch.setattr(compatibility, "installed_version", lambda name: version)
    assert compatibility.check_nnunet() == version


@pytest.mark.parametrize("version", ["2.7.0", "2.9.0.dev0", "2.10.1", "3.0", None])
def test_other_versions_are_refused_in_one_sentence_by_trainers_and_doctor(monkeypatch, capsys, version):
    monkeypatch.setattr(compatibility, "installed_version", lambda name: version)
    found = f"{version} is installed" if version else "is not installed in this Python"
    sentence = f'nnunetv2 {found}, nnunet_l2g needs >=2.8.0,<2.9; install one with: pip install "nnunetv2>=2.8.0,<2.9"'
    with pytest.raises(UserError) as error:
        compatibility.check_nnunet()
    assert str(error.value) == sentence
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith(f"PROBLEM            {sentence}\n")


# the line for other shells


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("sh", "export nnUNet_extTrainer='/it'\"'\"'s{}'"),
        ("fish", "set -gx nnUNet_extTrainer '/it\\'s{}'"),
        ("powershell", "$env:nnUNet_extTrainer = '/it''s{}'"),
    ],
)
def test_env_quotes_for_each_shell(monkeypatch, capsys, shell, line):
    monkeypatch.setenv("nnUNet_extTrainer", "/it's")
    assert cli.main(["env", "--shell", shell]) == 0
    assert capsys.readouterr().out == line.format(os.pathsep + autoload.trainers_folder()) + "\n"
