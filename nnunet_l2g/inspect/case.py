"""The image to inspect and its reference: found, checked, read and preprocessed as nnU-Net would for this model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import VOXEL_BY_VOXEL, geometry_difference, has_spacing, header, unique_values
from nnunet_l2g.images import check_whole, unreadable
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.lookup import quiet

CHANNEL = re.compile(r"_\d{4}$")


@dataclass(frozen=True)
class Case:
    """image (C, *shape), reference (*shape) or None: as the reader gives them, three axes, the first one 1 long for 2D images
    data (C, *grid), labels (*grid) or None : both as preprocessed, axes transposed as in the plans; labels -1 outside nonzero
    properties : the reader's, and what preprocessing noted
    spacing : mm of shape's axes; grid_spacing : of the grid's
    slice_axis : of shape, across which pictures are cut: the plans' first axis
    warning : what is odd about the reference, "" if nothing
    """

    name: str
    files: list[Path]
    image: np.ndarray
    reference: np.ndarray | None
    data: np.ndarray
    labels: np.ndarray | None
    properties: dict
    spacing: tuple[float, ...]
    grid_spacing: tuple[float, ...]
    slice_axis: int
    warning: str = ""


def find_channels(paths: list[Path], ending: str) -> tuple[str, list[Path]]:
    """The case's name and its files, one for each channel in nnU-Net's order.

    One path CASE_0000.nii.gz stands for all CASE_<channel>.nii.gz beside it; several are taken as they are.

    Raises
    ------
    UserError : no such file, a folder, a name that begins with a dot, another file ending than the model's, a channel is
        missing between others
    """
    for path in paths:
        if path.is_dir():
            images = sorted(image for image in path.glob(f"*_0000{ending}") if not image.name.startswith("."))
            example = images[0] if images else path / f"CASE_0000{ending}"
            raise UserError(f"-i {path}: this is a folder; name the first channel of one case in it, such as {example}")
        if not path.is_file():
            first = path.with_name(f"{path.name}_0000{ending}")
            raise UserError(f"-i {path}: no such file" + (f"; did you mean {first}?" if first.is_file() else ""))
        if path.name.startswith("."):
            raise UserError(
                f"-i {path}: names that begin with a dot are no images (macOS leaves ._NAME beside NAME); name the image"
            )
        if not path.name.lower().endswith(ending):
            raise UserError(f"-i {path}: the model was trained on {ending} files; convert the image")
    stem = paths[0].name[: -len(ending)]
    name = CHANNEL.sub("", stem)
    if len(paths) > 1 or name == stem:
        return name, paths
    folder = paths[0].parent
    channel_of_case = re.compile(re.escape(name) + r"_\d{4}" + re.escape(ending))
    files = sorted(path for path in folder.iterdir() if channel_of_case.fullmatch(path.name))
    for number, path in enumerate(files):
        expected = folder / f"{name}_{number:04d}{ending}"
        if path != expected:
            raise UserError(f"-i {paths[0]}: {expected} is missing, but {path.name} is there; channels count from 0000")
    return name, files


def read_case(model: Model, paths: list[Path], label: Path | None) -> Case:
    """Reads image and label and preprocesses them.

    Raises
    ------
    UserError : see find_channels; an unreadable file, the wrong number of channels, voxels that are not finite; a label that
        does not lie on the image or has values that dataset.json does not declare
    """
    name, files = find_channels([path.expanduser() for path in paths], model.dataset["file_ending"])
    image, properties = _read_image(model, files)
    reference, warning = None, ""
    if label is not None:
        reference, warning = _read_label(model, label.expanduser(), image, properties, files[0])
    spacing = tuple(float(s) for s in properties["spacing"])
    order = list(model.plans.transpose_forward)
    data, labels, properties = _preprocess(model, image, reference, properties, files[0])
    through_plane = [spacing[order[0]]] if len(model.configuration.spacing) == 2 else []  # 2D configurations keep it
    grid_spacing = (*through_plane, *(float(s) for s in model.configuration.spacing))
    labels = None if reference is None else labels
    return Case(name, files, image, reference, data, labels, properties, spacing, grid_spacing, order[0], warning)


def _read_image(model: Model, files: list[Path]) -> tuple[np.ndarray, dict]:
    reader = model.reader
    channels = []
    for path in files:
        array, properties = _read(reader.read_images, ([str(path)],), path)
        if channels:
            first, theirs = channels[0]
            if array.shape[1:] != first.shape[1:]:
                raise UserError(f"{path}: shape {array.shape[1:]}, but {files[0]} has {first.shape[1:]}; expected one grid")
            if difference := geometry_difference(properties, theirs):
                raise UserError(f"{path}: {difference} as in {files[0]}; channels have to lie on one grid")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {np.count_nonzero(~np.isfinite(array))} voxels are NaN or infinite; mend the image")
        channels.append((array, properties))
    image, properties = np.concatenate([array for array, _ in channels]), channels[0][1]
    if len(image) != model.channels:
        names = ", ".join(model.dataset.get("channel_names", {}).values())
        raise UserError(
            f"{files[0]}: {len(image)} channel{'s' if len(image) > 1 else ''} in {', '.join(path.name for path in files)}, but "
            f"the model takes {model.channels} ({names}); name one file for each with -i, or the first, ending in _0000, with "
            "the others beside it"
        )
    return image, properties


def _read_label(model: Model, path: Path, image: np.ndarray, properties: dict, file: Path) -> tuple[np.ndarray, str]:
    """The label (*shape), and a warning if only its header lies elsewhere than the image, as nnU-Net takes it."""
    if not path.is_file():
        raise UserError(f"-l {path}: no such file")
    array, theirs = _read(model.reader.read_seg, (str(path),), path)
    if len(array) != 1:
        raise UserError(f"-l {path}: {len(array)} channels; expected a segmentation of one")
    if array.shape[1:] != image.shape[1:]:
        raise UserError(f"-l {path}: shape {array.shape[1:]}, but the image {file} has {image.shape[1:]}; expected one grid")
    if not has_spacing(path, type(model.reader)):
        theirs = theirs | {"spacing": properties["spacing"]}
    if difference := geometry_difference(theirs, properties, ["spacing"]):
        raise UserError(f"-l {path}: {difference} as in the image {file}; expected one grid")
    known = {*model.labels.known, *([] if model.labels.ignore is None else [model.labels.ignore])}
    unknown = {float(value) for value in unique_values(array)} - {float(value) for value in known}
    if unknown:
        raise UserError(f"-l {path}: holds the values {sorted(unknown)[:5]}; the model's dataset.json declares {sorted(known)}")
    warning = ""
    if geometry_difference(theirs, properties):
        warning = (
            f"HEADERS DIFFER: the label {path} has {header(theirs)}; the image {file} has {header(properties)}. "
            f"{VOXEL_BY_VOXEL}"
        )
    return array[0].astype(np.int16), warning


def _read(read, arguments, path: Path) -> tuple[np.ndarray, dict]:
    try:
        with quiet():
            array, properties = read(*arguments)
    except Exception as error:  # each library has its own
        raise unreadable(path, type(read.__self__).__name__, error) from error
    check_whole(path)
    if len(properties.get("sitk_stuff", {}).get("spacing", ())) > 3:
        raise UserError(f"{path}: has four axes; expected one file for each channel, with three at most")
    return array, properties


def _preprocess(model: Model, image, reference, properties: dict, file: Path):
    with quiet():
        preprocessor = model.configuration.preprocessor_class(verbose=False)
    reference = None if reference is None else reference[None]
    try:
        data, labels, properties = preprocessor.run_case_npy(
            image, reference, properties, model.plans, model.configuration, model.dataset
        )
    except Exception as error:  # resampling and normalisation of any plans
        raise UserError(f"{file}: nnU-Net cannot preprocess it ({type(error).__name__}: {error})") from error
    return np.ascontiguousarray(data, dtype=np.float32), np.asarray(labels)[0].astype(np.int16), properties
