"""Patches of the unlabelled target beside nnU-Net's labelled batches."""

from __future__ import annotations

from collections.abc import Iterator

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_l2g.training.adapted_plans import AdaptedTarget


def target_dataset(target: AdaptedTarget):
    """nnU-Net's view of the images that `adapt` preprocessed."""
    return infer_dataset_class(str(target.folder))(str(target.folder), target.identifiers)


def target_stream(
    target: AdaptedTarget,
    batch_size: int,
    initial_patch_size,
    patch_size,
    label_manager,
    transforms,
    processes: int,
    pin_memory: bool = False,
) -> Iterator[dict]:
    """nnU-Net's loader on what `adapt` preprocessed: patches anywhere in the images, each as likely.

    No label is read: the segmentation of such a case is nnU-Net's nonzero mask, which the transform behind use_mask_for_norm
    needs.

    Parameters
    ----------
    initial_patch_size, patch_size
        Before and after `transforms`, without batch and channels.
    processes : int
        Workers that load and transform; 0: this process does.

    Returns
    -------
    Iterator of batches as nnU-Net's; `data` is (B, C, *patch). With workers it has `_finish()`.
    """
    loader = nnUNetDataLoader(
        target_dataset(target), batch_size, initial_patch_size, patch_size, label_manager, oversample_foreground_percent=0.0,
        transforms=transforms,
    )  # fmt: skip
    loader.has_ignore = False  # it would look for annotated voxels, and there are none
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader, None, processes, num_cached=max(3, processes), seeds=None, pin_memory=pin_memory, wait_time=0.002
    )


class WithUnlabelled:
    """Iterator: each batch of `labelled` with `unlabelled`, the images of the next batch of `target`, and their names."""

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
