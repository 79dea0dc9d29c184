"""Trainer names with a schedule, as nnU-Net's look-up and pickle see them."""

import pickle

import pytest

from nnunet_l2g import trainers


@pytest.mark.parametrize("name", trainers.__all__)
@pytest.mark.parametrize(("suffix", "epochs", "iterations"), [("7epochs", 7, None), ("2epochs_10iterations", 2, 10)])
def test_every_trainer_has_any_schedule(name, suffix, epochs, iterations):
    trainer = getattr(trainers, f"{name}_{suffix}")
    assert trainer.__name__ == f"{name}_{suffix}" and issubclass(trainer, getattr(trainers, name))
    assert (trainer.epochs, trainer.iterations) == (epochs, iterations)


def test_a_name_is_one_class_that_pickles():
    trainer = trainers.nnUNetTrainerL2GNet_3epochs
    assert trainer is trainers.nnUNetTrainerL2GNet_3epochs
    assert pickle.loads(pickle.dumps(trainer)) is trainer


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerL2GNet_myloss",  # a user's, elsewhere
        "nnUNetTrainerL2GNet_5epochs_myloss",
        "nnUNetTrainerL2GNet_5epoch_",
        "nnUNetTrainer_5epochs",  # nnU-Net's
        "nnUNetTrainerL2GNet_epochs",
        "PluginTrainer_5epochs",
    ],
)
def test_what_is_not_ours_is_left_to_others(name):
    assert not hasattr(trainers, name)


def test_a_slip_in_a_name_of_ours_gets_a_hint(capsys):
    assert not hasattr(trainers, "nnUNetTrainerL2GNetOneReference_20epoch_")
    assert "has no nnUNetTrainerL2GNetOneReference_20epoch_ (it has nnUNetTrainerL2GNet_<N>epochs" in capsys.readouterr().err
    assert not hasattr(trainers, "nnUNetTrainerOfMine") and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nnUNetTrainerL2GNet_0epochs", "at least 1"),
        ("nnUNetTrainerL2GNet_5epochs_0iterations", "at least 1"),
        ("nnUNetTrainerL2GNet_05epochs", "write it as nnUNetTrainerL2GNet_5epochs "),
        ("nnUNetTrainerL2GNet_1epoch", "write it as nnUNetTrainerL2GNet_1epochs "),
        ("nnUNetTrainerL2GNet_2epochs_1iteration", "_2epochs_1iterations "),
    ],
)
def test_what_is_ours_but_wrong_is_refused_with_the_right_name(name, named):
    with pytest.raises(ValueError, match=named):
        hasattr(trainers, name)


def test_only_public_names_are_offered():
    assert all("__" not in name for name in trainers.__all__)  # class names are result folders
