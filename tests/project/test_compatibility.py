"""Every trainer in every setting, to a prediction of the imported model; and the list in docs/guarantees.md that says so."""

import itertools
import os
import re

import numpy as np
import pytest
from compatibility_cell import STAGES, Bench, make_batch, make_trainer, small_trainers
from compatibility_document import DOCUMENT, WRITE, committed_list, outcomes_list, write_list
from compatibility_settings import SETTINGS
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_l2g import trainers

MAIN = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
LARGE = ("ResEnc L, 3D", "ResEnc XL, 3D")  # in the long tail for all: ten seconds each
OLDEST = ("2D", "3D")  # by CI with the oldest versions, too
RESULTS = {}  # of this run: (trainer, setting) -> "" or the refusal


def cells():
    for setting in SETTINGS:
        for name in STAGES:
            if name in MAIN and setting not in LARGE:
                marks = pytest.mark.oldest if setting in OLDEST else ()
            else:
                marks = pytest.mark.long
            yield pytest.param(name, setting, marks=marks, id=f"{name[13:]}-{setting}")


def expected_refusal(name: str, setting: str) -> str | None:
    """What the sentence has to say: the value, and what to do."""
    if setting == "cascade" and "L2GNet" not in name:
        return r"not support cascades: .* Train 2d, 3d_lowres or 3d_fullres\.$"
    if setting.startswith(("1 stage", "2 stages")):
        return rf"has {setting[0]} stage\(s\) for patch \(.*\), expected at least 3: .* -overwrite_target_spacing"
    return None


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with small_trainers():
        yield Bench(tmp_path_factory.mktemp("compatibility"))


def test_the_table_has_every_trainer():
    assert list(STAGES) == trainers.__all__


@pytest.mark.parametrize(("name", "setting"), cells())
def test_passes_or_refuses_clearly(bench, name, setting):
    refusal, expected = bench.check(name, setting), expected_refusal(name, setting)
    if expected is None:
        assert not refusal
    else:
        assert re.search(expected, refusal)
    RESULTS[name, setting] = refusal


def test_nnunet_itself_cannot_train_under_three_stages(bench):
    """Else the refusal has lost its reason."""
    with bench.at("2 stages, 2D") as (setting, plans):
        trainer = make_trainer(nnUNetTrainer, setting, plans)
        with pytest.warns(RuntimeWarning, match="invalid value"):
            trainer.initialize()
        assert np.isnan(trainer.train_step(make_batch(trainer, setting))["loss"])
    with bench.at("1 stage, 3D") as (setting, plans), pytest.raises(IndexError):
        make_trainer(nnUNetTrainer, setting, plans).initialize()


@pytest.mark.long
def test_the_page_says_what_was_found(bench):
    """The last of this file, with the results of all; those of the methods, not in the long tail, are run here."""
    for name, setting in itertools.product(MAIN, SETTINGS):
        if (name, setting) not in RESULTS:
            RESULTS[name, setting] = bench.check(name, setting)
    missing = len(SETTINGS) * len(STAGES) - len(RESULTS)
    assert not missing, f"{missing} cells did not run or failed; the page shows all"
    found = outcomes_list(RESULTS)
    if os.environ.get(WRITE) == "1":
        write_list(found)
    assert committed_list() == found, f"write the list in {DOCUMENT.name} anew with {WRITE}=1 and -n 0"
