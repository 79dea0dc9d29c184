"""nnUNetTrainerGLUASignOnly: the source's negative wherever the network meets the source, and only there."""

import numpy as np
import pytest
import torch
from glua_trainers import a_batch, make, run_epochs, saved_after
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_l2g.architectures.glua.polarity import Polarity
from nnunet_l2g.architectures.glua.target_stream import WithUnlabelled
from nnunet_l2g.architectures.glua.turn_over import turn_over
from nnunet_l2g.architectures.glua.turned_over import turned_over
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers import adapted

NAME = "GLUASignOnly"
NO_SIGNS = "does not say which channels of the source were turned over, expected 1 or -1 for each of 1"
NEGATIVE = [Polarity(1.0, 0.125)]


@pytest.fixture
def negative(monkeypatch):
    monkeypatch.setattr(adapted, "measure_polarity", lambda source, target: NEGATIVE)


def test_each_channel_has_its_own_sign():
    x = torch.randn(3, 2, 4, 5)
    turned = turn_over(x, torch.tensor([1.0, -1.0]), axis=1)
    assert torch.equal(turned[:, 0], x[:, 0]) and torch.equal(turned[:, 1], -x[:, 1])
    array = x[0].numpy()
    assert np.array_equal(turn_over(array, np.array([1, -1], np.float32)), turned[0].numpy())
    assert turn_over(array, np.array([1, -1], np.float32)).dtype == np.float32


@pytest.mark.usefixtures("negative")
def test_training_and_pseudo_dice_see_the_negative(adapted_folders, capsys):
    trainer = make(adapted_folders, NAME)
    trainer.on_train_start()
    assert "Channel 0 of the source is turned over" in capsys.readouterr().out
    seen, batch = [], a_batch(trainer)
    kept = batch["data"].clone()
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train_step(batch)
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(batch)
    assert len(seen) == 2 and all(torch.equal(images, -kept) for images in seen)
    assert torch.equal(batch["data"], kept)


def test_nothing_to_turn_over_is_said(adapted_folders, capsys):
    trainer = make(adapted_folders, NAME)
    trainer.on_train_start()  # measured on what `adapt` made
    assert "WARNING: no channel of the source is nearer to the target turned over" in capsys.readouterr().out
    seen, batch = [], a_batch(trainer)
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train_step(batch)
    assert torch.equal(seen[0], batch["data"])


def test_a_channel_that_stays_does_not_warn_where_another_is_turned(adapted_folders, capsys, monkeypatch):
    monkeypatch.setattr(adapted, "measure_polarity", lambda source, target: [*NEGATIVE, Polarity(0.125, 1.0)])
    trainer = make(adapted_folders, NAME)
    trainer.initialize()
    trainer._run_stages()
    output = capsys.readouterr().out
    assert "Channel 1 of the source is left as it is" in output and "WARNING: no channel" not in output
    assert trainer.polarity.tolist() == [-1, 1]


@pytest.mark.usefixtures("negative", "threads_for_processes")
def test_full_images_are_validated_as_negatives_and_the_data_set_stays_nnunets(adapted_folders):
    trainer = make(adapted_folders, NAME)
    trainer.fold = "all"  # for which nnU-Net asks the data set's class for more than with a number
    trainer.on_train_start()
    plain = trainer.dataset_class
    keys = sorted(trainer.do_split()[1])
    images = {key: plain(trainer.preprocessed_dataset_folder, keys).load_case(key)[0][:] for key in keys}
    turned = turned_over(plain, np.array([-1], np.float32))(trainer.preprocessed_dataset_folder, keys)
    assert list(turned.identifiers) == list(keys)
    for key in keys:
        data, *rest = turned.load_case(key)
        assert np.array_equal(data, -images[key]) and len(rest) == 3 and data.dtype == np.float32

    values = np.unique(np.concatenate([image.ravel() for image in images.values()]))
    seen = []
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    trainer.perform_actual_validation()
    patches = np.unique(np.concatenate([patch.ravel() for patch in seen]))
    assert np.isin(patches[patches != 0], -values).all()  # 0: beyond the image
    assert not np.isin(patches, values).all()
    assert trainer.dataset_class is plain


def test_the_loaders_are_nnunets_own_for_the_source(adapted_folders):
    trainer = make(adapted_folders, NAME, batches=False)
    trainer.initialize()
    loaders = trainer.get_dataloaders()
    assert not any(isinstance(loader, WithUnlabelled) for loader in loaders)
    assert "unlabelled" not in next(loaders[0]) and trainer.diagnostic_keys == []


@pytest.mark.usefixtures("negative")
def test_signs_are_in_the_checkpoint_and_not_measured_again(adapted_folders, monkeypatch):
    trainer = make(adapted_folders, NAME)
    file = saved_after(trainer, 2)
    monkeypatch.setattr(adapted, "measure_polarity", lambda *_: pytest.fail("measured again"))
    resumed = make(adapted_folders, NAME, continues=True)
    resumed.load_checkpoint(file)
    resumed.on_train_start()
    assert resumed.polarity.tolist() == [-1]
    run_epochs(resumed, 1)


@pytest.mark.usefixtures("negative")
@pytest.mark.parametrize("state", [{}, {"polarity": torch.ones(2)}])
def test_another_trainers_checkpoint_is_refused(adapted_folders, state):
    trainer = make(adapted_folders, NAME)
    trainer.initialize()
    with pytest.raises(UserError, match=NO_SIGNS):
        trainer.load_extra_state(state)


@pytest.mark.usefixtures("negative")
def test_without_its_signs_a_checkpoint_is_not_validated_nor_continued(adapted_folders, monkeypatch):
    trainer = make(adapted_folders, NAME)
    trainer.on_train_start()
    file = trainer.output_folder + "/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["nnunet_l2g"]
    torch.save(checkpoint, file)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: pytest.fail("validated"))
    stripped = make(adapted_folders, NAME, continues=True)
    stripped.load_checkpoint(file)
    with pytest.raises(UserError, match=NO_SIGNS):
        stripped.perform_actual_validation()
    with pytest.raises(UserError, match="has nothing of what Small keeps beside the network"):
        stripped.on_train_start()
