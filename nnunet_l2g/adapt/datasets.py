"""The labelled source, planned and preprocessed, and the unlabelled target, raw: found and checked by name alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import check_version, read_dataset_json
from nnunet_l2g.files import DAMAGE, check_plain_name, read_object
from nnunet_l2g.nnunet_files import check_plans
from nnunet_l2g.training.adapted_plans import TARGET_KEY


@dataclass(frozen=True)
class Source:
    """A dataset that nnU-Net has planned and preprocessed. `configurations` are those to adapt."""

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
        """The folder of preprocessed data."""
        return self.folder / self.manager.get_configuration(configuration).data_identifier


@dataclass(frozen=True)
class Target:
    """A raw dataset, of which only dataset.json and the images are ever looked at."""

    name: str
    folder: Path  # nnUNet_raw/<name>
    channel_names: dict[str, str]
    cases: dict[str, list[str]]  # case -> its image files, in the order of the channels

    @property
    def id(self) -> str:
        return self.name[7:10]


def dataset_name(identifier: str, option: str) -> str:
    """DatasetXXX_Name for an ID or a name, by nnU-Net's rules. UserError if there is none, or more than one."""
    for path in (nnUNet_raw, nnUNet_preprocessed):
        if not path.is_set():
            raise UserError(f"{path.env_var_name} is not set; set nnU-Net's variables as for its own commands")
    try:
        name = str(maybe_convert_to_dataset_name(identifier))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{option} {identifier}: no such dataset; give the ID or the name of one dataset in "
            f"{nnUNet_raw} or {nnUNet_preprocessed} ({' '.join(str(error).split())[:160]})"
        ) from error
    return check_plain_name(name, option)


def channel_names(dataset_json: dict) -> dict[str, str]:
    """{"0": name, ...}; `modality` is the key's old name. Empty if dataset.json has neither."""
    return dataset_json.get("channel_names") or dataset_json.get("modality") or {}


def check_channel_names(dataset_json: dict, path: Path) -> None:
    """UserError unless the channels are named by "0", "1", ..., as nnU-Net counts them."""
    names = channel_names(dataset_json)
    plain = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not plain or set(names) != {str(i) for i in range(len(names))}:
        raise UserError(f'{path}: channel_names are {str(names)[:80]}; expected {{"0": name, "1": name, ...}}')


def read_json(path: Path, meaning: str, remedy: str) -> dict:
    """A JSON object. UserError with `meaning` and `remedy` if the file is missing or no JSON object."""
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {meaning}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {meaning}; {remedy}") from error


def find_source(identifier: str, plans_name: str, configurations: list[str] | None) -> Source:
    """The source and the configurations to adapt: those asked for, or all that are preprocessed and no cascade.

    UserError if it is not planned or preprocessed, for adapted plans, and for cascade configurations.
    """
    name = dataset_name(identifier, "-s")
    folder = Path(str(nnUNet_preprocessed), name)
    remedy = f"run `nnUNetv2_plan_and_preprocess -d {name[7:10]}` first"
    path = folder / f"{check_plain_name(plans_name, '-p')}.json"
    plans = read_json(path, f"the source {name} has no plans {plans_name}", f"{remedy}, or choose -p")
    if TARGET_KEY in plans:
        raise UserError(f"-p {plans_name}: these plans are adapted already; give the source's own plans, -p {_original(plans)}")
    dataset_json = read_json(folder / "dataset.json", f"the source {name} is not planned", remedy)
    if "file_ending" not in read_dataset_json(folder / "dataset.json"):
        raise UserError(f"{folder / 'dataset.json'} names no file_ending: the source {name} is not planned; {remedy}")
    check_channel_names(dataset_json, folder / "dataset.json")
    read_json(folder / "dataset_fingerprint.json", f"nnU-Net trains {name} only with it", remedy)

    manager = check_plans(plans, path)
    available = [c for c in plans["configurations"] if not is_cascade(manager, c)]
    source = Source(name, folder, plans, dataset_json, ())
    if configurations:
        for configuration in configurations:
            _check_configuration(source, configuration, available)
    else:
        configurations = [c for c in available if source.data(c).is_dir()]
        if not configurations:
            raise UserError(f"none of the configurations {', '.join(available)} of {name} is preprocessed; {remedy}")
        for configuration in configurations:
            check_preprocessed(source, configuration)
    return Source(name, folder, plans, dataset_json, tuple(dict.fromkeys(configurations)))


def _original(plans: dict) -> str:
    """Of which plans the adapted ones were made."""
    entry = plans[TARGET_KEY]
    return str(entry.get("source_plans_name", "nnUNetPlans")) if isinstance(entry, dict) else "nnUNetPlans"


def is_cascade(manager: PlansManager, configuration: str) -> bool:
    """Whether the configuration refines the segmentation of another one."""
    return manager.get_configuration(configuration).previous_stage_name is not None


def _check_configuration(source: Source, configuration: str, available: list[str]) -> None:
    if configuration not in source.plans["configurations"]:
        raise UserError(f"-c {configuration}: not in the plans {source.plans_name} of {source.name}; choose from {available}")
    if configuration not in available:
        raise UserError(
            f"-c {configuration}: a cascade needs its first stage's predictions, which an unlabelled target "
            f"does not have; choose from {', '.join(available)}"
        )
    check_preprocessed(source, configuration)


def check_preprocessed(source: Source, configuration: str) -> None:
    """UserError unless each of the source's cases is preprocessed for this configuration."""
    folder = source.data(configuration)
    remedy = f"run `nnUNetv2_preprocess -d {source.id} -plans_name {source.plans_name} -c {configuration}` first"
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{source.name} is not preprocessed for {configuration}: {folder} is missing or empty; {remedy}")
    try:
        found = set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, KeyError) as error:
        raise UserError(f"{folder} holds files that are not nnU-Net's preprocessed data; {remedy}") from error
    segmentations = source.folder / "gt_segmentations"
    ending = source.dataset_json["file_ending"]
    expected = {p.name[: -len(ending)] for p in segmentations.glob(f"*{ending}") if not p.name.startswith(".")}
    if left_out := _ending_in_seg(expected):
        raise UserError(
            f"{source.name}: nnU-Net leaves out cases whose names end in _seg, so it does not train on {left_out}; rename "
            f"their images and labels in {nnUNet_raw}, and run `nnUNetv2_plan_and_preprocess -d {source.id}` again"
        )
    parts = [".pkl", "_seg.b2nd"] if any(folder.glob("*.b2nd")) else [".pkl"]
    torn = {case for case in found if not all((folder / f"{case}{part}").exists() for part in parts)}
    missing = sorted((expected - found) | torn)
    if not expected or missing:
        what = f"{segmentations}, which comes last, is missing or empty"
        if expected:
            what = f"{len(missing)} of {len(expected)} cases are missing, {missing[0]} first"
        raise UserError(f"the preprocessing of {source.name} for {configuration} is not finished: {what}; {remedy}")


def _ending_in_seg(cases: Iterable[str]) -> str:
    """The cases that nnU-Net's loader would take for the segmentation of another one, CASE_seg.b2nd; "" if there are none."""
    return ", ".join(sorted(case for case in cases if case.endswith("_seg")))


def find_target(identifier: str, source: Source) -> Target:
    """The target, if what its dataset.json and its file names say fits the source. UserError if not. Reads no image."""
    name = dataset_name(identifier, "-t")
    if name == source.name:
        raise UserError(f"-t {identifier} is the source {name} itself; expected another dataset, of the unlabelled modality")
    folder = Path(str(nnUNet_raw), name)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the target needs its raw images; put them there, as nnU-Net expects them")
    dataset_json = read_json(
        folder / "dataset.json",
        f"the target {name} is not described",
        "write one with channel_names and file_ending (labels are not needed)",
    )
    check_channel_names(dataset_json, folder / "dataset.json")
    channels = channel_names(dataset_json)
    expected = channel_names(source.dataset_json)
    if len(channels) != len(expected):
        raise UserError(
            f"{name} has {len(channels)} channel(s) {list(channels.values())}, the source {source.name} has "
            f"{len(expected)} {list(expected.values())}; expected as many: correct channel_names, or choose "
            "a source with the same number of channels"
        )
    ending = source.dataset_json["file_ending"]
    check_version(dataset_json, folder / "dataset.json")
    if dataset_json.get("file_ending") != ending:
        raise UserError(
            f"{name} has file_ending {dataset_json.get('file_ending')!r}, the source has {ending!r}; nnU-Net "
            f"predicts with the source's: convert the target's images to {ending}"
        )
    reader, asked = source.plans["image_reader_writer"], dataset_json.get("overwrite_image_reader_writer", "None")
    if asked not in ("None", reader):
        raise UserError(
            f"{name} asks for the reader {asked}, the source's plans have {reader}, with which nnU-Net will "
            "predict; remove overwrite_image_reader_writer from the target's dataset.json, or plan the source so"
        )
    cases = list_images(name, folder, dataset_json, ending)
    if clashing := _ending_in_seg(cases):
        of_others = "".join(f"; {case} and {case}_seg write one file" for case in sorted(cases) if f"{case}_seg" in cases)
        raise UserError(
            f"{name} has cases whose names end in _seg: {clashing}{of_others}. nnU-Net keeps the segmentation of CASE in "
            "CASE_seg.b2nd and leaves such cases out; rename their images"
        )
    return Target(name, folder, channels, cases)


def list_images(name: str, folder: Path, dataset_json: dict, ending: str) -> dict[str, list[str]]:
    """case -> image files of a raw dataset, in the order of the channels. UserError if there are none, or some are missing.

    nnU-Net's own listing does this for images and labels at once, with twelve processes.
    """
    if "dataset" in dataset_json:  # files anywhere, relative to the dataset's folder
        try:
            cases = {
                check_plain_name(case, f"{folder / 'dataset.json'}: a case"): [
                    os.path.abspath(folder / os.path.expandvars(file)) for file in entry["images"]
                ]
                for case, entry in dataset_json["dataset"].items()
            }
        except DAMAGE as error:
            raise UserError(
                f"{folder / 'dataset.json'}: dataset is not as nnU-Net expects it ({type(error).__name__}: {error}); "
                "list the images of each case, or leave it out and use imagesTr"
            ) from error
    else:
        images = folder / "imagesTr"
        if not images.is_dir():
            raise UserError(f"{images} is missing: the target {name} has no images; put them there (labels are not needed)")
        cases = {}
        visible = (path for path in images.iterdir() if not path.name.startswith("."))  # macOS leaves ._NAME beside NAME
        for file in sorted(path for path in visible if path.name.endswith(ending)):
            match = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", file.name)
            if match is None:
                raise UserError(f"{file}: expected CASE_0000{ending}, with the channel's four digits; rename it")
            cases.setdefault(match.group(1), []).append(str(file))
    if not cases:
        raise UserError(
            f"{folder / 'imagesTr'} holds no image ending in {ending}; put the target's images there (labels are not needed)"
        )
    usual = max(map(len, cases.values()))
    for case, files in cases.items():
        gone = [file for file in files if not os.path.isfile(file)]  # False, too, for what can be no name
        if gone:
            kind = "is a folder" if os.path.isdir(gone[0]) else "is no file, or a link to none"
            raise UserError(f"case {case} of {name}: {gone[0]} {kind}; put the image there, or remove the case")
        if len(files) != usual:
            raise UserError(
                f"case {case} of {name} has {len(files)} image file(s), expected {usual} like other "
                "cases; add what is missing or remove the case"
            )
    return cases
