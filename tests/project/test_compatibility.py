"""Every trainer in every setting, to a prediction of the imported model; and the list in docs/guarantees.md that says so."""

import itertools
import re

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
DOCUMENT = ROOT / "docs" / "guarantees.md"


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


def test_nnunet_itself_cannot_train_under_three_stages(bench):
    """Otherwise the refusal has lost its reason."""
    with bench.at("2 stages, 2D") as (setting, plans):
        trainer = make_trainer(nnUNetTrainer, setting, plans)
        with pytest.warns(RuntimeWarning, match="invalid value"):
            trainer.initialize()
        assert np.isnan(trainer.train_step(make_batch(trainer, setting))["loss"])
    with bench.at("1 stage, 3D") as (setting, plans), pytest.raises(IndexError):
        make_trainer(nnUNetTrainer, setting, plans).initialize()


def test_the_guarantees_say_the_same():
    """A list entry for all settings with the same outcome. A method's name stands for its ablations and controls."""
    settings_of: dict[str, list[str]] = {}
    for setting in SETTINGS:
        words = (f"{name[13:]} {'refuses' if expected_refusal(name, setting) else 'passes'}" for name in MAIN)
        settings_of.setdefault("; ".join(words), []).append(setting)
    page = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    for outcome, settings in settings_of.items():
        assert f"- {outcome}: {'; '.join(settings)}" in page
