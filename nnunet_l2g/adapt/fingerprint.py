"""Reads all images of the target: checks them against the source, and computes the statistics that normalisation needs.

nnU-Net takes the statistics for CT normalisation (mean, standard deviation, 0.5 and 99.5 percentile) over labelled voxels. The
target has no labels, so the voxels of the body are used: those brighter than Otsu's threshold, in each image and channel,
within the nonzero box. This works in any unit. The body is more than one organ, so its statistics are wider than those of
labelled voxels. Other normalisation schemes use no statistics of the dataset.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunet_l2g.adapt.datasets import Source, Target
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import geometry_difference, named_geometry, shown
from nnunet_l2g.files import DAMAGE
from nnunet_l2g.images import check_whole, unreadable
from nnunet_l2g.nnunet_files import read_properties
from nnunet_l2g.parallel import run_parallel

TOTAL_SAMPLES = 10_000_000  # intensities of all cases together, per channel; nnU-Net keeps 10^8
UNIT_RATIO = 5.0  # of spacings on every axis: another unit. Protocols differ as much on one axis, the distance of slices
MAXIMUM_ANGLE = 60.0  # degrees between the same axis of two arrays; oblique views pass, swapped and flipped axes do not
SOURCE_CASES = 20  # whose orientation is read


@dataclass(frozen=True)
class Fingerprint:
    """What `adapt` knows about the target's images."""

    digest: str  # of all voxels and spacings; another one means that images have changed
    schemes: list[str]  # normalisation scheme of each channel, by the rule of nnU-Net's planner
    masks: list[bool]  # use_mask_for_norm of each channel, by the same rule
    intensities: dict[str, dict[str, float]]  # channel -> statistics of the body


@dataclass(frozen=True)
class CaseSummary:
    """What is kept of one case."""

    case: str
    digest: str
    shape: tuple[int, ...]  # voxels before cropping, in the axis order of nnU-Net's reader
    spacing: tuple[float, ...]
    direction: np.ndarray | None  # the columns are unit vectors of the axes; None if the format holds none
    relative_size_after_cropping: float
    samples: list[np.ndarray]  # of the body's intensities, one array a channel


def read_fingerprint(source: Source, target: Target, processes: int) -> Fingerprint:
    """Reads and checks all images of the target, and prints warnings. UserError for images that cannot be used."""
    channels, samples = len(target.channel_names), max(1, TOTAL_SAMPLES // len(target.cases))
    read = partial(summarise_case, reader=source.plans["image_reader_writer"], channels=channels, samples=samples)
    summaries = run_parallel(read, list(target.cases.items()), processes, f"Reading {target.name}")
    cases = sorted(summaries, key=lambda summary: summary.case)  # the result must not depend on which worker is first
    check_geometry(source, target.name, cases)
    warn_of_orientation(source, target.name, cases)
    schemes, masks = _normalisation(source, target, cases)
    intensities = {str(c): _statistics(np.concatenate([summary.samples[c] for summary in cases])) for c in range(channels)}
    digest = hashlib.sha256("".join(summary.case + summary.digest for summary in cases).encode()).hexdigest()
    return Fingerprint(digest, schemes, masks, intensities)


def read_case(case: str, files: list[str], reader: str, channels: int) -> tuple[np.ndarray, dict]:
    """Voxels (channels, three axes) and properties by the source's reader. UserError if the images cannot be used.

    The files are read one by one, because nnU-Net's readers only print a warning where the channels of a case differ.
    """
    read: list[tuple[np.ndarray, dict]] = []
    for file in files:
        try:
            read.append(recursive_find_reader_writer_by_name(reader)().read_images([file]))
        except Exception as error:  # each library has its own
            raise UserError(f"case {case}: {unreadable(file, f'the source reader {reader}', error)}") from error
        check_whole(Path(file))
        (first, properties), (voxels, found) = read[0], read[-1]
        shape, expected = voxels.shape[1:], first.shape[1:]
        difference = geometry_difference(found, properties) if shape == expected else f"shape {shape}, expected {expected}"
        if difference:
            raise UserError(
                f"case {case}: {file} has {difference} as in {files[0]}; the channels of a case must lie on one grid: resample "
                "them, or remove the case"
            )
    data = np.concatenate([voxels for voxels, _ in read])
    if len(data) != channels:
        raise UserError(
            f"case {case} has {len(data)} channel(s), dataset.json names {channels}; expected as many: add the missing files, "
            "or correct channel_names"
        )
    if not np.isfinite(data).all():
        raise UserError(f"case {case} holds voxels that are not finite numbers; replace them, or remove the case")
    if not data.any():
        raise UserError(f"case {case} holds only zeros; remove it from the target's images")
    return data, read[0][1]


def summarise_case(item: tuple[str, list[str]], reader: str, channels: int, samples: int) -> CaseSummary:
    """Reads a case, given as (name, files), and computes what is kept of it: of the body, `samples` intensities a channel."""
    case, files = item
    data, properties = read_case(case, files, reader, channels)
    shape, spacing = data.shape[1:], tuple(map(float, properties["spacing"]))
    cropped, _, _ = crop_to_nonzero(data)
    drawn = []
    for channel in cropped:
        body = body_mask(channel)[None].astype(np.int8)
        (values,), _ = DatasetFingerprintExtractor.collect_foreground_intensities(body, channel[None], num_samples=samples)
        drawn.append(np.asarray(values, np.float32))
    hasher = hashlib.sha256(f"{shape} {spacing}".encode())
    hasher.update(np.ascontiguousarray(data).data)
    relative_size = float(np.prod(cropped.shape[1:]) / np.prod(shape))
    return CaseSummary(case, hasher.hexdigest(), shape, spacing, direction_of(properties), relative_size, drawn)


def body_mask(image: np.ndarray) -> np.ndarray:
    """Which voxels of one channel are brighter than Otsu's threshold; all of them if the image is constant.

    The darkest value is replaced by the next darkest: a constant padding far below the air (-3024 in many CT) would otherwise
    be separated from the air, and not the air from the body. For the threshold alone, the brightest 0.5 % (metal) are clipped.
    """
    from skimage.filters import threshold_otsu

    lowest = image.min()
    if image.max() == lowest:
        return np.ones(image.shape, bool)
    next_lowest = image[image > lowest].min()
    highest = max(np.percentile(image, 99.5), next_lowest)
    if highest == next_lowest:
        return image > lowest
    clipped = np.clip(image, next_lowest, highest)
    threshold = threshold_otsu(clipped)  # it may lie anywhere in the gap between air and body; the middle is safer
    below = clipped <= threshold
    return clipped > (clipped[below].mean() + clipped[~below].mean()) / 2


def _statistics(values: np.ndarray) -> dict[str, float]:
    """The statistics of one channel under nnU-Net's names."""
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    mean, std = np.mean(values, dtype=np.float64), np.std(values, dtype=np.float64)
    names = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
    found = (mean, median, std, values.min(), values.max(), high, low)
    return dict(zip(names, map(float, found), strict=True))


def _normalisation(source: Source, target: Target, cases: list[CaseSummary]) -> tuple[list[str], list[bool]]:
    """Scheme and use_mask_for_norm of each channel, by the rule of nnU-Net's planner."""
    planner = source.manager.experiment_planner_class or ExperimentPlanner
    size = float(np.median([summary.relative_size_after_cropping for summary in cases]))
    known = SimpleNamespace(dataset_json={"channel_names": target.channel_names})  # a planner itself would read labels
    known.dataset_fingerprint = {"median_relative_size_after_cropping": size}
    schemes, masks = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm(known)
    return list(schemes), [bool(mask) for mask in masks]


def check_geometry(source: Source, target_name: str, cases: list[CaseSummary]) -> None:
    """UserError if the images are 2D and the source is 3D, or the other way round, or if their spacings have another unit."""
    flat_source = 1 in source.manager.original_median_shape_after_transp
    for summary in cases:
        if (1 in summary.shape) != flat_source:
            mine, theirs = ("3D", "2D") if flat_source else ("2D", "3D")
            raise UserError(
                f"case {summary.case} of {target_name} is {mine} ({summary.shape} voxels), the source {source.name} is "
                f"{theirs}; expected the same: slice or stack the target's images, remove the case, or choose another source"
            )
    spacing = np.median([summary.spacing for summary in cases], axis=0)[source.manager.transpose_forward]
    expected = np.array(source.manager.original_median_spacing_after_transp)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.log(spacing / expected)
    if not np.isfinite(factors).all() or (factors > np.log(UNIT_RATIO)).all() or (factors < -np.log(UNIT_RATIO)).all():
        raise UserError(
            f"{target_name} has a median spacing of {shown(spacing)}, the source {source.name} of {shown(expected)} (slowest "
            f"axis first). Expected less than {UNIT_RATIO:g} times more or less on at least one axis; are the units the same? "
            "Correct the spacing in the target's files"
        )


def direction_of(properties: dict) -> np.ndarray | None:
    """Unit vectors of the axes, one a column, from the properties of nnU-Net's readers; None if there is nothing to compare."""
    try:
        if "reoriented_affine" in properties.get("nibabel_stuff", ()):
            return None  # NibabelIOWithReorient turns every image into the same orientation
        flat = named_geometry(properties)["direction"]
        axes = flat.reshape(round(flat.size**0.5), -1)
    except DAMAGE:  # the format has no direction
        return None
    return axes / np.linalg.norm(axes, axis=0)


def warn_of_orientation(source: Source, target_name: str, cases: list[CaseSummary]) -> None:
    """Prints a warning if images of the target have an axis far from that of every image of the source."""
    files = sorted(source.data(source.configurations[0]).glob("*.pkl"))[:SOURCE_CASES]
    references = [direction for file in files if (direction := direction_of(read_properties(file))) is not None]
    limit = np.cos(np.deg2rad(MAXIMUM_ANGLE))
    other = []
    for summary in (summary for summary in cases if summary.direction is not None):
        comparable = [reference for reference in references if reference.shape == summary.direction.shape]
        cosines = [(summary.direction * reference).sum(axis=0).min() for reference in comparable]
        if cosines and max(cosines) < limit:
            other.append(summary.case)
    if other:
        print(
            f"Warning: {len(other)} of {len(cases)} images of {target_name} ({', '.join(other[:3])}) have an axis more than "
            f"{MAXIMUM_ANGLE:g} degrees off that of every image of the source {source.name}: axes are swapped or flipped. They "
            "are used as they are; SimpleITK.DICOMOrient can bring them into the source's orientation",
            flush=True,
        )
