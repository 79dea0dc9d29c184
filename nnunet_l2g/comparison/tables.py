"""Scores as tables: per case, per method, paired with the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from nnunet_l2g.comparison.results import Inputs
from nnunet_l2g.comparison.statistics import Paired, compare_paired, holm
from nnunet_l2g.evaluation.lesions import recall_by_size
from nnunet_l2g.evaluation.names import Score

MEAN = "mean"  # the row over structures
Scores = dict[tuple[str, int, str], dict[str, dict]]  # (method, run, case): {structure: {score: value}}


def case_table(inputs: Inputs, scores: Scores) -> pd.DataFrame:
    """One row for each method, run, case and structure: method, run, fold, case, structure, TP, FP, FN and every score."""
    rows = []
    for method in inputs.methods:
        for number, run in enumerate(method.runs, 1):
            for case in inputs.cases:
                for structure, values in scores[method.name, number, case].items():
                    plain = {name: value for name, value in values.items() if not isinstance(value, list)}
                    place = {"method": method.name, "run": number, "fold": run.folds.get(case, ""), "case": case}
                    rows.append({**place, "structure": structure, **plain})
    return pd.DataFrame(rows)


def summary_table(cases: pd.DataFrame, shown: dict[str, Score]) -> pd.DataFrame:
    """Columns method, structure, score, n (cases where it is defined), mean, sd, median.

    The row MEAN is the mean over structures of the means over cases, nnU-Net's foreground_mean; n is then 0 and the others
    NaN. A structure without any defined case is left out of it.
    """
    rows = []
    for method, of_method in cases.groupby("method", sort=False):
        for name in shown:
            means = []
            for structure, values in of_method.groupby("structure", sort=False)[name]:
                defined = values.dropna()
                spread = defined.std() if len(defined) > 1 else np.nan
                rows.append((method, structure, name, len(defined), defined.mean(), spread, defined.median()))
                means.append(defined.mean())
            if len(means) > 1:
                rows.append((method, MEAN, name, 0, pd.Series(means).mean(), np.nan, np.nan))
    return pd.DataFrame(rows, columns=["method", "structure", "score", "n", "mean", "sd", "median"])


def paired_table(cases: pd.DataFrame, shown: dict[str, Score], resamples: int, seed: int) -> pd.DataFrame:
    """`Paired` of every other method against the first, by structure and score, with Holm's correction over structures.

    The row MEAN compares the mean over those structures of a case that are defined for both methods; it is one test and
    keeps its p.
    """
    methods = list(dict.fromkeys(cases["method"]))
    structures = list(dict.fromkeys(cases["structure"]))
    rows = []
    for method in methods[1:]:
        for name, score in shown.items():
            wide = cases[cases["method"].isin([methods[0], method])].pivot(
                index="case", columns=["method", "structure"], values=name
            )
            first, second = (wide[side][structures].to_numpy(float) for side in (methods[0], method))  # (cases, structures)
            results = [
                compare_paired(first[:, i], second[:, i], score.higher_is_better, resamples, seed)
                for i in range(len(structures))
            ]
            corrected = holm([result.p for result in results])
            if len(structures) > 1:
                both = ~np.isnan(first) & ~np.isnan(second)
                means = (_row_means(np.where(both, side, np.nan)) for side in (first, second))
                results.append(compare_paired(*means, score.higher_is_better, resamples, seed))
                corrected.append(results[-1].p)
            for structure, result, p_holm in zip([*structures, MEAN], results, corrected, strict=False):
                rows.append(
                    {
                        "method": method,
                        "baseline": methods[0],
                        "structure": structure,
                        "score": name,
                        **_renamed(result),
                        "p_holm": p_holm,
                    }
                )
    return pd.DataFrame(rows)


def empty_table(cases: pd.DataFrame) -> pd.DataFrame:
    """Columns method, structure, absent (cases without it in the reference), invented (of these, predicted nevertheless),
    missed (in the reference, nothing predicted). Only structures for which one of them is not 0 for some method."""
    absent = cases["TP"] + cases["FN"] == 0
    nothing = cases["TP"] + cases["FP"] == 0
    flags = cases[["method", "structure"]].assign(absent=absent, invented=absent & ~nothing, missed=~absent & nothing)
    table = flags.groupby(["method", "structure"], sort=False).sum().reset_index()
    shown = table.groupby("structure")[["absent", "missed"]].transform("sum").sum(axis=1) > 0
    return table[shown].reset_index(drop=True)


def lesion_size_table(inputs: Inputs, scores: Scores) -> pd.DataFrame:
    """Lesion recall in thirds of the reference lesions by size: method, structure, smallest, largest (voxels), lesions,
    recall. Empty if lesions were not scored."""
    rows = []
    for structure in inputs.labels.names:
        of_first = [scores[inputs.methods[0].name, 1, case][structure].get("lesion_sizes", []) for case in inputs.cases]
        sizes = np.concatenate([[], *of_first])
        edges = _thirds(sizes)
        for method in inputs.methods:
            detected = [scores[method.name, 1, case][structure].get("lesion_detected", []) for case in inputs.cases]
            if len(edges) > 1:
                bins = recall_by_size(sizes, np.concatenate([[], *detected]), edges)
                for low, high, (count, recall) in zip(edges, edges[1:], bins, strict=False):
                    inside = sizes[(sizes >= low) & (sizes < high)]
                    rows.append((method.name, structure, int(inside.min()), int(inside.max()), count, recall))
    return pd.DataFrame(rows, columns=["method", "structure", "smallest", "largest", "lesions", "recall"])


def _thirds(sizes: np.ndarray) -> list[float]:
    """Edges of up to three bins, each with at least one lesion; the last edge lies above the largest."""
    if sizes.size == 0:
        return []
    inner = np.quantile(sizes, [1 / 3, 2 / 3], method="higher")
    return sorted({float(sizes.min()), *map(float, inner), float(sizes.max()) + 1})


def _row_means(values: np.ndarray) -> np.ndarray:
    """nanmean over the last axis, NaN without a warning where nothing is defined. values (cases, structures)"""
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    return np.where(count > 0, np.where(defined, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _renamed(result: Paired) -> dict:
    values = asdict(result)
    return {
        "n": values.pop("n"),
        "dropped": values.pop("dropped"),
        "baseline_mean": values.pop("baseline"),
        "method_mean": values.pop("method"),
        **values,
    }


def records(table: pd.DataFrame) -> list[dict]:
    """Rows as JSON takes them: Python numbers, None for NaN."""
    return [{name: plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def plain(value: object) -> object:
    """numpy scalars as Python's, NaN and infinities as None, sequences element by element."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
