"""The labelled source and the unlabelled target: finds them, and checks what their JSON files and file names say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import check_version, read_dataset_json
from nnunet_l2g.files import DAMAGE, check_plain_name, read_object
from nnunet_l2g.nnunet_files import check_plans
from nnunet_l2g.training.adapted_plans import TARGET_KEY


@dataclass(frozen=True)
class Source:
    """A labelled dataset that nnU-Net has planned and preprocessed. `configurations` are those to adapt."""

    name: str
    folder: Path  # nnUNet_preprocessed/<name>
    plans: dict
    dataset_json: dict
    configurations: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.name[7:10]

    @property
    def plans_name(self) -> str:
        return self.plans["plans_name"]

    @cached_property
    def manager(self) -> PlansManager:
        return PlansManager(self.plans)

    def data(self, configuration: str) -> Path:
        """The folder of preprocessed images."""
        return self.folder / self.manager.get_configuration(configuration).data_identifier

    def preprocess_command(self, configuration: str) -> str:
        """nnU-Net's command that makes the preprocessed images."""
        return f"`nnUNetv2_preprocess -d {self.id} -plans_name {self.plans_name} -c {configuration}`"


@dataclass(frozen=True)
class Target:
    """A raw dataset. Only its dataset.json and its images are read."""

    name: str
    channel_names: dict[str, str]
    cases: dict[str, list[str]]  # case -> its image files, in the order of the channels


def find_source(identifier: str, plans_name: str, configurations: list[str] | None) -> Source:
    """The source and the configurations to adapt: those asked for, or all that are preprocessed. Cascades are left out.

    UserError if the source is not planned or not preprocessed, if its plans are adapted ones, and for a configuration that is
    unknown or the second stage of a cascade.
    """
    name = _dataset_name(identifier, "-s")
    folder = Path(str(nnUNet_preprocessed), name)
    first = f"run `nnUNetv2_plan_and_preprocess -d {name[7:10]}` first"
    path = folder / f"{check_plain_name(plans_name, '-p')}.json"
    plans = _read(path, f"the source {name} has no plans {plans_name}: {first}, or choose -p")
    if TARGET_KEY in plans:
        raise UserError(f"-p {plans_name}: these plans are adapted already; give the source's own plans with -p")
    manager = check_plans(plans, path)
    dataset_json = read_dataset_json(folder / "dataset.json")
    if "file_ending" not in dataset_json:
        raise UserError(f"{folder / 'dataset.json'} names no file_ending; {first}")

    cascades = [c for c in plans["configurations"] if manager.get_configuration(c).previous_stage_name is not None]
    available = [c for c in plans["configurations"] if c not in cascades]
    source = Source(name, folder, plans, dataset_json, ())
    for configuration in configurations or []:
        if configuration not in available:
            why = f"not in the plans {plans_name} of {name}"
            if configuration in cascades:
                why = "a cascade needs the predictions of its first stage, and the target has none"
            raise UserError(f"-c {configuration}: {why}; choose from {', '.join(available)}")
    chosen = list(dict.fromkeys(configurations or [c for c in available if source.data(c).is_dir()]))
    if not chosen:
        raise UserError(f"{name} is not preprocessed for any of {', '.join(available)}; {first}")
    for configuration in chosen:
        _check_preprocessed(source, configuration)
    return replace(source, configurations=tuple(chosen))


def _check_preprocessed(source: Source, configuration: str) -> None:
    """UserError unless every case of the source is preprocessed for this configuration. nnU-Net writes a case's .pkl last."""
    folder, labels, ending = (
        source.data(configuration),
        source.folder / "gt_segmentations",
        source.dataset_json["file_ending"],
    )
    cases = {path.name[: -len(ending)] for path in labels.glob(f"*{ending}") if not path.name.startswith(".")}
    _check_case_names(source.name, cases)
    missing = sorted(cases - {path.stem for path in folder.glob("*.pkl")})
    if missing or not cases:
        what = f"{len(missing)} of {len(cases)} cases are missing in {folder}" if missing else f"{labels} is missing or empty"
        raise UserError(
            f"{source.name} is not preprocessed for {configuration}: {what}; run {source.preprocess_command(configuration)}"
        )


def find_target(identifier: str, source: Source) -> Target:
    """The target. UserError if its dataset.json or the names of its files do not fit the source. Reads no image."""
    name = _dataset_name(identifier, "-t")
    if name == source.name:
        raise UserError(f"-t {identifier} is the source {name} itself; expected another dataset, of the unlabelled modality")
    folder = Path(str(nnUNet_raw), name)
    path = folder / "dataset.json"
    dataset_json = _read(path, "the target needs it, with channel_names and file_ending (no labels)")
    check_version(dataset_json, path)
    channels, expected = (d.get("channel_names") or d.get("modality") or {} for d in (dataset_json, source.dataset_json))
    if not isinstance(channels, dict) or not all(isinstance(channel, str) for channel in channels.values()):
        raise UserError(f'{path}: channel_names are {str(channels)[:80]}; expected {{"0": name, "1": name, ...}}')
    if len(channels) != len(expected):
        raise UserError(
            f"{path} names {len(channels)} channel(s) {list(channels.values())}, the source {source.name} has {len(expected)} "
            f"{list(expected.values())}; expected as many: correct channel_names, or choose another source"
        )
    ending = source.dataset_json["file_ending"]
    if dataset_json.get("file_ending") != ending:
        raise UserError(
            f"{name} has file_ending {dataset_json.get('file_ending')!r}, the source has {ending!r}, with which nnU-Net "
            f"predicts; convert the target's images to {ending}"
        )
    cases = _list_images(name, folder, dataset_json, ending)
    _check_case_names(name, cases)
    return Target(name, channels, cases)


def _list_images(name: str, folder: Path, dataset_json: dict, ending: str) -> dict[str, list[str]]:
    """case -> image files of the target, in the order of the channels. UserError if there are none, or some are missing.

    nnU-Net's own function is not used, because it lists the labels too.
    """
    cases: dict[str, list[str]] = {}
    if "dataset" in dataset_json:  # files anywhere, relative to the dataset's folder
        try:
            for case, entry in dataset_json["dataset"].items():
                check_plain_name(case, f"{folder / 'dataset.json'}: a case")
                cases[case] = [os.path.abspath(folder / os.path.expandvars(file)) for file in entry["images"]]
        except DAMAGE as error:
            raise UserError(
                f"{folder / 'dataset.json'}: dataset is not as nnU-Net expects it ({type(error).__name__}: {error}); list the "
                "images of each case, or leave it out and use imagesTr"
            ) from error
    else:
        visible = (path for path in folder.glob("imagesTr/*") if not path.name.startswith("."))  # macOS writes ._NAME too
        for file in sorted(path for path in visible if path.name.endswith(ending)):
            match = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", file.name)
            if match is None:
                raise UserError(f"{file}: expected CASE_0000{ending}, with the channel's four digits; rename it")
            cases.setdefault(match.group(1), []).append(str(file))
    if not cases:
        raise UserError(f"{folder / 'imagesTr'} holds no image ending in {ending}; put the target's images there (no labels)")
    usual = max(map(len, cases.values()))
    for case, files in cases.items():
        for file in files:
            if not os.path.isfile(file):
                raise UserError(f"case {case} of {name}: {file} is no file; put the image there, or remove the case")
        if len(files) != usual:
            raise UserError(
                f"case {case} of {name} has {len(files)} image file(s), expected {usual} like other cases; add what is "
                "missing, or remove the case"
            )
    return cases


def _check_case_names(name: str, cases: Iterable[str]) -> None:
    """UserError for cases that nnU-Net's loader takes for the segmentation of another case, CASE_seg.b2nd, and leaves out."""
    if clashing := sorted(case for case in cases if case.endswith("_seg")):
        raise UserError(
            f"{name} has cases whose names end in _seg: {', '.join(clashing)}. nnU-Net keeps the segmentation of CASE in "
            "CASE_seg.b2nd and leaves such cases out; rename their files (and preprocess the source again)"
        )


def _dataset_name(identifier: str, option: str) -> str:
    """DatasetXXX_Name for an ID or a name, by nnU-Net's rules. UserError if there is none, or more than one."""
    for path in (nnUNet_raw, nnUNet_preprocessed):
        if not path.is_set():
            raise UserError(f"{path.env_var_name} is not set; set nnU-Net's variables as for its own commands")
    try:
        name = str(maybe_convert_to_dataset_name(identifier))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{option} {identifier}: no such dataset; give the ID or the name of one dataset in {nnUNet_raw} or "
            f"{nnUNet_preprocessed} ({' '.join(str(error).split())[:160]})"
        ) from error
    return check_plain_name(name, option)


def _read(path: Path, remedy: str) -> dict:
    """A JSON object. UserError with `remedy` if there is none."""
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or no JSON object ({error}); {remedy}") from error
