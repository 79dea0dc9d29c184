"""What nnU-Net's fingerprint knows about a dataset, for a target without labels.

nnU-Net takes the statistics behind CT normalisation (mean, standard deviation, 0.5 and 99.5 percentile) over labelled
foreground. The substitute here is the body: the voxels brighter than Otsu's threshold, found anew in each image and channel
within the nonzero box. It needs no unit and parts air from tissue in CT; it is wider than an organ's intensities, so contrast
within soft tissue is compressed in comparison with labelled statistics. Other schemes use no statistics of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunet_l2g.adapt.datasets import Source, Target
from nnunet_l2g.adapt.digests import digest_array, digest_json
from nnunet_l2g.adapt.geometry import Geometry, direction_of
from nnunet_l2g.adapt.workers import run_parallel
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import geometry_difference
from nnunet_l2g.images import check_whole, unreadable

FORMAT = 2
_STATISTICS = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")  # of a channel
SUBSTITUTE = "voxels above Otsu's threshold, per image and channel, within the nonzero box; no label was read"
TOTAL_SAMPLES = 10_000_000  # intensities kept of all cases together, per channel; nnU-Net keeps 10^8


@dataclass(frozen=True)
class CaseJob:
    """One case to read, and how many intensities to keep of it."""

    case: str
    files: list[str]
    reader: str
    channels: int
    samples: int = 0


def read_case(job: CaseJob) -> tuple[np.ndarray, Geometry]:
    """Voxels (channels, three axes) by the source's reader. UserError if they cannot be used."""
    data, properties = _read_channels(job)
    if len(data) != job.channels:
        raise UserError(
            f"case {job.case} has {len(data)} channel(s), dataset.json names {job.channels}; expected as many: add "
            "the missing files, or correct channel_names"
        )
    if not np.isfinite(data).all():
        raise UserError(f"case {job.case} holds voxels that are not finite numbers; replace them, or remove the case")
    if not data.any():
        raise UserError(f"case {job.case} holds only zeros; remove it from the target's images")
    spacing = tuple(float(s) for s in properties["spacing"])
    return data, Geometry(job.case, tuple(int(n) for n in data.shape[1:]), spacing, direction_of(properties))


def _read_channels(job: CaseJob) -> tuple[np.ndarray, dict]:
    """What the reader makes of all files at once, read one by one: it prints where they differ and goes on, or says nothing."""
    reader = recursive_find_reader_writer_by_name(job.reader)()
    read: list[tuple[np.ndarray, dict]] = []
    for file in job.files:
        try:
            read.append(reader.read_images([file]))
        except Exception as error:  # whatever the reader's library raises
            whose = f"the source's reader {job.reader}"
            raise UserError(f"case {job.case}: {unreadable(file, whose, error)}") from error
        check_whole(Path(file))
    first, properties = read[0]
    for file, (voxels, theirs) in zip(job.files, read, strict=True):
        difference = None if voxels.shape[1:] == first.shape[1:] else f"shape {voxels.shape[1:]}, expected {first.shape[1:]}"
        if difference := difference or geometry_difference(theirs, properties):
            raise UserError(
                f"case {job.case}: {file} has {difference} as in {job.files[0]}; a case's channels have to lie on one grid: "
                "resample them, or remove the case"
            )
    return np.concatenate([voxels for voxels, _ in read]), properties


def body_mask(image: np.ndarray) -> np.ndarray:
    """Which voxels of one channel are brighter than Otsu's threshold; all, if the image is constant.

    The darkest value counts as the next darkest: a constant padding far below the air (-3024 in many CT) would otherwise be
    parted from the air instead of air from tissue. For the threshold alone, the brightest 0.5 % are cut: metal.
    """
    from skimage.filters import threshold_otsu

    lowest = image.min()
    if image.max() == lowest:
        return np.ones(image.shape, bool)
    next_lowest = image[image > lowest].min()
    highest = max(np.percentile(image, 99.5), next_lowest)
    clipped = np.clip(image, next_lowest, highest)
    if highest == next_lowest:
        return image > lowest
    threshold = threshold_otsu(clipped)  # anywhere in the gap between the classes, as a rule at its lower end
    below = clipped <= threshold
    return clipped > (clipped[below].mean() + clipped[~below].mean()) / 2


def _analyse(job: CaseJob) -> tuple[str, dict, list[np.ndarray]]:
    """The case's entry of the fingerprint, and a sample of its body's intensities for each channel."""
    data, geometry = read_case(job)
    cropped, _, _ = crop_to_nonzero(data)
    samples = []
    for channel in cropped:
        drawn, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
            body_mask(channel)[None].astype(np.int8), channel[None], num_samples=job.samples
        )
        samples.append(np.asarray(drawn[0], np.float32))
    lies = {"shape": list(geometry.shape), "spacing": list(geometry.spacing), "direction": geometry.direction}
    entry = {
        # of what was read, not of the files: the spacing of a TIFF, and a header's voxels, may lie in another file
        "digest": digest_json([digest_array(data), lies]),
        **lies,
        "shape_after_crop": [int(n) for n in cropped.shape[1:]],
        "relative_size_after_cropping": float(np.prod(cropped.shape[1:]) / np.prod(geometry.shape)),
    }
    return job.case, entry, samples


def case_jobs(source: Source, target: Target, samples: int = 0) -> list[CaseJob]:
    """One job for each case of the target."""
    reader = source.plans["image_reader_writer"]
    return [CaseJob(case, files, reader, len(target.channel_names), samples) for case, files in target.cases.items()]


def extract_fingerprint(source: Source, target: Target, processes: int) -> dict:
    """The target's fingerprint: nnU-Net's keys, and "cases" with a digest of what was read. UserError for unusable images."""
    samples = max(1, TOTAL_SAMPLES // len(target.cases))
    results = sorted(
        run_parallel(_analyse, case_jobs(source, target, samples), processes, f"Fingerprint of {target.name}"),
        key=lambda result: result[0],
    )  # workers finish in any order; the file does not depend on it
    cases = {case: entry for case, entry, _ in results}
    properties = {}
    for channel in range(len(target.channel_names)):
        values = np.concatenate([drawn[channel] for _, _, drawn in results])
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
        mean, std = (function(values, dtype=np.float64) for function in (np.mean, np.std))
        found = (mean, median, std, values.min(), values.max(), high, low)
        properties[str(channel)] = dict(zip(_STATISTICS, map(float, found), strict=True))
    return {
        "format": FORMAT,
        "dataset_name": target.name,
        "image_reader_writer": source.plans["image_reader_writer"],
        "foreground": SUBSTITUTE,
        "foreground_intensity_properties_per_channel": properties,
        "spacings": [entry["spacing"] for entry in cases.values()],
        "shapes_after_crop": [entry["shape_after_crop"] for entry in cases.values()],
        "median_relative_size_after_cropping": float(np.median([e["relative_size_after_cropping"] for e in cases.values()])),
        "cases": cases,
    }


def geometries(fingerprint: dict) -> list[Geometry]:
    """How each case lies in space."""
    return [Geometry(case, tuple(e["shape"]), tuple(e["spacing"]), e["direction"]) for case, e in fingerprint["cases"].items()]


def normalization(source: Source, target: Target, fingerprint: dict) -> tuple[list[str], list[bool]]:
    """Scheme and use_mask_for_norm of each channel: the rule of nnU-Net's planner, applied to the target."""
    planner = source.manager.experiment_planner_class or ExperimentPlanner
    known = SimpleNamespace(dataset_json={"channel_names": target.channel_names}, dataset_fingerprint=fingerprint)
    schemes, masks = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm(known)
    return list(schemes), [bool(mask) for mask in masks]
