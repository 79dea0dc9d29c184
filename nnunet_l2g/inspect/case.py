"""The image to inspect and its reference: found, checked, read, preprocessed as the model needs it, and cut into slices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import ALL, VOXEL_BY_VOXEL, geometry_difference, has_spacing, header, read_segmentation
from nnunet_l2g.images import check_whole, unreadable
from nnunet_l2g.inspect.model import Model
from nnunet_l2g.lookup import quiet
from nnunet_l2g.training.figure import coloured, label_colours, window_of, windowed

LARGEST = 1000  # pixels along a side of a panel


@dataclass(frozen=True)
class Case:
    """name, files : of the case, and one file for each channel
    image (C, *shape), reference (*shape) or None : as nnU-Net's reader gives them, three axes, the first of length 1 in 2D
    data (C, *grid) : as preprocessed, axes transposed as in the plans
    properties : what reader and preprocessing noted
    transpose_backward : from the axes of grid to those of shape
    slice_axis : of shape; pictures show slices across it
    aspect : height of a slice's pixel over its width, in mm
    warning : what is odd about the reference, or None
    """

    name: str
    files: list[Path]
    image: np.ndarray
    reference: np.ndarray | None
    data: np.ndarray
    properties: dict
    transpose_backward: list[int]
    slice_axis: int
    aspect: float
    warning: str | None = None


def read_case(model: Model, paths: list[Path], label: Path | None) -> Case:
    """Reads image and reference, and preprocesses the image.

    Raises
    ------
    UserError : see find_channels and read_channels; the wrong number of channels; a reference that cannot be read, does not lie
        on the image, or has values that dataset.json does not declare
    """
    name, files = find_channels([path.expanduser() for path in paths], model.dataset["file_ending"])
    image, properties = read_channels(model.labels.reader(), files)  # (C, *shape)
    if len(image) != model.channels:
        names = ", ".join(model.dataset.get("channel_names", {}).values())
        raise UserError(
            f"{files[0]}: {len(image)} channel(s) in {', '.join(path.name for path in files)}, but the model takes "
            f"{model.channels} ({names}); name one file for each with -i, or the first with the others beside it, ending in "
            "_0000, _0001 and so on"
        )
    reference, warning = None, None
    if label is not None:
        reference, warning = _read_reference(model, label.expanduser(), image, properties, files[0])
    try:
        with quiet():
            preprocessor = model.configuration.preprocessor_class(verbose=False)
        described = model.plans, model.configuration, model.dataset
        data, _, properties = preprocessor.run_case_npy(image, None, properties, *described)
    except Exception as error:  # resampling and normalisation of any plans
        raise UserError(f"{files[0]}: nnU-Net cannot preprocess it ({type(error).__name__}: {error})") from error
    slice_axis = model.plans.transpose_forward[0]
    rows, columns = (float(s) for axis, s in enumerate(properties["spacing"]) if axis != slice_axis)
    return Case(name, files, image, reference, np.ascontiguousarray(data, dtype=np.float32), properties,
                list(model.plans.transpose_backward), slice_axis, rows / columns, warning)  # fmt: skip


def find_channels(paths: list[Path], ending: str) -> tuple[str, list[Path]]:
    """The name of the case, and its files in the order of the channels.

    One path CASE_0000.nii.gz stands for all CASE_<channel>.nii.gz beside it. Several paths are taken as they are. UserError
    for a path that is no file, or does not end as the model's images do.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"-i {path}: no such file; expected the first channel of one case, CASE_0000{ending}")
        if not path.name.endswith(ending):
            raise UserError(f"-i {path}: the model was trained on {ending} files; convert the image")
    stem = paths[0].name[: -len(ending)]
    name = re.sub(r"_\d{4}$", "", stem)
    if len(paths) > 1 or name == stem:
        return name, paths
    return name, [Path(file) for file in create_lists_from_splitted_dataset_folder(str(paths[0].parent), ending, [name])[0]]


def read_channels(reader, files: list[Path]) -> tuple[np.ndarray, dict]:
    """(C, *shape) and the properties of the first file.

    The files are read one by one, so that an error names its file. UserError for a file that cannot be read, is cut off, lies
    on another grid than the first, or has voxels that are not finite.
    """
    channels = []  # array (1, *shape) and properties of each file
    for path in files:
        try:
            with quiet():
                array, found = reader.read_images([str(path)])
        except Exception as error:  # each library has its own
            raise unreadable(path, type(reader).__name__, error) from error
        check_whole(path)
        if len(found.get("sitk_stuff", {}).get("spacing", ())) > 3:
            raise UserError(f"{path}: has four axes; expected one file for each channel, with three at most")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {np.count_nonzero(~np.isfinite(array))} voxels are NaN or infinite; mend the image")
        channels.append((array, found))
        _check_grid(path, array, found, files[0], *channels[0])
    return np.concatenate([array for array, _ in channels]), channels[0][1]


def _read_reference(model: Model, path: Path, image: np.ndarray, properties: dict, file: Path):
    """The labels (*shape), and a warning if origin or direction differ from the image's: nnU-Net ignores both."""
    array, found = read_segmentation(path, model.labels)
    if not has_spacing(path, model.labels.reader):
        found = found | {"spacing": properties["spacing"]}
    _check_grid(path, array[None], found, file, image, properties, ["spacing"])
    known = {*model.labels.known, *([] if model.labels.ignore is None else [model.labels.ignore])}
    unknown = sorted({float(value) for value in np.unique(array)} - known)
    if unknown:
        raise UserError(f"-l {path}: holds the values {unknown[:5]}; the model's dataset.json declares {sorted(known)}")
    warning = None
    if geometry_difference(found, properties):
        headers = f"the label {path} has {header(found)}; the image {file} has {header(properties)}"
        warning = f"HEADERS DIFFER: {headers}. {VOXEL_BY_VOXEL}"
    return array.astype(np.int32), warning


def _check_grid(path: Path, array, properties: dict, file: Path, image, expected: dict, names: Sequence[str] = ALL) -> None:
    difference = geometry_difference(properties, expected, names)
    if array.shape[1:] != image.shape[1:]:
        difference = f"shape {array.shape[1:]}, expected {image.shape[1:]}"
    if difference:
        raise UserError(f"{path}: {difference} as in {file}; expected one grid")


class Slices:
    """The slices of a case that its pictures show, the same ones in every picture.

    Attributes
    ----------
    labels, kind : the reference, or the prediction if there is none; and the word for it
    number, index : of slices; of the slice with the most labelled voxels
    names, legend : label value to name (of the region that nnU-Net paints with it), name to colour
    """

    def __init__(self, model: Model, case: Case, prediction: np.ndarray):
        self.case, self.prediction = case, prediction
        self.kind, self.labels = ("prediction", prediction) if case.reference is None else ("reference", case.reference)
        self.names = {value: f"label {value}" for value in model.labels.known if value > 0}
        painted = model.dataset.get("regions_class_order") or [values[0] for _, values in model.labels.structures]
        self.names |= {value: name.replace("_", " ") for value, name in zip(painted, model.labels.names, strict=True)}
        self._colours = label_colours(list(self.names))
        self.legend = {self.names[value]: colour for value, colour in self._colours.items()}
        areas = self._areas(self.labels if self._areas(self.labels).any() else prediction)
        self.number = len(areas)
        self.index = int(areas.argmax()) if areas.any() else len(areas) // 2
        self._labelled = np.flatnonzero(areas + self._areas(prediction))
        self._window = window_of(case.image)

    def _areas(self, labels: np.ndarray) -> np.ndarray:
        """(slices,), the number of labelled voxels in each."""
        return np.isin(labels, list(self.names)).sum(tuple(axis for axis in range(3) if axis != self.case.slice_axis))

    def through(self, count: int) -> list[int]:
        """At most `count` slices, evenly through what reference or prediction label; `index` is one of them."""
        where = self._labelled if len(self._labelled) else np.arange(self.number)
        chosen = evenly(where, count)
        chosen[int(np.abs(chosen - self.index).argmin())] = self.index
        return sorted({int(index) for index in chosen})

    def title(self, text: str, index: int | None = None) -> str:
        """`text, slice 5 of 8`; of a 2D image the text alone."""
        return text if self.number == 1 else f"{text}, slice {(self.index if index is None else index) + 1} of {self.number}"

    def plane(self, values: np.ndarray, index: int | None = None) -> np.ndarray:
        """(*shape) to (y, x); of large images every second, third, ... pixel."""
        plane = np.take(values, self.index if index is None else index, self.case.slice_axis)
        step = -(-max(plane.shape) // LARGEST)
        return plane[::step, ::step]

    def image(self, index: int | None = None) -> np.ndarray:
        """The image in its grey window: (y, x) or (y, x, 3) in [0, 1]."""
        return windowed(np.stack([self.plane(channel, index) for channel in self.case.image]), self._window)

    def overlay(self, labels: np.ndarray, index: int | None = None) -> np.ndarray:
        """Labels (*shape) to colours (y, x, 4)."""
        return coloured(self.plane(labels, index), self._colours)


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    """`count` of the values, at equal distances and without the ends."""
    return values[np.linspace(0, len(values) - 1, count + 2).round().astype(int)[1:-1]]
