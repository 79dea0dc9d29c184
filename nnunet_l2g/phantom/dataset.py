"""A whole nnU-Net raw dataset of phantoms."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from nnunet_l2g.phantom.case import (
    DEFAULT_SIZE,
    DEFAULT_SPACING,
    LABELS,
    check_grid,
    make_channels,
    resolve_labels,
)

MINIMUM_TRAINING = 5  # nnU-Net's five-fold split fails, late, on fewer
_SIZE_JITTER = (6, 6, 1)  # voxels that a case may be smaller; never larger, or nnU-Net's patch would be padded up


def write_dataset(
    folder: str | Path,
    num_training: int = 20,
    num_test: int = 4,
    contrast: str | tuple[str, ...] = "cine",
    scar: bool = False,
    seed: int = 0,
    *,
    dataset_id: int = 980,
    name: str = "CardiacPhantom",
    labels: str | None = None,
    size: tuple[int, ...] = DEFAULT_SIZE,
    spacing: tuple[float, ...] = DEFAULT_SPACING,
    regions: bool = False,
    ignore_label: bool = False,
) -> Path:
    """Writes `folder`/DatasetXXX_Name (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json) and returns its path.

    All files are written into `.DatasetXXX_Name.partial`, which nnU-Net does not look at, and renamed at the end: a
    DatasetXXX_Name that exists is complete. A partial one that was left behind is removed by the next call.
    Same arguments, same voxels. Training and test cases come from separate streams, so more training cases leave the
    test cases as they are. A case is up to 6 voxels in-plane and 1 slice smaller than
    `size`, as far as the minimum allows.

    Parameters
    ----------
    folder : nnU-Net's nnUNet_raw folder; made if missing
    num_training, num_test : cases; at least 5 and 0
    contrast : "cine", "late_enhancement", "black_blood", or a tuple of contrasts: one input channel each, aligned
    scar, labels, size, spacing : see `make_case`. A size of two numbers writes 2D cases as PNG, nnU-Net's format for 2D
        (16 bit; PNG holds no spacing).
    seed : of the dataset
    dataset_id, name : 1 to 999 and letters, digits or underscores: the folder is DatasetXXX_Name
    regions : nested regions instead of labels in dataset.json (heart, left heart, [scar,] blood pool)
    ignore_label : adds nnU-Net's ignore label and gives it to a quarter of each training case (8x8 in-plane columns)

    Raises
    ------
    ValueError : an argument that cannot be used
    FileExistsError : the dataset exists
    """
    contrasts = (contrast,) if isinstance(contrast, str) else tuple(contrast)
    labels = resolve_labels(labels, scar)
    check_grid(seed, contrasts, size, spacing)
    _check_arguments(num_training, num_test, dataset_id, name, labels, regions)
    target = Path(folder) / f"Dataset{dataset_id:03d}_{name}"
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or choose another dataset_id or name")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)

    for split, count, stream in (("Tr", num_training, 0), ("Ts", num_test, 1)):
        for kind in ("images", "labels"):
            (partial / (kind + split)).mkdir(parents=True)
        for index in range(count):
            _write_case(
                partial,
                split,
                index,
                np.random.default_rng([seed, stream, index]),
                contrasts,
                scar,
                labels,
                size,
                spacing,
                mask=ignore_label and split == "Tr",
            )
    description = dataset_json(num_training, contrasts, labels, regions, ignore_label, two_dimensional=len(size) == 2)
    (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.rename(target)
    return target


def dataset_json(
    num_training: int, contrasts: tuple[str, ...], labels: str, regions: bool, ignore_label: bool, two_dimensional: bool
) -> dict:
    """The content of dataset.json. Regions are painted in the order of `regions_class_order`, largest first."""
    values = LABELS[labels]
    names: dict = {"background": 0, **values}
    description: dict = {"channel_names": {str(i): c for i, c in enumerate(contrasts)}}
    if regions:
        everything = sorted(values.values())
        names = {"background": 0, "heart": everything, "left_heart": [v for v in everything if v != 3]}
        order = [3, 2]
        if "scar" in values:
            names["scar"] = values["scar"]
            order.append(values["scar"])
        names["left_ventricle"] = 1
        description["regions_class_order"] = [*order, 1]
    if ignore_label:
        names["ignore"] = max(values.values()) + 1
    description |= {"labels": names, "numTraining": num_training}
    return description | {"file_ending": ".png" if two_dimensional else ".nii.gz"}


def _check_arguments(num_training, num_test, dataset_id, name, labels, regions) -> None:
    if num_training < MINIMUM_TRAINING:
        raise ValueError(
            f"num_training={num_training}: expected at least {MINIMUM_TRAINING}, because nnU-Net splits "
            "the training cases into 5 folds; ask for more"
        )
    if num_test < 0:
        raise ValueError(f"num_test={num_test}: expected 0 or more")
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"dataset_id={dataset_id}: expected 1 to 999, nnU-Net's three digits")
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(f"name={name!r}: expected letters, digits and underscores")
    if regions and labels == "scar":
        raise ValueError("regions=True needs nested structures, but labels='scar' has one; use labels='anatomy_scar'")


def _write_case(folder, split, index, rng, contrasts, scar, labels, size, spacing, mask) -> None:
    import SimpleITK

    varied = tuple(
        max(int(n) - int(rng.integers(0, j + 1)), low) for n, j, low in zip(size, _SIZE_JITTER, (32, 32, 6), strict=False)
    )
    images, label = make_channels(int(rng.integers(2**63)), contrasts, scar, labels, varied, spacing)
    if mask:
        label = _mask_columns(label, rng, max(LABELS[labels].values()) + 1)
    two_dimensional = len(size) == 2
    ending = ".png" if two_dimensional else ".nii.gz"
    case = f"phantom_{split.lower()}{index:03d}"
    for channel, image in enumerate(images):
        if two_dimensional:
            image = SimpleITK.Cast(image, SimpleITK.sitkUInt16)  # PNG has no signed type; the signal is not negative
        SimpleITK.WriteImage(image, folder / f"images{split}" / f"{case}_{channel:04d}{ending}")
    SimpleITK.WriteImage(label, folder / f"labels{split}" / f"{case}{ending}")


def _mask_columns(label, rng: np.random.Generator, value: int):
    """Sets a random quarter of the in-plane 8 x 8 voxel columns to `value`, nnU-Net's ignore label."""
    import SimpleITK

    array = SimpleITK.GetArrayFromImage(label)  # (z, y, x) or (y, x)
    height, width = array.shape[-2:]
    blocks = rng.random((-(-height // 8), -(-width // 8))) < 0.25
    array[..., np.kron(blocks, np.ones((8, 8), bool))[:height, :width]] = value
    masked = SimpleITK.GetImageFromArray(array)
    masked.CopyInformation(label)
    return masked
