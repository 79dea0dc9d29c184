"""A whole nnU-Net raw dataset of phantoms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from nnunet_l2g.phantom.case import LABELS, SIZE, SMALLEST, SPACING, make_channels

SMALLER = (6, 6, 1)  # voxels that a case may be smaller than `size`; never larger, or nnU-Net's patch would be rounded up


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
    size: tuple[int, ...] = SIZE,
    spacing: tuple[float, ...] = SPACING,
    regions: bool = False,
    ignore_label: bool = False,
) -> Path:
    """Writes `folder`/DatasetXXX_Name (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json) and returns its path.

    All files are written into `.DatasetXXX_Name.partial` and renamed at the end, so a DatasetXXX_Name that exists is complete.
    The same arguments give the same voxels, and more training cases leave the test cases as they are.

    Parameters
    ----------
    folder : nnU-Net's nnUNet_raw
    num_training, num_test : cases; nnU-Net splits the training cases into five folds, so it needs 5
    contrast : a key of CONTRASTS, or a tuple of them: one input channel each, aligned
    scar, spacing : see `make_case`
    size : see `make_case`; cases are up to 6 voxels in-plane and 1 slice smaller. Two numbers give 2D cases as PNG.
    dataset_id, name : the folder is DatasetXXX_Name
    regions : nested regions instead of labels in dataset.json (heart, left heart, scar if there is one, blood pool)
    ignore_label : gives nnU-Net's ignore label to a quarter of each training case (8 x 8 in-plane columns)

    Raises
    ------
    FileExistsError : the dataset exists
    """
    contrasts = (contrast,) if isinstance(contrast, str) else tuple(contrast)
    labels = LABELS["anatomy_scar" if scar else "anatomy"]
    target = Path(folder) / f"Dataset{dataset_id:03d}_{name}"
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or choose another dataset_id or name")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    ignore = max(labels.values()) + 1 if ignore_label else None
    for split, count, stream in (("Tr", num_training, 0), ("Ts", num_test, 1)):
        for kind in ("images", "labels"):
            (partial / (kind + split)).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, stream, index])
            case = f"phantom_{split.lower()}{index:03d}"
            _write_case(partial, split, case, rng, contrasts, scar, size, spacing, ignore if split == "Tr" else None)
    description = dataset_json(num_training, contrasts, labels, regions, ignore, ".png" if len(size) == 2 else ".nii.gz")
    (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.rename(target)
    return target


def dataset_json(num_training: int, contrasts: tuple, labels: dict, regions: bool, ignore: int | None, ending: str) -> dict:
    """The content of dataset.json."""
    names, order = {"background": 0, **labels}, None
    if regions:  # painted in this order, the largest first
        everything, scar = sorted(labels.values()), {name: value for name, value in labels.items() if name == "scar"}
        names = {"background": 0, "heart": everything, "left_heart": [value for value in everything if value != 3], **scar}
        names["left_ventricle"], order = 1, [3, 2, *scar.values(), 1]
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(contrasts)},
        "labels": names if ignore is None else names | {"ignore": ignore},
        **({} if order is None else {"regions_class_order": order}),
        "numTraining": num_training,
        "file_ending": ending,
    }


def _write_case(folder: Path, split: str, case: str, rng, contrasts, scar, size, spacing, ignore: int | None) -> None:
    import SimpleITK

    smaller = [max(n - int(rng.integers(0, most + 1)), low) for n, most, low in zip(size, SMALLER, SMALLEST, strict=False)]
    images, label = make_channels(int(rng.integers(2**63)), contrasts, scar, tuple(smaller), spacing)
    if ignore is not None:
        array = SimpleITK.GetArrayFromImage(label)  # (z, y, x) or (y, x)
        height, width = array.shape[-2:]
        columns = rng.random((-(-height // 8), -(-width // 8))) < 0.25
        array[..., np.kron(columns, np.ones((8, 8), bool))[:height, :width]] = ignore
        masked = SimpleITK.GetImageFromArray(array)
        masked.CopyInformation(label)
        label = masked
    ending = ".png" if len(size) == 2 else ".nii.gz"
    for channel, image in enumerate(images):
        if len(size) == 2:
            image = SimpleITK.Cast(image, SimpleITK.sitkUInt16)  # PNG has no signed numbers
        SimpleITK.WriteImage(image, folder / f"images{split}" / f"{case}_{channel:04d}{ending}")
    SimpleITK.WriteImage(label, folder / f"labels{split}" / f"{case}{ending}")
