"""Every trainer in every setting, to a prediction of the imported model; and the list in docs/guarantees.md that says so."""

import itertools
import os
import re
import textwrap

import numpy as np
import pytest
from compatibility_cell import Bench, make_batch, make_trainer, small_trainers
from compatibility_settings import SETTINGS
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from throwaway import ROOT

from nnunet_l2g import trainers

MAIN = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
LARGE = ("ResEnc L, 3D", "ResEnc XL, 3D")  # ten seconds for each trainer
OLDEST = ("2D", "3D")  # CI runs these with the oldest versions, too
FAMILIES = {
    "L2GNet": [name for name in trainers.__all__ if "L2GNet" in name],
    "GRCSF": [name for name in trainers.__all__ if "GRCSF" in name or "DiceFocal" in name],
    "GLUA": [name for name in trainers.__all__ if "GLUA" in name or "RandomIntensity" in name],
}
RESULTS = {}  # of this run: (trainer, setting) -> "" or the refusal
DOCUMENT = ROOT / "docs" / "guarantees.md"
WRITE = "NNUNET_L2G_WRITE_COMPATIBILITY"
BEGIN, END = "<!-- compatibility: begin -->\n", "<!-- compatibility: end -->\n"


def expected_refusal(name: str, setting: str) -> str | None:
    """What the sentence has to say: the value, and what to do."""
    if setting == "cascade" and "L2GNet" not in name:
        return r"not support cascades: .* Train 2d, 3d_lowres or 3d_fullres\.$"
    if setting.startswith(("1 stage", "2 stages")):
        return rf"has {setting[0]} stage\(s\) for patch \(.*\), expected at least 3: .* -overwrite_target_spacing"
    return None


def cells():
    """The quick ones are each setting with one method, every method in 2D and 3D, and all refusals of methods."""
    for (index, setting), name in itertools.product(enumerate(SETTINGS), trainers.__all__):
        one_method = setting not in LARGE and name == MAIN[index % len(MAIN)]
        quick = name in MAIN and (one_method or setting in OLDEST or expected_refusal(name, setting))
        marks = [] if quick else [pytest.mark.long]
        if quick and setting in OLDEST:
            marks = [pytest.mark.oldest]
        yield pytest.param(name, setting, marks=marks, id=f"{name[13:]}-{setting}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with small_trainers():
        yield Bench(tmp_path_factory.mktemp("compatibility"))


@pytest.mark.parametrize(("name", "setting"), cells())
def test_passes_or_refuses_clearly(bench, name, setting):
    refusal, expected = bench.check(name, setting), expected_refusal(name, setting)
    if expected is None:
        assert not refusal
    else:
        assert re.search(expected, refusal)
    RESULTS[name, setting] = refusal


def test_nnunet_itself_cannot_train_under_three_stages(bench):
    """Otherwise the refusal has lost its reason."""
    with bench.at("2 stages, 2D") as (setting, plans):
        trainer = make_trainer(nnUNetTrainer, setting, plans)
        with pytest.warns(RuntimeWarning, match="invalid value"):
            trainer.initialize()
        assert np.isnan(trainer.train_step(make_batch(trainer, setting))["loss"])
    with bench.at("1 stage, 3D") as (setting, plans), pytest.raises(IndexError):
        make_trainer(nnUNetTrainer, setting, plans).initialize()


def outcomes_list() -> str:
    """A Markdown list with one entry for all settings in which the methods have the same outcome."""
    settings_of: dict[str, list[str]] = {}
    for setting in SETTINGS:
        outcomes = (f"{family} {outcome_of(names, setting)}" for family, names in FAMILIES.items())
        settings_of.setdefault("; ".join(outcomes), []).append(setting)
    entries = [f"- {outcome}: {'; '.join(settings)}" for outcome, settings in settings_of.items()]
    return "".join(textwrap.fill(entry, 120, subsequent_indent="  ") + "\n" for entry in entries)


def outcome_of(names: list[str], setting: str) -> str:
    """One word for all trainers of a method, or one for each of them if they differ."""
    outcomes = {name: "refuses" if RESULTS[name, setting] else "passes" for name in names}
    if len(set(outcomes.values())) == 1:
        return outcomes[names[0]]
    return ", ".join(f"{name.removeprefix('nnUNetTrainer')} {outcome}" for name, outcome in outcomes.items())


@pytest.mark.long
def test_the_page_says_what_was_found(bench):
    """Runs the quick cells too, which `-m long` leaves out. To write the list anew, set the variable and run all cells."""
    for name, setting in itertools.product(MAIN, SETTINGS):
        if (name, setting) not in RESULTS:
            RESULTS[name, setting] = bench.check(name, setting)
    missing = len(SETTINGS) * len(trainers.__all__) - len(RESULTS)
    assert not missing, f"{missing} cells did not run or failed; the list shows all"
    found = f"{BEGIN}{outcomes_list()}{END}"
    page = DOCUMENT.read_text(encoding="utf-8")
    if os.environ.get(WRITE) == "1":
        page = page.split(BEGIN)[0] + found + page.split(END)[1]
        DOCUMENT.write_text(page, encoding="utf-8")
    assert found in page, f"write the list in {DOCUMENT.name} anew with {WRITE}=1 and -n 0"
