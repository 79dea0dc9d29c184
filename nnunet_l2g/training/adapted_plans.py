"""Adapted plans, as a trainer reads them: which target they name, and whether the files behind them are still valid.

`nnunet_l2g adapt` writes these plans. They are the source's plans with the target's normalisation. What this package adds
stands under the one key TARGET_KEY, which nnU-Net's commands ignore and copy.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE, check_plain_name, read_object

TARGET_KEY = "nnunet_l2g_target"  # only adapted plans have it
FORMAT = 2
CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")  # what nnUNetDatasetBlosc2 reads of each case


@dataclass(frozen=True)
class AdaptedTarget:
    """What a trainer needs to know about the target of its plans."""

    dataset_name: str
    folder: Path  # preprocessed images of the configuration, for nnUNetDatasetBlosc2
    identifiers: list[str]  # the cases in it
    source_normalization_schemes: list[str]  # per channel, of the source's data; the plans' own are the target's
    source_use_mask_for_norm: list[bool]


def check_adapted_plans(plans: dict, configuration: str) -> AdaptedTarget:
    """Returns the target of `plans` if everything that `adapt` made for `configuration` is still there and unchanged.

    A trainer calls it before it computes anything. Prediction does not: it needs neither dataset.

    Parameters
    ----------
    plans : content of <plans>.json; nnUNetTrainer has it as `self.plans_manager.plans`
    configuration : the one to train, such as "2d"

    Raises
    ------
    UserError : plans without a target; a configuration that was not adapted; preprocessed images of the target that are
        missing, incomplete or made with other settings; preprocessed images of the source that are not those of `adapt`
    """
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    base = Path(str(nnUNet_preprocessed))
    name = check_plain_name(plans.get("plans_name"), "plans_name of the plans")
    source = check_plain_name(plans.get("dataset_name"), f"dataset_name of the plans {name}")
    target = plans.get(TARGET_KEY)
    if not isinstance(target, dict):
        raise UserError(
            f"the plans {name} of {source} name no target; make some with `nnunet_l2g adapt -s {source[7:10]} -t TARGET "
            f"-p {name}` and train with -p {name}_to<target's ID>"
        )
    original = target.get("source_plans_name", "nnUNetPlans")
    target_name = str(target.get("dataset_name", "TARGET"))
    again = f"run `nnunet_l2g adapt -s {source[7:10]} -t {target_name[7:10]} -c {configuration} -p {original}`"
    if target.get("format") != FORMAT:
        raise UserError(
            f"the plans {name} have target format {target.get('format')}, expected {FORMAT}: another version of nnunet_l2g "
            f"wrote them; {again} with this one"
        )
    try:
        entries = target["configurations"]
        if configuration not in entries:
            raise UserError(f"the plans {name} were adapted for {', '.join(entries)}, not for {configuration}; {again}")
        entry = entries[configuration]
        folder = base.joinpath(*(check_plain_name(part, f"data of the plans {name}") for part in entry["data"].split("/")))
        settings, source_data = entry["settings"], entry["source_data"]
        schemes, masks = list(entry["source_normalization_schemes"]), list(entry["source_use_mask_for_norm"])
        identifier = PlansManager(plans).get_configuration(configuration).data_identifier
    except (*DAMAGE, RuntimeError) as error:  # RuntimeError: nnU-Net finds no such configuration
        raise UserError(f"the plans {name} are not as adapt writes them ({type(error).__name__}: {error}); {again}") from error
    cases = _check_target(folder, target_name, settings, again)
    data = base / source / check_plain_name(identifier, f"data_identifier of the plans {name}")
    preprocess = f"`nnUNetv2_preprocess -d {source[7:10]} -plans_name {original} -c {configuration}`"
    check_source_data(data, base / source / f"{name}.json", source_data, preprocess)
    return AdaptedTarget(target_name, folder, cases, schemes, masks)


def _check_target(folder: Path, name: str, settings: str, again: str) -> list[str]:
    """The target's cases, if the folder is complete and was made with these settings."""
    images, complete = f"the preprocessed images of the target {name}", read_complete(folder)
    if not folder.is_dir():
        raise UserError(f"{images} are gone ({folder} is missing); {again}")
    if complete is None:
        raise UserError(f"{images} in {folder} are not complete: adapt was interrupted or is still running; {again}")
    if complete["settings"] != settings:
        raise UserError(f"{images} in {folder} were made with other settings than these plans name; {again}")
    if missing := missing_file(folder, complete["cases"]):
        raise UserError(f"{images} are damaged: {missing} is missing; {again}")
    return complete["cases"]


def check_source_data(data: Path, plans_file: Path, expected: str, again: str) -> None:
    """UserError unless the source's preprocessed images have the hash that the adapted plans hold.

    `again` says how to make these images again.
    """
    if not data.is_dir():
        raise UserError(f"the preprocessed data of the source {data.parent.name} are missing: expected {data}; run {again}")
    if source_data_digest(data) != expected:
        raise UserError(
            f"the preprocessed data of the source in {data} are not those that {plans_file.stem} was adapted for. If "
            "nnUNetv2_preprocess was run with adapted plans, it put the target's normalisation on them: run "
            f"{again}. If the source was changed on purpose, delete {plans_file} and adapt again"
        )


def source_data_digest(folder: Path) -> str:
    """Hash of the name and size of each preprocessed image in a folder, and of the content of the smallest one.

    `nnUNetv2_preprocess -plans_name <adapted plans>` writes the source's images again with the target's normalisation, under
    the same names. The content of one image shows that, and reading one image is cheap. Times of files are not used, so that
    the data can be copied to another machine.
    """
    names = (path for path in folder.iterdir() if path.suffix in (".b2nd", ".npz"))
    sizes = sorted((path.stat().st_size, path.name) for path in names if not path.name.endswith("_seg.b2nd"))
    hasher = hashlib.sha256(json.dumps(sizes).encode())
    if sizes:
        hasher.update((folder / sizes[0][1]).read_bytes())
    return hasher.hexdigest()[:32]


def missing_file(folder: Path, cases: list[str]) -> Path | None:
    """The first file of a case that is not there; None if all are there."""
    files = (folder / f"{case}{ending}" for case in cases for ending in CASE_FILES)
    return next((file for file in files if not file.is_file()), None)


def complete_marker(folder: Path) -> Path:
    """The file that says that a folder of the target's images is complete. nnU-Net takes every file in the folder for data."""
    return folder.with_name(f"{folder.name}.complete.json")


def read_complete(folder: Path) -> dict | None:
    """{"settings": hash of what the images were made of, "cases": names}; None if the folder is not complete."""
    try:
        content = read_object(complete_marker(folder))
        names = [check_plain_name(case, "a case") for case in content["cases"]]
        return {"settings": str(content["settings"]), "cases": names}
    except (*DAMAGE, UserError):
        return None
