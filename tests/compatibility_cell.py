"""One cell of the list of plans: a trainer in a setting, from its first step to a prediction of the imported model."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compatibility_settings import DATASET, PLANNED_PATCH, SETTINGS, Setting, prepare
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_l2g import trainers
from nnunet_l2g.architectures.glua import alignment
from nnunet_l2g.architectures.glua.translation import stage as translation_stage
from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers.adapted import AdaptedTrainer
from nnunet_l2g.training import stages
from nnunet_l2g.training.adapted_plans import AdaptedTarget

CPU = torch.device("cpu")
AUTOENCODER = {"width": 16, "depth": 1, "decoder_width": 16, "decoder_depth": 1}
TRANSLATION = {"translation_settings": {"width": 4}, "stage_settings": {"slices": 2, "crop": 32}}


@contextlib.contextmanager
def small_trainers() -> Iterator[None]:
    """Makes our trainers' networks small, and draws no figures. nnU-Net finds the same classes by name when it predicts."""
    with pytest.MonkeyPatch.context() as patch:
        for trainer in (getattr(trainers, name) for name in trainers.__all__):
            if issubclass(trainer, trainers.nnUNetTrainerGRCSF):
                small = {"dim": 16, "autoencoder": AUTOENCODER}
                patch.setattr(trainer, "network_settings", {**trainer.network_settings, **small})
                patch.setattr(trainer, "draw_picture", lambda *_: None)
            if issubclass(trainer, trainers.nnUNetTrainerGLUA):
                for name, value in TRANSLATION.items():
                    patch.setattr(trainer, name, value)
        patch.setattr(alignment, "WIDTHS", (32, 32))
        patch.setattr(stages, "draw_diagnostics", lambda *_: None)
        patch.setattr(translation_stage, "draw_translation", lambda *_: None)
        patch.setattr("nnunet_l2g.trainers.base.draw_diagnostics", lambda *_: None)
        patch.setattr("nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png", lambda *_: None)
        patch.setenv(VARIABLE, with_trainers(""))
        find = predict_from_raw_data.recursive_find_trainer_class_by_name
        patch.setattr(predict_from_raw_data, find.__name__, functools.cache(find))  # it imports all of nnU-Net's trainers
        yield


class Bench:
    """Plans the dataset of each setting once, below a folder."""

    def __init__(self, folder: Path):
        self.folder, self.plans = folder, {}

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[tuple[Setting, dict]]:
        """A setting and its plans. nnU-Net's variables are set, with a results folder for this context alone."""
        setting, folder = SETTINGS[name], self.folder / name.replace(" ", "_")
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as results:
            for kind in ("raw", "preprocessed"):
                patch.setenv(f"nnUNet_{kind}", str(folder / f"nnUNet_{kind}"))
            patch.setenv("nnUNet_results", f"{results}/nnUNet_results")
            if name not in self.plans:
                self.plans[name] = prepare(setting, folder)
            yield setting, json.loads(json.dumps(self.plans[name]))

    def check(self, trainer: str, setting: str) -> str:
        """Runs a cell. Returns "" for a pass, or the message of a refusal, which comes before anything is trained."""
        with self.at(setting) as (what, plans):
            return check_cell(trainer, what, plans)


def check_cell(name: str, setting: Setting, plans: dict) -> str:
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        trainer = make_trainer(getattr(trainers, name), setting, plans)
        trainer.initialize()
    except (NotImplementedError, UserError) as refusal:
        return str(refusal)
    build_as_planned(trainer, setting)
    trainer.run_training()  # two epochs, so that all of GLUA is at work in the second; then checkpoint_final.pth
    logged = trainer.logger.local_logger.my_fantastic_logging
    for key in ("train_losses", "val_losses", *trainer.diagnostic_keys):
        assert len(logged[key]) == 2 and np.isfinite(logged[key]).all(), key
    for key, value in trainer.raw_network.state_dict().items():
        assert torch.isfinite(value).all(), key
    prediction = predict(Path(trainer.output_folder_base), setting)
    if setting.name == "3D":  # the export does the same with all plans
        for one, other in zip(prediction, predict(export_and_import(name, trainer), setting), strict=True):
            assert np.array_equal(one, other)
    return ""


def make_trainer(cls: type, setting: Setting, plans: dict):
    """Makes a trainer as nnU-Net's command does: two epochs of one step each, random batches, a target without files."""
    trainer = cls(plans | {"continue_training": False}, setting.configuration, 0, setting.dataset_json, CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1, 1
    trainer.get_dataloaders = lambda: tuple(itertools.repeat(make_batch(trainer, setting)) for _ in range(2))
    trainer._pictured = None  # GRCSF's patch for pictures, of a validation case
    if isinstance(trainer, AdaptedTrainer):
        trainer.target = AdaptedTarget("Dataset002_Target", Path(), [], [], [])  # batches need none
        trainer.measure_inverted_channels = lambda: [True] * setting.channels  # of files
    return trainer


def build_as_planned(trainer, setting: Setting) -> None:
    """Builds the network for the planned patch too, if a smaller patch is run."""
    if setting.shrink:
        configuration = trainer.configuration_manager.configuration
        planned = ConfigurationManager({**configuration, "patch_size": configuration[PLANNED_PATCH]})
        heads = trainer.label_manager.num_segmentation_heads
        trainer.build_network_architecture(trainer.plans_manager, planned, trainer.num_input_channels, heads, True)


def make_batch(trainer, setting: Setting) -> dict:
    """Random images with random labels in a quarter of each. nnU-Net's own transforms make the targets."""
    generator = torch.Generator().manual_seed(0)
    patch, labels = trainer.configuration_manager.patch_size, trainer.label_manager
    transforms = trainer.get_validation_transforms(
        trainer._get_deep_supervision_scales(),
        is_cascaded=trainer.is_cascaded,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    values = len(labels.all_labels)  # of 0, 1, ...; the ignore label is the next one
    samples = []
    for _ in range(trainer.batch_size):
        image = torch.randn(setting.channels, *patch, generator=generator)  # (C, *patch)
        # the previous stage's segmentation is a second channel, as in nnU-Net's loader
        segmentation = torch.zeros(1 + trainer.is_cascaded, *patch)
        corner = segmentation[..., -(-patch[-1] * 3 // 4) :]
        corner[:1] = torch.randint(0, values + labels.has_ignore_label, corner[:1].shape, generator=generator)
        corner[1:] = torch.randint(0, values, corner[1:].shape, generator=generator)
        samples.append(transforms(image=image, segmentation=segmentation))
    data = torch.stack([sample["image"] for sample in samples])  # (B, C, *patch)
    target = [torch.stack(scale) for scale in zip(*(sample["segmentation"] for sample in samples), strict=True)]
    unlabelled = 2 * torch.randn(data.shape, generator=generator) + 1
    return {"data": data, "target": target, "unlabelled": unlabelled, "keys": ["case0"] * len(samples)}


def predict(model: Path, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Labels (z, y, x) and probabilities (heads, z, y, x) of a random image, predicted in two windows with mirroring."""
    predictor = nnUNetPredictor(use_mirroring=not setting.shrink, device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    patch = list(predictor.configuration_manager.patch_size)
    shape = [1, *patch] if len(patch) == 2 else patch
    shape[-1] += shape[-1] // 2
    rng = np.random.default_rng(0)
    image = rng.normal(100, 50, (setting.channels, *shape)).astype(np.float32)  # (C, z, y, x)
    first = rng.integers(0, 3, (1, *shape)) if setting.configuration == "3d_cascade_fullres" else None
    labels, probabilities = predictor.predict_single_npy_array(
        image, {"spacing": list(setting.spacing)}, first, save_or_return_probabilities=True
    )
    manager = predictor.label_manager
    assert labels.shape == tuple(shape) and set(np.unique(labels)) <= set(manager.all_labels)
    assert probabilities.shape == (manager.num_segmentation_heads, *shape)
    assert np.isfinite(probabilities).all() and probabilities.std() > 0
    return labels, probabilities


def export_and_import(name: str, trainer) -> Path:
    """Exports the model to a zip and imports it into another results folder. Returns the imported model's folder."""
    fold, results = Path(trainer.output_folder), Path(os.environ["nnUNet_results"])
    for file in ("progress.png", "validation/summary.json"):  # made at the end of a training, demanded by the export
        (fold / file).parent.mkdir(exist_ok=True)
        (fold / file).write_text("{}")
    file, configurations = str(results.with_suffix(".zip")), (trainer.configuration_name,)
    plans = trainer.plans_manager.plans_name
    export_pretrained_model(DATASET, file, configurations, trainer=name, plans_identifier=plans, folds=(0,))
    other = results.with_name("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(other))
        install_model_from_zip_file(file)
    return other / Path(trainer.output_folder_base).relative_to(results)
