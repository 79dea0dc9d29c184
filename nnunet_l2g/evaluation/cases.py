"""Finds the segmentations of many cases by their names, and scores them in parallel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import VOXEL_BY_VOXEL, has_spacing, read_pair, spacing_file
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.evaluation.scores import count_voxels, match_lesions, overlap_scores, surface_scores
from nnunet_l2g.parallel import run_parallel

FEW = 3  # to score so few pairs takes less time than to start processes


@dataclass(frozen=True)
class Options:
    """tolerance : of the normalised surface Dice, mm (pixels where the files have no spacing)
    lesions : whether lesion scores are computed too
    lesion_overlap, lesion_min_size : see `match_lesions`
    """

    tolerance: float = 2.0
    lesions: bool = False
    lesion_overlap: float = 0.0
    lesion_min_size: int = 1


@dataclass(frozen=True)
class Pair:
    """The files of one case: the reference, and the prediction of one run of a method."""

    method: str
    case: str
    reference: Path
    prediction: Path
    run: int = 1


def segmentations(folder: Path, ending: str) -> dict[str, Path]:
    """Segmentation files of a folder by case, sorted. UserError if the folder is missing or has no such file.

    Names that begin with a dot are no cases: macOS writes ._NAME beside each file that it copies.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with segmentations (*{ending})")
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = {path.name.removesuffix(ending): path for path in visible if path.name.endswith(ending)}
    if not files:
        others = sorted({"".join(path.suffixes[-2:]) for path in visible if path.suffix})
        raise UserError(
            f"{folder}: no {ending} file in it, but {', '.join(others) or 'nothing'}; dataset.json says that "
            f"segmentations end in {ending}"
        )
    return files


def references_for(cases: list[str], folder: Path, ending: str) -> dict[str, Path]:
    """The reference of each case. UserError if one has none."""
    files = segmentations(folder, ending)
    without = [case for case in cases if case not in files]
    if without:
        raise UserError(f"{folder}: no reference for {some(without)}; expected a file of the same name as the prediction")
    return {case: files[case] for case in cases}


def some(names: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def with_unit(labels: Labels, pairs: Sequence[Pair]) -> tuple[Labels, list[str]]:
    """Labels that know whether distances are in mm or in pixels, and a warning where spacings are missing. Opens no image.

    UserError if some pairs have a spacing and others have none: their distances cannot be averaged.
    """
    if labels.pixels:
        return labels, []
    files = dict.fromkeys(path for pair in pairs for path in (pair.reference, pair.prediction))
    without = [path for path in files if not has_spacing(path, labels.reader)]
    if not without:
        return labels, []
    unknown = [pair for pair in pairs if pair.reference in without and pair.prediction in without]
    lacking = f"{len(without)} of {len(files)} files have no spacing ({spacing_file(without[0])} is the first that is missing)"
    if not unknown:
        return labels, [f"{lacking}: the spacing of the other file of the pair, prediction or reference, was taken."]
    if len(unknown) < len(pairs):
        raise UserError(
            f"{spacing_file(unknown[0].reference)}: neither this case's reference nor its prediction has a spacing, other "
            f'cases have one, and pixels and mm cannot be averaged; write the file: {{"spacing": [z, y, x]}}, in mm'
        )
    return replace(labels, no_spacing=True), [f"{lacking}: distances and the tolerance of NSD are in pixels, not in mm."]


def score_pairs(
    pairs: Sequence[Pair], labels: Labels, options: Options, processes: int = 1
) -> tuple[dict[tuple[str, int, str], dict[str, dict]], list[str]]:
    """Scores of each pair by (method, run, case), {structure: {"TP", "FP", "FN", "dice", ..., "hd95", ...}}, and warnings.

    Raises
    ------
    UserError : a file is missing, as in `read_pair`, or a process was killed (memory)
    """
    for path in (path for pair in pairs for path in (pair.reference, pair.prediction)):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    score = functools.partial(_score_with_pair, labels=labels, options=options)
    results = dict(run_parallel(score, pairs, processes if len(pairs) > FEW else 1, "scoring"))
    scores = {(pair.method, pair.run, pair.case): results[pair][0] for pair in pairs}
    differences = [results[pair][1] for pair in pairs if results[pair][1]]
    if not differences:
        return scores, []
    return scores, [
        f"HEADERS DIFFER in {len(differences)} of {len(pairs)} pairs of reference and prediction (shape and spacing agree): "
        f"{differences[0]}. {VOXEL_BY_VOXEL}"
    ]


def _score_with_pair(pair: Pair, labels: Labels, options: Options) -> tuple[Pair, tuple[dict[str, dict], str | None]]:
    return pair, score_pair(pair, labels, options)


def score_pair(pair: Pair, labels: Labels, options: Options) -> tuple[dict[str, dict], str | None]:
    """Scores of every structure of one case, and how the two headers differ, if they do. UserError as in `read_pair`."""
    first, second, spacing, difference = read_pair(pair.reference, pair.prediction, labels)
    valid = None if labels.ignore is None else first != labels.ignore
    scores = {}
    for name, values in labels.structures:
        masks = labels.mask(first, values), labels.mask(second, values)
        tp, fp, fn = count_voxels(*masks, valid)
        scores[name] = {"TP": tp, "FP": fp, "FN": fn, **overlap_scores(tp, fp, fn)}
        scores[name] |= surface_scores(*masks, spacing, options.tolerance, valid)
        if options.lesions:
            match = match_lesions(*masks, valid, overlap=options.lesion_overlap, min_size=options.lesion_min_size)
            scores[name] |= match.scores()
    return scores, difference
