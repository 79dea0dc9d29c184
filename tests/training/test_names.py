"""Trainer names with lengths and runs, as nnU-Net's look-up and pickle see them."""

import inspect
import json
import os
import pickle
import sys

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from planned import PLAIN

from nnunet_l2g import trainers
from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.training.names import has_run, run_name

THEIRS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class TheirTrainer(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.num_iterations_per_epoch = 0.5, 100

class TheirTrainer_7epochs(TheirTrainer):
    initial = "theirs"
"""


@pytest.fixture(autouse=True)
def searched(monkeypatch, tmp_path):
    """nnU-Net searches a folder of other people's, then ours; what was made is forgotten after the test."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "of_theirs.py").write_text(THEIRS)
    monkeypatch.setenv(VARIABLE, with_trainers(str(folder)))
    before = set(vars(trainers))
    yield folder
    for made in set(vars(trainers)) - before:
        delattr(trainers, made)


def make(folders, cls):
    """A trainer as nnU-Net's command makes it."""
    folder = folders.path("preprocessed", PLAIN)
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    return cls(plans, "2d", 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))


def lengths(trainer):
    return trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.save_every


@pytest.mark.parametrize("name", trainers.__all__)
@pytest.mark.parametrize(
    ("suffix", "epochs", "iterations"), [("7epochs", 7, None), ("2epochs_10iterations_run3", 2, 10), ("run2", None, None)]
)
def test_every_trainer_has_any_lengths_and_runs(name, suffix, epochs, iterations):
    trainer = getattr(trainers, f"{name}_{suffix}")
    assert trainer.__name__ == f"{name}_{suffix}" and issubclass(trainer, getattr(trainers, name))
    assert (trainer.epochs, trainer.iterations) == (epochs, iterations)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nnUNetTrainer_6epochs_200iterations", (6, 200, 40, 1)),
        ("nnUNetTrainer_run2", (1000, 250, 50, 50)),
        ("nnUNetTrainer_50epochs_run3", (50, 250, 50, 50)),  # of nnU-Net's own nnUNetTrainer_50epochs
        ("nnUNetTrainer_51epochs_run3", (51, 250, 50, 5)),
        ("nnUNet_PrimusV3S_Trainer_run2", None),
        ("nnUNetTrainerCELoss_3epochs_2iterations_run2", (3, 2, 1, 1)),
        ("TheirTrainer_20epochs_run3", (20, 100, 50, 2)),
        ("TheirTrainer_20epochs_10iterations", (20, 10, 5, 2)),
    ],
)
def test_trainers_of_others_change_in_lengths_alone(nnunet_folders, name, expected):
    cls, path = find(name), list(sys.path)
    base = find(name.partition("Trainer")[0] + "Trainer" if "CELoss" not in name else "nnUNetTrainerCELoss")
    assert cls.__name__ == name and find(name) is cls and pickle.loads(pickle.dumps(cls)) is cls
    assert sys.path == path and "of_theirs" not in sys.modules
    own = {"__init__", "__module__", "__doc__"}
    changed = {key for part in cls.__mro__ if part.__module__ == trainers.__name__ for key in vars(part)}
    assert changed <= own and inspect.signature(cls) == inspect.signature(base)
    assert cls.mro()[-len(base.mro()) + 1 :] == base.mro()[1:]  # theirs is imported anew at each look-up
    if expected is not None:
        trainer = make(nnunet_folders, cls)
        assert lengths(trainer) == expected
        assert trainer.initial_lr == (0.5 if name.startswith("Their") else 0.01)
        assert set(trainer.my_init_kwargs) == {"plans", "configuration", "fold", "dataset_json", "device"}


def test_nnunets_own_trainer_runs_its_own_code(nnunet_folders, monkeypatch):
    """Step, networks, loaders, losses and all else are nnU-Net's very functions."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    cls = find("nnUNetTrainer_3epochs_2iterations_run2")
    theirs, ours = ({key: inspect.getattr_static(one, key) for key in dir(nnUNetTrainer)} for one in (nnUNetTrainer, cls))
    different = {key for key in theirs if ours[key] is not theirs[key]}
    assert different <= {"__init__", "__module__", "__doc__", "__dict__", "__weakref__"}
    assert {"train_step", "build_network_architecture", "get_dataloaders", "_build_loss"} <= set(theirs)
    trainer = make(nnunet_folders, cls)
    trainer.on_train_start()
    assert all(type(part).__module__.startswith(("nnunetv2", "dynamic_network", "batchgenerators", "torch"))
               for part in (trainer.network, trainer.loss, trainer.optimizer, trainer.dataloader_train))  # fmt: skip
    assert trainer.lr_scheduler.max_steps == 3


def test_names_that_others_have_stay_theirs(searched, monkeypatch):
    for order in (with_trainers(str(searched)), with_trainers("") + os.pathsep + str(searched)):
        monkeypatch.setenv(VARIABLE, order)
        assert find("TheirTrainer_7epochs").initial == "theirs"
        assert find("TheirTrainer_7epochs_run2").initial == "theirs"
        delattr(trainers, "TheirTrainer_7epochs_run2")
    assert find("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2.")
    assert not hasattr(trainers, "nnUNetTrainer_5epochs")


def test_a_name_is_one_class_that_pickles():
    trainer = trainers.nnUNetTrainerL2GNet_3epochs_run2
    assert trainer is trainers.nnUNetTrainerL2GNet_3epochs_run2 is find("nnUNetTrainerL2GNet_3epochs_run2")
    assert pickle.loads(pickle.dumps(trainer)) is trainer


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerL2GNet_myloss",  # a user's, elsewhere
        "nnUNetTrainerL2GNet_5epochs_myloss",
        "nnUNetTrainerL2GNet_5epoch_",
        "nnUNetTrainerL2GNet_epochs",
        "nnUNetTrainerL2GNet_run",
        "TheirTrainer",
    ],
)
def test_other_names_are_left_to_others_without_a_search(name, monkeypatch):
    monkeypatch.setattr("nnunet_l2g.lookup.find_trainer", lambda name: pytest.fail(f"searches {name}"))
    assert not hasattr(trainers, name)


@pytest.mark.parametrize(
    "name",
    ["PluginTrainer_5epochs", "nnUNetTrainerNobody_run2", "nnUNetTrainerNobody_run1", "nnUNetTrainer_run2_run3",
     "nnUNetTrainer_run2_5epochs", "nnUNetTrainer_5epochs_6epochs", "nnUNetTrainerL2GNet_run2_run3"],
)  # fmt: skip
def test_what_nobody_has_is_not_made(name):
    assert not hasattr(trainers, name)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        find(name)


def test_a_slip_in_a_name_of_ours_gets_a_hint(capsys):
    assert not hasattr(trainers, "nnUNetTrainerL2GNetNoReadout_20epoch_")
    assert "has no nnUNetTrainerL2GNetNoReadout_20epoch_ (names are <Trainer>, <Trainer>_<N>epochs" in capsys.readouterr().err
    assert not hasattr(trainers, "nnUNetTrainerOfMine") and not capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["nnUNetTrainerL2GNet", "nnUNetTrainer", "TheirTrainer"])
@pytest.mark.parametrize(
    ("suffix", "named"),
    [
        ("_0epochs", "at least 1"),
        ("_5epochs_0iterations", "at least 1"),
        ("_05epochs", "write it as {}_5epochs "),
        ("_3epoch", "write it as {}_3epochs "),
        ("_2epochs_1iteration", "write it as {}_2epochs_1iterations "),
        ("_run0", "runs are counted from 2 on; run 1 is {}$"),
        ("_run1", "runs are counted from 2 on; run 1 is {}$"),
        ("_3epochs_run1", "run 1 is {}_3epochs$"),
        ("_run02", "write it as {}_run2 "),
    ],
)
def test_what_is_wrong_is_refused_with_the_right_name(trainer, suffix, named):
    with pytest.raises(ValueError, match=named.format(trainer)):
        find(trainer + suffix)


def test_runs_are_told_by_name():
    assert [run_name("A_5epochs", run) for run in (1, 2, 13)] == ["A_5epochs", "A_5epochs_run2", "A_5epochs_run13"]
    assert has_run("A_5epochs_run2") and has_run("A_run1") and not has_run("A_5epochs") and not has_run("A_rerun2")
