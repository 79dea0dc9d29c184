"""GLUA's trainers in this process: ablations, stages, data, refusals, and the control."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from glua_trainers import a_batch, make, run_epochs
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from planned import PLAIN, RICH, TARGET
from test_trainers import CPU, make_batch

from nnunet_l2g.architectures.glua.target_stream import WithUnlabelled
from nnunet_l2g.errors import UserError
from nnunet_l2g.training.adapted_plans import AdaptedTarget
from nnunet_l2g.training.random_intensity import RandomIntensity

ABLATIONS = ("GLUA", "GLUATranslationOnly", "GLUANoMask", "GLUANoTranslation", "GLUASelfTraining")


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_and_logs_its_own(adapted_folders, name):
    trainer = make(adapted_folders, name)
    trainer.on_train_start()
    run_epochs(trainer, 4)
    logging = trainer.logger.local_logger.my_fantastic_logging
    expected = {"gap_intensity", "gap_features"}
    expected |= {"gap_intensity_translated", "gap_features_translated"} if name != "GLUANoTranslation" else set()
    expected |= {"mask_mean", "domain_accuracy", "alignment_weight"} if name != "GLUATranslationOnly" else set()
    expected |= {"confident_share"} if name == "GLUASelfTraining" else set()
    assert set(trainer.diagnostic_keys) == expected
    assert all(len(logging[key]) == 4 and np.isfinite(logging[key]).all() for key in expected)
    assert Path(trainer.output_folder, "stage_translation.pth").exists() == (name != "GLUANoTranslation")
    if name != "GLUATranslationOnly":
        assert logging["alignment_weight"] == pytest.approx(
            [0, 1e-3 + 4e-3 * (1 / 3 - 0.2) / 0.8, 1e-3 + 4e-3 * (2 / 3 - 0.2) / 0.8, 5e-3]
        )
    trainer.on_train_end()
    # a prediction's network: plain nnU-Net's keys and the settings
    saved = torch.load(trainer.output_folder + "/checkpoint_final.pth", weights_only=False)["network_weights"]
    plain = nnUNetTrainer(trainer.plans_manager.plans | {"continue_training": False}, "2d", 0, trainer.dataset_json, CPU)
    plain.initialize()
    assert saved.keys() - plain.network.state_dict().keys() == {"settings"}
    network = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, False
    )
    network.load_state_dict(saved)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("dataset", [PLAIN, RICH])
def test_regions_ignore_label_channels_and_dimensions(adapted_folders, dataset, configuration):
    trainer = make(adapted_folders, "GLUASelfTraining", dataset, configuration, plans="nnUNetPlans")
    folder = trainer.preprocessed_dataset_folder  # itself: batches need no target, and what is measured finds equal channels
    trainer.target = AdaptedTarget(dataset, Path(folder), infer_dataset_class(folder).get_identifiers(folder), [], [])
    trainer.on_train_start()
    assert trainer.translator.inverted.tolist() == [False] * (2 if dataset == RICH else 1)
    trainer.current_epoch = 3
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    # nnU-Net leaves the lowest scale's head out of the loss
    gradients = {key: p.grad for key, p in trainer.network.named_parameters() if ".seg_layers.0." not in key}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert np.isfinite(list(trainer.diagnostics().values())).all()


def test_some_samples_are_translated_each_in_its_style_and_labels_stay(adapted_folders):
    trainer = make(adapted_folders)
    trainer.initialize()
    drawn = []
    trainer.translator.draw_styles = lambda n: torch.rand(n, 8)
    trainer.translator.translate = lambda x, styles: drawn.append(styles) or x + 1000
    images, shares = torch.randn(10, 1, 8, 8), []
    kept = images.clone()
    for _ in range(40):
        found = trainer._translate_some(images)
        changed = (found - images > 500).flatten(1).all(1)
        assert torch.equal(changed, trainer._translated) and torch.equal(found[~changed], images[~changed])
        assert torch.equal(images, kept)
        shares.append(float(changed.float().mean()))
    assert 0.6 < np.mean(shares) < 0.8
    assert len(torch.cat(drawn).unique(dim=0)) == round(10 * sum(shares))

    batch = a_batch(trainer)
    labels, seen = [t.clone() for t in batch["target"]], {}
    trainer.network.register_forward_pre_hook(lambda m, args: seen.update(data=args[0], unlabelled=m.unlabelled))
    loss, trainer.loss = trainer.loss, lambda output, target: seen.update(target=target) or loss(output, target)
    trainer.translated_share = 1.0
    trainer.train_step(batch)
    torch.testing.assert_close(seen["data"], batch["data"] + 1000)
    assert torch.equal(seen["unlabelled"], batch["unlabelled"])
    assert all(torch.equal(one, two) for one, two in zip(seen["target"], labels, strict=True))
    assert trainer.network.unlabelled is None


def test_ablations_lack_what_their_name_says(adapted_folders):
    only = make(adapted_folders, "GLUATranslationOnly")
    only.initialize()
    assert only.alignment_of_features is None and "alignment" not in only.extra_state()
    only.network.register_forward_pre_hook(lambda m, args: None if m.unlabelled is None else pytest.fail("encoded the target"))
    only.train_step(a_batch(only))
    without = make(adapted_folders, "GLUANoTranslation")
    without.initialize()
    assert without.stages() == [] and without.translator is None and "translator" not in without.extra_state()
    images = torch.randn(2, 1, 8, 8)
    assert without._translate_some(images) is images and without._translated is None
    unmasked = make(adapted_folders, "GLUANoMask")
    unmasked.initialize()
    assert not unmasked.alignment_of_features.mask


@pytest.mark.parametrize(
    ("epochs", "iterations", "expected"), [(1000, 250, 32), (20, 250, 10), (1, 250, 1), (4, 10, 2), (100, 10000, 1)]
)
def test_the_length_of_the_translation(adapted_folders, epochs, iterations, expected):
    trainer = make(adapted_folders, epochs=epochs, iterations=iterations)
    trainer.initialize()
    (stage,) = trainer.stages()
    assert (stage.epochs, stage.iterations) == (expected, iterations)
    assert stage.settings["target"] == TARGET


def test_a_step_that_the_gradient_scaler_skips_moves_no_discriminator(adapted_folders):
    trainer = make(adapted_folders, "GLUANoTranslation")
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    trainer.train_step(a_batch(trainer))
    before = copy.deepcopy(trainer.alignment_of_features.discriminator.state_dict())
    assert int(before["batches"]) == 1
    trainer.loss = lambda output, target: output[0].sum() * float("inf")
    trainer.train_step(a_batch(trainer))
    after = trainer.alignment_of_features.discriminator.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# ---- data ----


def test_target_patches_come_with_every_batch_and_domains_are_sampled_alike_in_the_stage(adapted_folders, monkeypatch):
    trainer, oversampled = make(adapted_folders, batches=False), []

    def note_oversampling(stage, *args, **kwargs):
        oversampled.append(trainer.dataloader_train.labelled.data_loader.oversample_foreground_percent)

    monkeypatch.setattr("nnunet_l2g.trainers.base.run_stage", note_oversampling)
    trainer.on_train_start()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        assert isinstance(loader, WithUnlabelled)
        source, target = loader.labelled.data_loader, loader.target.data_loader
        oversampled.append(source.oversample_foreground_percent)
        assert target.oversample_foreground_percent == 0 and not target.has_ignore
        batch = next(loader)
        assert batch["unlabelled"].shape == batch["data"].shape
        assert str(adapted_folders.path("preprocessed", TARGET)) in target._data.source_folder
        assert target.indices == [f"phantom_tr{i:03d}" for i in range(5)]
    assert oversampled == [0.0, 0.33, 0.33]


@pytest.mark.parametrize("of_source", [True, False])
def test_masks_for_normalisation_are_each_domains_own(adapted_folders, of_source):
    trainer = make(adapted_folders, batches=False)
    trainer.initialize()
    if of_source:
        trainer.target = dataclasses.replace(trainer.target, source_use_mask_for_norm=[True])
    else:
        trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
    loader, _ = trainer.get_dataloaders()
    masked = [
        any(type(t).__name__ == "MaskImageTransform" for t in stream.data_loader.transforms.transforms)
        for stream in (loader.labelled, loader.target)
    ]
    assert masked == [of_source, not of_source]


@pytest.mark.usefixtures("threads_for_processes")
def test_a_whole_training_on_the_loaders_without_any_label_of_the_target(adapted_folders):
    assert not adapted_folders.path("raw", TARGET, "labelsTr").exists()
    raw = adapted_folders.path("raw", TARGET)
    raw.rename(raw.with_name("away"))  # not even its images
    try:
        trainer = make(adapted_folders, batches=False)
        trainer.run_training()
    finally:
        raw.with_name("away").rename(raw)
    assert Path(trainer.output_folder, "checkpoint_final.pth").exists()
    assert not torch.equal(trainer.translator.target_styles, torch.zeros_like(trainer.translator.target_styles))


# ---- refusals and the control ----


def test_plans_without_a_target_are_refused_before_anything_is_computed(adapted_folders):
    trainer = make(adapted_folders, plans="nnUNetPlans")
    trainer.get_dataloaders = lambda: pytest.fail("loaded data")
    with pytest.raises(UserError, match="name no target; make some with `nnunet_l2g adapt -s 981"):
        trainer.on_train_start()


@pytest.mark.parametrize("name", ["GLUA", "RandomIntensity"])
def test_cascades_are_refused(adapted_folders, name):
    folder = adapted_folders.path("preprocessed", PLAIN)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "cascadePlans.json").write_text(json.dumps(plans))
    trainer = make(adapted_folders, name, configuration="3d_cascade_fullres", plans="cascadePlans")
    with pytest.raises(NotImplementedError, match="do not support cascades"):
        trainer.initialize()


@pytest.mark.parametrize("dataset", [PLAIN, RICH])
def test_the_random_intensity_control_needs_no_target_and_changes_images_alone(adapted_folders, dataset):
    trainer = make(adapted_folders, "RandomIntensity", dataset, plans="nnUNetPlans")
    trainer.get_dataloaders = lambda: tuple(itertools.repeat(make_batch(trainer, 2)) for _ in range(2))
    trainer.on_train_start()
    trainer.random_intensity = RandomIntensity(1.0)
    seen, batch = {}, make_batch(trainer, 2)
    kept = copy.deepcopy(batch)
    trainer.network.register_forward_pre_hook(lambda m, args: seen.update(data=args[0]))
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert not torch.equal(seen["data"], batch["data"]) and torch.equal(batch["data"], kept["data"])
    assert all(torch.equal(one, two) for one, two in zip(batch["target"], kept["target"], strict=True))
    assert trainer.diagnostic_keys == [] and trainer.extra_state() == {}
    run_epochs(trainer, 1)
