"""Is the source's preprocessed data what the source's plans say?

`nnUNetv2_preprocess -plans_name <adapted plans>` would overwrite it, silently, with the target's normalisation.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_l2g.adapt.datasets import Source, list_images
from nnunet_l2g.errors import UserError
from nnunet_l2g.nnunet_files import read_voxels

_TOLERANCE = 0.02  # of the standard deviation, on average: another library version resamples a little differently


def check_normalisation(source: Source, configuration: str) -> bool:
    """Preprocesses the source's smallest case as its plans say and compares it with what is stored.

    Returns whether it could be done: False without the source's raw images. UserError if the stored case is another.
    """
    folder = source.data(configuration)
    case = min(infer_dataset_class(str(folder)).get_identifiers(str(folder)), key=lambda name: _size(folder, name))
    files = _raw_files(source, case)
    if files is None:
        return False
    images, label = files

    configuration_manager = source.manager.get_configuration(configuration)
    preprocessor = configuration_manager.preprocessor_class(verbose=False)
    try:
        fresh, _, _ = preprocessor.run_case(images, label, source.manager, configuration_manager, source.dataset_json)
    except Exception as error:  # whatever the reader's library raises
        raise UserError(
            f"case {case} of {source.name}: {images[0]} or {label} cannot be preprocessed as the plans {source.plans_name} say "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); replace the file"
        ) from error
    found = read_voxels(folder, case)
    if found.shape != fresh.shape or np.abs(found - fresh).mean() > _TOLERANCE * max(float(fresh.std()), 1e-6):
        raise UserError(
            f"the preprocessed data of {source.name} in {folder} were not made with its plans {source.plans_name}: "
            f"case {case} differs. Was nnUNetv2_preprocess run with adapted plans? {restore(source, configuration)}"
        )
    return True


def _size(folder: Path, case: str) -> int:
    paths = (folder / f"{case}{ending}" for ending in (".b2nd", ".npz"))
    return sum(path.stat().st_size for path in paths if path.exists())


def _raw_files(source: Source, case: str) -> tuple[list[str], str] | None:
    """Images and label of a source case, None if they are not there any more."""
    raw, ending = Path(str(nnUNet_raw), source.name), source.dataset_json["file_ending"]
    try:
        images = list_images(source.name, raw, source.dataset_json, ending)[case]
        entry = source.dataset_json.get("dataset", {}).get(case)
        label = os.path.expandvars(entry["label"]) if entry else f"labelsTr/{case}{ending}"
    except (OSError, KeyError, TypeError, UserError):
        return None
    return (images, str(raw / label)) if (raw / label).exists() else None


def restore(source: Source, configuration: str) -> str:
    """How to get the source's data back."""
    return f"Run `nnUNetv2_preprocess -d {source.id} -plans_name {source.plans_name} -c {configuration}`, then adapt again"
