"""Contrast inversion: how it is measured, what the translation does with it, and nnUNetTrainerGLUAInversionOnly."""

import numpy as np
import pytest
import torch
from glua_trainers import a_batch, make, run_epochs, saved_after, strip
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.stats import wasserstein_distance
from test_translation import make as make_translator

from nnunet_l2g.architectures.glua import contrast_inversion as module
from nnunet_l2g.architectures.glua.contrast_inversion import (
    ContrastDistances,
    invert_contrast,
    inverted_dataset_class,
    measure_contrast_distances,
)
from nnunet_l2g.architectures.glua.target_stream import WithUnlabelled
from nnunet_l2g.architectures.glua.translation.stage import TranslationStage
from nnunet_l2g.errors import UserError
from nnunet_l2g.phantom import make_case
from nnunet_l2g.trainers import adapted

NAME = "GLUAInversionOnly"
UNKNOWN = "does not say which of 1 channels of the source are inverted"


class Cases:
    """As nnU-Net's datasets: names, and images (C, Z, Y, X) by name; segmentations that must not be read."""

    def __init__(self, images):
        self.images = {f"case_{n:03d}": image for n, image in enumerate(images)}
        self.identifiers = list(self.images)

    def load_case(self, name):
        return self.images[name], None, None, {}


def skewed(number, channels=1, seed=0, side=24):
    """Mean 0, deviation 1, a long tail of bright voxels."""
    values = np.random.default_rng(seed).exponential(size=(number, channels, 3, side, side)) - 1
    return values.astype(np.float32)


def hearts(seeds, contrast):
    import SimpleITK

    images = [SimpleITK.GetArrayFromImage(make_case(s, contrast, size=(40, 40, 8), spacing=(2.9, 2.9, 10.0))[0]) for s in seeds]
    return Cases([((image - image.mean()) / image.std())[None] for image in images])


# ---- measuring ----


def test_distances_are_those_of_the_whole_images(monkeypatch):
    source, target = skewed(6), -skewed(5, seed=1)
    whole = [wasserstein_distance(sign * source.ravel(), target.ravel()) for sign in (1, -1)]
    for seed in range(3):
        (found,) = measure_contrast_distances(Cases(source), Cases(target), seed)
        np.testing.assert_allclose(found, whole, atol=0.04)
    assert found == measure_contrast_distances(Cases(source), Cases(target), 2)[0]
    monkeypatch.setattr(module, "CASES", 2)  # reads no more cases than that
    read = Cases(source)
    original, names = read.load_case, []
    read.load_case = lambda name: names.append(name) or original(name)
    measure_contrast_distances(read, Cases(target))
    assert len(names) == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 2), st.floats(-0.5, 0.5))
def test_inverting_the_source_swaps_the_distances(seed, scale, location):
    source, target = Cases(skewed(3, seed=seed)), Cases(scale * skewed(3, seed=seed + 1) + location)
    ((as_it_is, inverted),) = measure_contrast_distances(source, target)
    swapped = measure_contrast_distances(Cases([-x for x in source.images.values()]), target)
    assert swapped == [(inverted, as_it_is)]


def test_each_channel_is_measured_alone_and_doubt_leaves_it_as_it_is():
    source = skewed(8, 3)
    target = skewed(8, 3, seed=1) * np.array([1, -1, 1], dtype=np.float32)[:, None, None, None]
    assert [found.invert for found in measure_contrast_distances(Cases(source), Cases(target))] == [False, True, False]
    assert not ContrastDistances(1.0, 0.76).invert and ContrastDistances(1.0, 0.74).invert
    assert not ContrastDistances(0.04, 0.0).invert and ContrastDistances(0.06, 0.0).invert


def test_equal_symmetric_domains_are_not_inverted():
    """Both distances come from the choice of cases. Either may be half of the other, and both are far too small."""
    for seed in range(4):
        noise = np.random.default_rng(seed).standard_normal((40, 1, 4, 40, 40))
        (found,) = measure_contrast_distances(Cases(noise[:20]), Cases(noise[20:]))
        assert not found.invert and max(found) < module.SMALLEST_DISTANCE / 2


@pytest.mark.parametrize("contrast", ["cine", "black_blood"])
def test_dark_air_in_both_domains_speaks_against_inversion(contrast):
    """Blood is bright in cine and dark in black blood, and still inversion makes the whole image more distant."""
    (found,) = measure_contrast_distances(hearts(range(6), "cine"), hearts(range(20, 26), contrast))
    assert not found.invert and found.inverted > 2 * found.as_it_is


# ---- inverting ----


def test_only_the_channels_named_are_inverted_and_the_type_stays():
    x = torch.randn(3, 2, 4, 5)
    inverted = invert_contrast(x, torch.tensor([False, True]), channel_axis=1)
    assert torch.equal(inverted[:, 0], x[:, 0]) and torch.equal(inverted[:, 1], -x[:, 1])
    array = invert_contrast(x[0].numpy(), np.array([False, True]))
    assert np.array_equal(array, inverted[0].numpy()) and array.dtype == np.float32
    assert invert_contrast(x.bfloat16(), torch.tensor([False, True]), channel_axis=1).dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [2, 3])
def test_the_translator_inverts_the_source_before_it_is_encoded(dims):
    translator = make_translator(2, dims).eval()
    x, styles = torch.randn(2, 2, *[5] * (dims - 2), 16, 20), torch.randn(2, 8)
    inverted = torch.tensor([False, True])
    expected = translator.translate(invert_contrast(x, inverted, channel_axis=1), styles)
    translator.inverted[1] = True
    assert torch.equal(translator.translate(x, styles), expected)


def test_the_stage_trains_on_the_inverted_source_and_on_the_target_as_it_is():
    batch = {"data": torch.full((2, 2, 16, 16), 3.0), "unlabelled": torch.full((2, 2, 16, 16), 5.0)}
    translator = make_translator(2)
    translator.inverted[0] = True
    stage = TranslationStage(translator, torch.device("cpu"), 1, 1, 1, {}, slices=2)
    source, target, *_ = stage._choose_slices(batch, 0)
    assert [round(float(x[:, c].mean())) for x in (source, target) for c in range(2)] == [-3, 3, 5, 5]


# ---- the trainer that does nothing else ----


@pytest.fixture
def inverting(monkeypatch):
    monkeypatch.setattr(adapted, "measure_contrast_distances", lambda source, target: [ContrastDistances(1.0, 0.125)])


@pytest.mark.usefixtures("inverting")
def test_training_and_pseudo_dice_see_the_inverted_source(adapted_folders, capsys):
    trainer = make(adapted_folders, NAME)
    trainer.on_train_start()
    assert "Channel 0 of the source is inverted" in capsys.readouterr().out
    seen, batch = [], a_batch(trainer)
    kept = batch["data"].clone()
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train_step(batch)
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(batch)
    assert len(seen) == 2 and all(torch.equal(images, -kept) for images in seen)
    assert torch.equal(batch["data"], kept)


def test_a_source_that_stays_as_it_is_warns_and_has_nnunets_own_loaders(adapted_folders, capsys):
    trainer = make(adapted_folders, NAME, batches=False)
    trainer.on_train_start()  # measured on what `adapt` made
    assert "WARNING: no channel of the source is nearer to the target after inversion" in capsys.readouterr().out
    assert not any(isinstance(loader, WithUnlabelled) for loader in (trainer.dataloader_train, trainer.dataloader_val))
    seen, batch = [], next(trainer.dataloader_train)
    assert "unlabelled" not in batch and trainer.diagnostic_keys == []
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train_step(batch)
    assert torch.equal(seen[0], batch["data"])


@pytest.mark.usefixtures("inverting", "threads_for_processes")
def test_full_images_are_validated_inverted_and_the_data_set_stays_nnunets(adapted_folders):
    trainer = make(adapted_folders, NAME)
    trainer.fold = "all"  # for which nnU-Net asks the data set's class for more than with a number
    trainer.on_train_start()
    plain = trainer.dataset_class
    keys = sorted(trainer.do_split()[1])
    images = {key: plain(trainer.preprocessed_dataset_folder, keys).load_case(key)[0][:] for key in keys}
    inverted = inverted_dataset_class(plain, np.array([True]))(trainer.preprocessed_dataset_folder, keys)
    assert list(inverted.identifiers) == list(keys)
    for key in keys:
        data, *rest = inverted.load_case(key)
        assert np.array_equal(data, -images[key]) and len(rest) == 3 and data.dtype == np.float32

    values = np.unique(np.concatenate([image.ravel() for image in images.values()]))
    seen = []
    trainer.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    trainer.perform_actual_validation()
    patches = np.unique(np.concatenate([patch.ravel() for patch in seen]))
    assert np.isin(patches[patches != 0], -values).all()  # 0: beyond the image
    assert not np.isin(patches, values).all()
    assert trainer.dataset_class is plain


@pytest.mark.usefixtures("inverting")
def test_inverted_channels_are_in_the_checkpoint_and_not_measured_again(adapted_folders, monkeypatch):
    file = saved_after(make(adapted_folders, NAME), 1)
    monkeypatch.setattr(adapted, "measure_contrast_distances", lambda *_: pytest.fail("measured again"))
    resumed = make(adapted_folders, NAME, continues=True)
    resumed.load_checkpoint(file)
    resumed.on_train_start()
    assert resumed.inverted.tolist() == [True]
    run_epochs(resumed, 1)
    for state in ({}, {"polarity": torch.ones(1)}, {"inverted": torch.ones(2).bool()}):  # an older version's, too
        with pytest.raises(UserError, match=UNKNOWN):
            resumed.load_extra_state(state)


@pytest.mark.usefixtures("inverting")
def test_a_stripped_checkpoint_is_not_validated_nor_continued(adapted_folders, monkeypatch):
    file = strip(saved_after(make(adapted_folders, NAME), 1))
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: pytest.fail("validated"))
    stripped = make(adapted_folders, NAME, continues=True)
    stripped.load_checkpoint(file)
    with pytest.raises(UserError, match=UNKNOWN):
        stripped.perform_actual_validation()
    with pytest.raises(UserError, match="has nothing of what Small keeps beside the network"):
        stripped.on_train_start()
