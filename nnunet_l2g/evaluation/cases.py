"""Scores many cases, in parallel, each pair of files once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cache import Cache, key_of
from nnunet_l2g.evaluation.labels import Labels
from nnunet_l2g.evaluation.lesions import match_lesions
from nnunet_l2g.evaluation.names import LESION, OVERLAP, SURFACE, VERSION
from nnunet_l2g.evaluation.overlap import count_voxels, overlap_scores
from nnunet_l2g.evaluation.reading import read_pair
from nnunet_l2g.evaluation.surfaces import surface_scores

FEW = 3  # pairs that are quicker in this process than a pool is started


@dataclass(frozen=True)
class Options:
    """What is computed beside overlap.

    tolerance : of the normalised surface Dice, mm (pixels for PNG)
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


def score_pair(reference: Path, prediction: Path, labels: Labels, options: Options) -> dict[str, dict]:
    """Scores of every structure of one case: {structure: {"TP", "FP", "FN", "dice", ..., "hd95", ...}}.

    With `options.lesions` also the lesion scores and, for each reference lesion, "lesion_sizes" (voxels) and
    "lesion_detected". UserError as in `read_pair`.
    """
    first, second, spacing = read_pair(reference, prediction, labels)
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


def score_pairs(
    pairs: Sequence[Pair], labels: Labels, options: Options, cache: Cache, processes: int = 1
) -> dict[tuple[str, int, str], dict[str, dict]]:
    """`score_pair` of each pair, by (method, run, case); a progress bar on the terminal, finished pairs kept if one fails.

    Raises
    ------
    UserError : as in `read_pair`, for the first pair that fails; or a worker died (memory)
    """
    from tqdm import tqdm

    definition = json.dumps([VERSION, asdict(options), labels.structures, labels.known, labels.ignore, labels.reader.__name__])
    keys, results, missing = {}, {}, []
    for pair in pairs:
        for path in (pair.reference, pair.prediction):
            if not path.is_file():
                raise UserError(f"{path}: no such file")
        keys[pair] = key_of(pair.reference, pair.prediction, definition)
        stored = cache.get(keys[pair])
        if stored is None or not _is_scored(stored, labels, options):
            missing.append(pair)
        else:
            results[pair] = stored
    with tqdm(total=len(pairs), initial=len(results), desc="scoring", unit="case", disable=None) as bar:
        for pair, scores in _score_all(missing, labels, options, processes):
            cache.put(keys[pair], scores)
            results[pair] = scores
            bar.update()
    return {(pair.method, pair.run, pair.case): results[pair] for pair in pairs}


def _is_scored(stored: dict, labels: Labels, options: Options) -> bool:
    """Whether a file of the cache holds what `score_pair` returns."""
    numbers = ["TP", "FP", "FN", *OVERLAP, *SURFACE, *(LESION if options.lesions else ())]
    lists = ["lesion_sizes", "lesion_detected"] if options.lesions else []
    return stored.keys() == set(labels.names) and all(
        isinstance(scores, dict)
        and all(_is_number(scores.get(key)) for key in numbers)
        and all(isinstance(scores.get(key), list) and all(map(_is_number, scores[key])) for key in lists)
        for scores in stored.values()
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)


def _score_all(pairs: Sequence[Pair], labels: Labels, options: Options, processes: int) -> Iterator[tuple[Pair, dict]]:
    if processes < 2 or len(pairs) <= FEW:
        for pair in pairs:
            yield pair, score_pair(pair.reference, pair.prediction, labels, options)
        return
    # spawn: a fork of a process with ITK's and torch's threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(pairs)), mp_context=context)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        futures = {pool.submit(score_pair, p.reference, p.prediction, labels, options): p for p in pairs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a scoring process died, perhaps for lack of memory; try fewer than {processes} with -np"
            ) from error
