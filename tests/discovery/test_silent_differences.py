"""Mistakes that no error shows: another class with the name of our trainer, nnU-Net's variables in quotation marks."""

import os
from types import SimpleNamespace

import pytest

from nnunet_l2g import doctor, lookup
from nnunet_l2g.autoload import VARIABLE, trainers_folder
from nnunet_l2g.demo import command as demo

TRAINER = "nnUNetTrainerL2GNet"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder that nnU-Net searches before ours, with a class of our name."""
    folder = tmp_path / "theirs"
    (folder / "deep").mkdir(parents=True)
    (folder / "other.py").write_text(f"class {TRAINER}Plus:\n    pass\n# class {TRAINER}\n")
    file = folder / "deep" / "mine.py"
    file.write_text(f"import x\n\nclass {TRAINER}(x.Base):\n    pass\n")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(folder), trainers_folder()]))
    return file


def test_the_file_that_wins_is_found_by_its_text(theirs, monkeypatch):
    assert lookup.file_that_wins(TRAINER) == theirs
    assert lookup.file_that_wins(f"{TRAINER}_5epochs") is None
    monkeypatch.setenv(VARIABLE, os.pathsep.join([trainers_folder(), str(theirs.parent)]))
    assert lookup.file_that_wins(TRAINER) is None


def test_doctor_names_the_file_whose_class_wins(theirs, monkeypatch, capsys):
    foreign = type("Foreign", (), {"__module__": "deep.mine"})
    monkeypatch.setattr(lookup, "find_trainer", lambda name: foreign)
    assert not doctor.report_trainer(TRAINER, [TRAINER])
    found = capsys.readouterr().out
    assert f"{TRAINER}  ({theirs})" in found and f"PROBLEM            this is not nnunet_l2g's {TRAINER}" in found
    assert doctor.report_trainer("nnUNetTrainerOfTheirs", [TRAINER])
    assert "PROBLEM" not in capsys.readouterr().out


def test_the_demo_names_it_too(theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_steps", lambda *args: None)
    monkeypatch.setattr(demo, "closing", lambda _: "")
    arguments = SimpleNamespace(seed=0, trainer=TRAINER, folder=tmp_path / "demo", overwrite=False, device="cpu")
    assert demo.run(arguments) == 0
    assert f"{TRAINER} from {theirs}, not from nnunet_l2g" in capsys.readouterr().out


def test_doctor_says_what_is_wrong_with_nnunets_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", f'"{tmp_path}"')
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    doctor.report_data_folders()
    raw, preprocessed, results = capsys.readouterr().out.splitlines()
    assert raw.startswith("note") and "nnUNet_raw is not set" in raw
    assert preprocessed.startswith("PROBLEM") and f'"{tmp_path}": nnU-Net takes the quotation marks' in preprocessed
    assert results.split() == ["nnUNet_results", str(tmp_path)]
