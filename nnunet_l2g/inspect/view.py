"""The slices of a case that its pictures show, the same in every figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunet_l2g.inspect.case import Case
from nnunet_l2g.inspect.drawing import coloured, label_colours, window_of, windowed
from nnunet_l2g.inspect.geometry import to_original
from nnunet_l2g.inspect.model import Model

LARGEST = 1000  # pixels along a side that are worth drawing


class View:
    """Cuts a case and maps on its grid into planes.

    Attributes
    ----------
    index : of the slice with the most labelled voxels, of the reference or else of the prediction
    names, colours : of the labels, by value
    aspect : height of a pixel over its width, in mm
    """

    def __init__(self, model: Model, case: Case, prediction: np.ndarray):
        self.model, self.case, self.prediction = model, case, prediction
        self.names = label_names(model)
        self.colours = label_colours(self.names)
        guide = prediction if case.reference is None or not (case.reference > 0).any() else case.reference
        areas = self._areas_of(guide)
        self.index = int(areas.argmax()) if areas.any() else len(areas) // 2
        self._labelled = np.flatnonzero(areas + self._areas_of(prediction))
        self._window = window_of(case.image)
        rows, columns = (case.spacing[axis] for axis in range(3) if axis != case.slice_axis)
        self.aspect = rows / columns

    @property
    def slices(self) -> int:
        return self.case.image.shape[1 + self.case.slice_axis]

    def indices(self, number: int) -> list[int]:
        """`number` slices through what reference or prediction label, `index` among them; fewer if there are fewer."""
        where = self._labelled if len(self._labelled) else np.arange(self.slices)
        quantiles = where[np.linspace(0, len(where) - 1, number + 2).round().astype(int)[1:-1]]
        nearest = int(np.abs(quantiles - self.index).argmin())
        quantiles[nearest] = self.index
        return sorted({int(index) for index in quantiles})

    def slice_name(self, index: int) -> str:
        """`slice 5 of 8`; empty for a 2D image."""
        return f"slice {index + 1} of {self.slices}" if self.slices > 1 else ""

    def plane(self, values: np.ndarray, index: int | None = None) -> np.ndarray:
        """(*shape) -> (y, x); of large images every second, third, ... pixel: a panel has a few hundred."""
        plane = np.take(values, self.index if index is None else index, self.case.slice_axis)
        step = -(-max(plane.shape) // LARGEST)
        return plane[::step, ::step]

    def image(self, index: int | None = None) -> np.ndarray:
        """(y, x) or (y, x, 3), in [0, 1]."""
        return windowed(np.stack([self.plane(channel, index) for channel in self.case.image]), self._window)

    def labels(self, values: np.ndarray, index: int | None = None) -> np.ndarray:
        """Labels (*shape) -> (y, x, 4)."""
        return coloured(self.plane(values, index), self.colours)

    def _areas_of(self, labels: np.ndarray) -> np.ndarray:
        """(slices,) labelled voxels in each."""
        return self._sums(np.isin(labels, list(self.names)))

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return values.sum(tuple(axis for axis in range(3) if axis != self.case.slice_axis))

    def original(self, values: np.ndarray, outside: float = 0) -> np.ndarray:
        """A map on the preprocessed grid, on the image's own."""
        return to_original(values, self.case.properties, self.model.plans.transpose_backward, outside)

    @property
    def legend(self) -> Mapping[str, str]:
        return {self.names[value]: colour for value, colour in self.colours.items()}


def label_names(model: Model) -> dict[int, str]:
    """Foreground label values and their names; of a dataset with regions, the region that is painted with the value."""
    labels = model.dataset["labels"]
    if model.manager.has_regions:
        regions = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
        names = dict(zip(model.dataset["regions_class_order"], regions, strict=True))
    else:
        names = {value: name for name, value in labels.items() if name != "ignore" and value != 0}
    names = {int(value): name.replace("_", " ") for value, name in names.items()}
    known = [int(value) for value in model.labels.known if value > 0 and value not in names]
    return names | {value: f"label {value}" for value in known}
