"""Preprocesses the target's images for one configuration, with nnU-Net's preprocessor and without labels.

The marker of `complete_marker` is written last. If it is missing, or names other settings, the folder is made again from the
start.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.files import write_json
from nnunet_l2g.parallel import run_parallel
from nnunet_l2g.training.adapted_plans import FORMAT, complete_marker, missing_file, read_complete

# What a preprocessed image depends on in a configuration, beside the keys that begin with resampling_fn
SETTINGS = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")


class LabelFree:
    """Mixed into nnU-Net's preprocessor: no segmentation is read, and the properties name no place of any class.

    The stored segmentation is then nnU-Net's nonzero mask: 0 inside, -1 outside. Loaders need this file, and so does the
    transform that applies use_mask_for_norm.
    """

    def run_case(self, image_files, seg_file, plans_manager, configuration_manager, dataset_json):
        data, seg, properties = super().run_case(image_files, None, plans_manager, configuration_manager, dataset_json)
        properties["class_locations"] = {}
        return data, seg, properties


def settings_digest(plans: dict, configuration: str, images: str) -> str:
    """Hash of everything that the preprocessed images depend on; `images` is the digest of the fingerprint.

    The intensity statistics in the plans are not part of it, because they are computed from the images.
    """
    manager = PlansManager(plans)
    resolved = manager.get_configuration(configuration).configuration
    settings = {key: value for key, value in resolved.items() if key in SETTINGS or key.startswith("resampling_fn")}
    common = [manager.transpose_forward, plans["image_reader_writer"], version("nnunetv2"), FORMAT]
    return hashlib.sha256(json.dumps([settings, common, images], sort_keys=True).encode()).hexdigest()[:32]


def preprocess_target(
    plans: dict, configuration: str, folder: Path, cases: dict[str, list[str]], settings: str, processes: int
) -> bool:
    """Preprocesses all cases (case -> image files) into `folder`. Returns False if that has been done with these settings."""
    complete = read_complete(folder)
    if complete is not None and complete["settings"] == settings and missing_file(folder, complete["cases"]) is None:
        return False
    complete_marker(folder).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    preprocess = partial(preprocess_case, plans=plans, configuration=configuration, folder=folder)
    for _ in run_parallel(preprocess, list(cases.items()), processes, f"Preprocessing {configuration}"):
        pass
    write_json(complete_marker(folder), {"settings": settings, "cases": sorted(cases)})
    return True


def preprocess_case(item: tuple[str, list[str]], plans: dict, configuration: str, folder: Path) -> None:
    """Writes the files of one case, given as (name, image files), as nnUNetDatasetBlosc2 reads them."""
    case, files = item
    manager = PlansManager(plans)
    resolved = manager.get_configuration(configuration)
    preprocessor = type("LabelFreePreprocessor", (LabelFree, resolved.preprocessor_class), {})(verbose=False)
    preprocessor.run_case_save(str(folder / case), files, None, manager, resolved, {})
