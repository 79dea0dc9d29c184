"""Scores many cases, in parallel, each pair of files once."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.geometry import VOXEL_BY_VOXEL, has_spacing, spacing_file
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.evaluation.lesions import match_lesions
from nnunet_l2g.evaluation.overlap import count_voxels, overlap_scores
from nnunet_l2g.evaluation.reading import ReadPair, UnequalGrids, odd_files, read_pair
from nnunet_l2g.evaluation.surfaces import surface_scores

FEW = 3  # pairs that are quicker in this process than a pool is started


@dataclass(frozen=True)
class Options:
    """What is computed beside overlap.

    tolerance : of the normalised surface Dice, mm (pixels where the files have no spacing)
    lesions : lesion by lesion too
    lesion_overlap, lesion_min_size : see `match_lesions`
    """

    tolerance: float = 2.0
    lesions: bool = False
    lesion_overlap: float = 0.0
    lesion_min_size: int = 1


@dataclass(frozen=True)
class Pair:
    """One case of one run of a method: its files."""

    method: str
    case: str
    reference: Path
    prediction: Path
    run: int = 1


def with_unit(labels: Labels, pairs: Sequence[Pair]) -> tuple[Labels, list[str]]:
    """Labels that say whether distances are mm or pixels, and warnings where a spacing is missing. Opens no image.

    UserError if some pairs have a spacing and others have none: their distances cannot be averaged.
    """
    if labels.pixels:
        return labels, []
    files = dict.fromkeys(path for pair in pairs for path in (pair.reference, pair.prediction))
    without = [path for path in files if not has_spacing(path, labels.reader)]
    unknown = [pair for pair in pairs if pair.reference in without and pair.prediction in without]
    if not without:
        return labels, []
    lacking = f"{len(without)} of {len(files)} files have no spacing ({spacing_file(without[0])} is the first that is missing)"
    if not unknown:
        return labels, [f"{lacking}: the spacing of the other file of the pair, prediction or reference, was taken."]
    if len(unknown) < len(pairs):
        first = spacing_file(unknown[0].reference)
        raise UserError(
            f"{first}: neither this case's reference nor its prediction has a spacing, other cases have one, and pixels and mm "
            f'cannot be averaged; write the file: {{"spacing": [z, y, x]}}, in mm'
        )
    return replace(labels, no_spacing=True), [f"{lacking}: distances and the tolerance of NSD are in pixels, not in mm."]


def score_pair(reference: Path, prediction: Path, labels: Labels, options: Options) -> dict[str, dict]:
    """Scores of every structure of one case: {structure: {"TP", "FP", "FN", "dice", ..., "hd95", ...}}.

    With `options.lesions` also the lesion scores and, for each reference lesion, "lesion_sizes" (voxels) and
    "lesion_detected". UserError as in `read_pair`.
    """
    return _scores(read_pair(reference, prediction, labels), labels, options)


def score_pairs(
    pairs: Sequence[Pair], labels: Labels, options: Options, processes: int = 1
) -> tuple[dict[tuple[str, int, str], dict[str, dict]], list[str]]:
    """`score_pair` of each pair, by (method, run, case), and warnings; a progress bar on the terminal.

    Raises
    ------
    UserError : as in `read_pair`, for the first pair that fails, naming the odd file if its case has others to tell by; or a
        worker died (memory)
    """
    from tqdm import tqdm

    for pair in pairs:
        for path in (pair.reference, pair.prediction):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
    results, differences = {}, {}
    with tqdm(total=len(pairs), desc="scoring", unit="case", disable=None) as bar:
        for pair, scores, difference in _score_all(pairs, labels, options, processes):
            results[pair] = scores
            if difference:
                differences[pair] = difference
            bar.update()
    scores = {(pair.method, pair.run, pair.case): results[pair] for pair in pairs}
    first = next((differences[pair] for pair in pairs if pair in differences), None)
    if first is None:
        return scores, []
    return scores, [
        f"HEADERS DIFFER in {len(differences)} of {len(pairs)} pairs of reference and prediction (shape and spacing agree): "
        f"{first}. {VOXEL_BY_VOXEL}"
    ]


def _scores(pair: ReadPair, labels: Labels, options: Options) -> dict[str, dict]:
    first, second, spacing = pair.reference, pair.prediction, pair.spacing
    valid = None if labels.ignore is None else first != labels.ignore
    scores: dict[str, dict] = {}
    for name, values in labels.structures:
        masks = labels.mask(first, values), labels.mask(second, values)
        tp, fp, fn = count_voxels(*masks, valid)
        scores[name] = {"TP": tp, "FP": fp, "FN": fn, **overlap_scores(tp, fp, fn)}
        scores[name] |= surface_scores(*masks, spacing, options.tolerance, valid)
        if options.lesions:
            match = match_lesions(*masks, valid, overlap=options.lesion_overlap, min_size=options.lesion_min_size)
            scores[name] |= match.scores() | {"lesion_sizes": list(match.sizes), "lesion_detected": list(match.detected)}
    return scores


def _score(pair: Pair, labels: Labels, options: Options) -> tuple[dict[str, dict], str | None]:
    read = read_pair(pair.reference, pair.prediction, labels)
    return _scores(read, labels, options), read.header_difference


def _score_all(
    pairs: Sequence[Pair], labels: Labels, options: Options, processes: int
) -> Iterator[tuple[Pair, dict, str | None]]:
    """Each pair with what `_score` says of it, in any order."""

    def result(pair: Pair, call) -> tuple[Pair, dict, str | None]:
        try:
            return pair, *call()
        except UnequalGrids as error:
            files = dict.fromkeys(path for p in pairs if p.reference == pair.reference for path in (p.reference, p.prediction))
            raise UserError(odd_files(list(files), labels) or str(error)) from error

    if processes < 2 or len(pairs) <= FEW:
        for pair in pairs:
            yield result(pair, lambda pair=pair: _score(pair, labels, options))
        return
    # spawn: a fork of a process with ITK's and torch's threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(pairs)), mp_context=context)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        futures = {pool.submit(_score, pair, labels, options): pair for pair in pairs}
        try:
            for future in as_completed(futures):
                yield result(futures[future], future.result)
        except BrokenProcessPool as error:
            raise UserError(
                f"a scoring process died, perhaps for lack of memory; try fewer than {processes} with -np"
            ) from error
