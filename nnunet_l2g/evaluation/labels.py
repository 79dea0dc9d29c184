"""What dataset.json says of segmentations: labels or regions by name, the ignore label, the file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, is_plain_name, read_json
from nnunet_l2g.lookup import quiet


@dataclass(frozen=True)
class Labels:
    """The structures of a dataset.

    structures : (name, label values that belong to it), in dataset.json's order, without background
    known : every value that a segmentation may hold
    ignore : value of unannotated voxels in the reference, or None
    file_ending : of the segmentations, with the dot
    reader : nnU-Net's reader class
    no_spacing : whether all files lack a spacing although their format can have one; see `cases.with_unit`
    """

    structures: tuple[tuple[str, tuple[int, ...]], ...]
    known: tuple[int, ...]
    ignore: int | None
    file_ending: str
    reader: type
    no_spacing: bool = False

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.structures]

    @property
    def pixels(self) -> bool:
        """Whether distances are in pixels, because the files hold no spacing."""
        return self.no_spacing or self.reader.__name__ == "NaturalImage2DIO"

    def mask(self, segmentation: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
        """Where the segmentation has one of these values; bool, of its shape."""
        return segmentation == values[0] if len(values) == 1 else np.isin(segmentation, values)


def read_labels(dataset_json: Path, example: Path | None = None) -> Labels:
    """Reads dataset.json with nnU-Net's LabelManager, and chooses nnU-Net's reader.

    Parameters
    ----------
    dataset_json : nnU-Net's file
    example : a segmentation that the reader has to open; None takes the first reader of the file ending

    Raises
    ------
    UserError : the file is missing, no JSON, or not what nnU-Net expects; no structure; no reader
    """
    content = read_dataset_json(dataset_json)
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    try:
        manager = LabelManager(content["labels"], regions_class_order=content.get("regions_class_order"))
        structures = tuple(
            (name, tuple(int(value) for value in (values if isinstance(values, (list, tuple)) else [values])))
            for name, values in content["labels"].items()
            if name not in ("background", "ignore") and values not in (0, [0])
        )
        known = tuple(int(value) for value in manager.all_labels)
        ignore, ending = manager.ignore_label, content["file_ending"]
        if not all(values for _, values in structures):
            raise ValueError("a region is empty")
    except (*DAMAGE, AssertionError, RuntimeError) as error:
        raise UserError(
            f"{dataset_json}: not a dataset.json that nnU-Net can use ({error!r}); correct it, or use another: --dataset-json"
        ) from error
    if not structures:
        raise UserError(f"{dataset_json}: no label beside background; there is nothing to evaluate")
    return Labels(structures, known, ignore, ending, _reader(content, dataset_json, example))


def read_dataset_json(path: Path) -> dict:
    """The file's content. UserError if it is missing or is not nnU-Net's dataset.json."""
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); nnU-Net's dataset.json is needed") from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); correct it, or name another with --dataset-json") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{path}: has no "labels"; expected nnU-Net\'s dataset.json')
    check_version(content, path)
    channels, ending = content.get("channel_names", content.get("modality", {})), content.get("file_ending", ".")
    if not isinstance(channels, dict) or not all(isinstance(name, str) for name in channels.values()):
        raise UserError(f"{path}: channel_names are {str(channels)[:80]}; expected a name for each channel's number")
    if not (isinstance(ending, str) and ending.startswith(".") and is_plain_name(f"image{ending}")):
        raise UserError(f"{path}: file_ending is {str(ending)[:80]!r}; expected one such as .nii.gz")
    return content


def check_version(content: dict, path: Path) -> None:
    """UserError for a dataset.json of nnU-Net's first version, which names neither channels nor file ending."""
    if "modality" in content and not {"channel_names", "file_ending"} & content.keys():
        raise UserError(
            f'{path}: of nnU-Net version 1 ("modality", no "channel_names" and no "file_ending"); convert the dataset with '
            "nnUNetv2_convert_old_nnUNet_dataset, or write channel_names, labels as {name: value}, and file_ending by hand"
        )


def _reader(content: dict, dataset_json: Path, example: Path | None) -> type:
    try:
        with quiet():
            from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

            return determine_reader_writer_from_dataset_json(content, None if example is None else str(example), verbose=False)
    except (RuntimeError, TypeError) as error:
        if example is not None and _reader(content, dataset_json, None):
            raise UserError(f"{example}: none of nnU-Net's readers can open it; replace the file, or write it again") from error
        raise UserError(
            f"{dataset_json}: nnU-Net has no reader for {content['file_ending']!r}; expected a format that it supports, such "
            "as .nii.gz or .png"
        ) from error
