"""Patches of the unlabelled target beside nnU-Net's labelled batches."""

from __future__ import annotations

from collections.abc import Iterator

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_l2g.training.adapted_plans import AdaptedTarget


def target_dataset(target: AdaptedTarget):
    """nnU-Net's data set of the images that `adapt` preprocessed."""
    return infer_dataset_class(str(target.folder))(str(target.folder), target.identifiers)


def target_streams(trainer: nnUNetTrainer, target: AdaptedTarget) -> list[Iterator[dict]]:
    """nnU-Net's loaders of the target for training and for validation, as `trainer` has them for the source.

    Patches are drawn uniformly, and no label is read. The segmentation of such a case is nnU-Net's nonzero mask, which the
    transform for use_mask_for_norm needs. `data` of a batch is (B, C, *patch). With workers a loader has `_finish()`.
    """
    configuration, workers = trainer.configuration_manager, get_allowed_n_proc_DA()
    patch, masks = configuration.patch_size, configuration.use_mask_for_norm
    rotation, dummy_2d, initial_patch, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    training = nnUNetTrainer.get_training_transforms(patch, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=masks)
    validation = nnUNetTrainer.get_validation_transforms(None)
    streams = []
    for initial, transforms, processes in (
        (initial_patch, training, workers // 2 or min(1, workers)),
        (patch, validation, min(1, workers)),
    ):
        loader = nnUNetDataLoader(
            target_dataset(target), trainer.batch_size, initial, patch, trainer.label_manager,
            oversample_foreground_percent=0.0, transforms=transforms,
        )  # fmt: skip
        loader.has_ignore = False  # it would look for annotated voxels, and there are none
        if processes == 0:
            streams.append(SingleThreadedAugmenter(loader, None))
            continue
        pinned = trainer.device.type == "cuda"
        streams.append(
            NonDetMultiThreadedAugmenter(
                loader, None, processes, num_cached=max(3, processes), seeds=None, pin_memory=pinned, wait_time=0.002
            )
        )
    return streams


class WithUnlabelled:
    """Each batch of `labelled`, with the images of the next batch of `target` as `unlabelled` and their `unlabelled_keys`."""

    def __init__(self, labelled: Iterator[dict], target: Iterator[dict]):
        self.labelled, self.target = labelled, target

    def __iter__(self) -> WithUnlabelled:
        return self

    def __next__(self) -> dict:
        target = next(self.target)
        return {**next(self.labelled), "unlabelled": target["data"], "unlabelled_keys": target["keys"]}

    def finish(self) -> None:
        """Ends the worker processes."""
        for stream in (self.labelled, self.target):
            if hasattr(stream, "_finish"):
                stream._finish()
