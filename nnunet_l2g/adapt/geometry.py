"""Do the target's images lie in space as the source's do? Dimension, unit of the spacing, orientation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_l2g.adapt.datasets import Source
from nnunet_l2g.errors import UserError
from nnunet_l2g.files import DAMAGE
from nnunet_l2g.nnunet_files import read_properties

# Ratios of median spacings. Another unit (mm, cm, micrometres) shows on every axis; protocols differ on one: slices of CT and
# of short-axis MR by 20.
UNIT_RATIO, AXIS_RATIO = 5.0, 100.0
MAXIMUM_ANGLE = 60.0  # degrees between the same array axis of two images: oblique views pass, swapped or flipped axes do not
_SOURCE_CASES = 50  # whose directions are read; they stand for all


@dataclass(frozen=True)
class Geometry:
    """How one case lies in space, in the axis order of nnU-Net's reader."""

    case: str
    shape: tuple[int, ...]  # voxels, before cropping
    spacing: tuple[float, ...]
    direction: list[list[float]] | None  # columns are unit vectors of the file's axes; None if the format holds none


def direction_of(properties: dict) -> list[list[float]] | None:
    """Direction cosines out of the properties of any of nnU-Net's readers, None if they hold none."""
    if "sitk_stuff" in properties:
        flat = np.array(properties["sitk_stuff"]["direction"], float)
        return flat.reshape(round(len(flat) ** 0.5), -1).tolist()
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        axes = np.array(stuff.get("reoriented_affine", stuff["original_affine"]), float)[:3, :3]
        return (axes / np.linalg.norm(axes, axis=0)).tolist()
    return None


def source_directions(source: Source) -> list[np.ndarray]:
    """Direction cosines of up to 50 source cases, from their preprocessed properties: the raw images may be gone."""
    files = sorted(source.data(source.configurations[0]).glob("*.pkl"))
    chosen = {round(i) for i in np.linspace(0, len(files) - 1, min(len(files), _SOURCE_CASES))}
    directions = [_source_direction(files[i]) for i in sorted(chosen)]
    return [np.array(direction) for direction in directions if direction is not None]


def _source_direction(file: Path) -> list[list[float]] | None:
    try:
        return direction_of(read_properties(file))
    except DAMAGE as error:
        raise UserError(
            f"{file}: its geometry is not as nnU-Net's readers note it ({type(error).__name__}: {error}); preprocess the "
            "source again (nnUNetv2_preprocess)"
        ) from error


def check_geometry(source: Source, target_name: str, cases: list[Geometry]) -> list[str]:
    """UserError if the target as a whole lies otherwise than the source. Returns warnings: a minority turned otherwise."""
    order = source.manager.transpose_forward
    _check_dimension(source, target_name, cases, order)
    _check_unit(source, target_name, cases, order)
    return _check_orientation(source, target_name, cases)


def _check_dimension(source: Source, target_name: str, cases: list[Geometry], order: list[int]) -> None:
    axes = [0 if g.direction is None else len(g.direction) for g in cases]
    usual = max(set(axes), key=axes.count)
    if odd := [g.case for g, count in zip(cases, axes, strict=True) if count != usual]:
        raise UserError(
            f"{target_name} holds files of {' and '.join(f'{count}D' for count in sorted(set(axes)))}: case {odd[0]} is "
            "not like most others, and nnU-Net would stretch a slice into a volume; remove it, or store it as the others are"
        )
    flat_source = source.manager.original_median_shape_after_transp[0] == 1
    other = [g for g in cases if (g.shape[order[0]] == 1) != flat_source]
    if 2 * len(other) > len(cases):
        raise UserError(
            f"{target_name} holds {_dimension(not flat_source)} images (case {other[0].case}: {other[0].shape} "
            f"voxels), the source {source.name} {_dimension(flat_source)} ones; expected the same: slice or stack "
            "the target's images, or choose another source"
        )


def _dimension(flat: bool) -> str:
    return "2D" if flat else "3D"


def _check_unit(source: Source, target_name: str, cases: list[Geometry], order: list[int]) -> None:
    target = np.median([g.spacing for g in cases], axis=0)[order]
    expected = np.array(source.manager.original_median_spacing_after_transp)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.log(target / expected)
    plausible = np.isfinite(factors).all() and np.abs(factors).max() <= np.log(AXIS_RATIO)
    other_unit = (np.abs(factors) >= np.log(UNIT_RATIO)).all() and abs(np.sign(factors).sum()) == len(factors)
    if not plausible or other_unit:
        raise UserError(
            f"{target_name} has a median spacing of {_numbers(target)}, the source {source.name} of "
            f"{_numbers(expected)} (slowest axis first): expected less than {UNIT_RATIO:g} times more or less "
            f"on at least one axis, and less than {AXIS_RATIO:g} times on each; are the units the same? Correct the "
            "spacing in the target's files"
        )


def _check_orientation(source: Source, target_name: str, cases: list[Geometry]) -> list[str]:
    known = [(g.case, np.array(g.direction)) for g in cases if g.direction is not None]
    references = source_directions(source)
    if not known or not references:
        return []  # PNG, TIFF: nothing to compare
    limit = np.cos(np.deg2rad(MAXIMUM_ANGLE))
    other = [case for case, direction in known if not any(_agreement(direction, r) >= limit for r in references)]
    names = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
    text = (
        f"{len(other)} of {len(known)} images of {target_name} ({names}) have an array axis more than {MAXIMUM_ANGLE:g} "
        f"degrees off that of every image of the source {source.name}: axes are swapped or flipped"
    )
    if 2 * len(other) > len(known):
        raise UserError(f"{text}; bring them into the source's orientation (SimpleITK.DICOMOrient)")
    return [f"{text}. They are used as they are"] if other else []


def _agreement(direction: np.ndarray, reference: np.ndarray) -> float:
    """Cosine of the largest angle between corresponding axes; -1 if the dimensions differ."""
    if direction.shape != reference.shape:
        return -1.0
    return float((direction * reference).sum(axis=0).min())


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
