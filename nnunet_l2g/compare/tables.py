"""Scores as tables: per case, per method, paired with the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nnunet_l2g.compare.results import Inputs
from nnunet_l2g.compare.statistics import EQUAL, compare_runs, holm, run_variance
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
    """Columns method, structure, score, n (cases where it is defined), mean, sd, median: over cases, each the mean of its runs.

    The row MEAN is the mean over structures of the means over cases, nnU-Net's foreground_mean; n is then 0 and the others
    NaN. A structure without any defined case is left out of it.
    """
    rows = []
    of_cases = cases.groupby(["method", "structure", "case"], sort=False)[list(shown)].mean()
    for method, of_method in of_cases.groupby("method", sort=False):
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


def paired_tables(cases: pd.DataFrame, shown: dict[str, Score]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every other method against the first, by structure and score: `paired_row`, with Holm's correction over structures.

    The row MEAN compares the mean over those structures of a case that are defined in all runs of both methods; it is one test
    and keeps its p. The second table has the mean of every run over the same cases: method, baseline, structure, score, of
    (whose run), run, mean.
    """
    methods, structures = list(dict.fromkeys(cases["method"])), list(dict.fromkeys(cases["structure"]))
    folds = cases.groupby("case")["fold"].first().to_numpy()  # (n,), cases sorted
    paired, runs = [], []
    for method in methods[1:]:
        for name, score in shown.items():
            sides = [_scores(cases[cases["method"] == side], name, structures) for side in (methods[0], method)]
            columns = [[side[..., i] for side in sides] for i in range(len(structures))]
            if len(structures) > 1:
                defined = np.logical_and(*(~np.isnan(side).any(0) for side in sides))  # (n, S)
                columns.append([_mean_where(side, defined) for side in sides])
            rows = []
            for structure, column in zip([*structures, MEAN], columns, strict=False):
                key = {"method": method, "baseline": methods[0], "structure": structure, "score": name}
                row, means = paired_row(*column, folds, score.higher_is_better)
                rows.append(key | row)
                for side, values in zip((methods[0], method), means, strict=True):
                    runs += [{**key, "of": side, "run": run, "mean": mean} for run, mean in enumerate(values, 1)]
            corrected = holm([row["p"] for row in rows[: len(structures)]])
            paired += [row | {"p_holm": p} for row, p in zip(rows, [*corrected, rows[-1]["p"]], strict=False)]
    return pd.DataFrame(paired), pd.DataFrame(runs)


def paired_row(
    baseline: np.ndarray, method: np.ndarray, folds: np.ndarray, higher_is_better: bool = True
) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    """Method minus baseline over the n cases that are defined in every run of both, and the means of their runs (R,).

    Parameters
    ----------
    baseline, method : (R, n), NaN where undefined
    folds : (n,)

    Returns
    -------
    n, dropped (cases that are defined in some runs only), baseline_mean, method_mean, difference, low, high, p; wins, ties,
    losses in cases; runs, baseline_runs, folds; sd_between_runs, baseline_sd_between_runs; detectable, runs_needed
    """
    undefined = np.isnan(np.concatenate([baseline, method]))  # (R + R, n)
    kept, dropped = ~undefined.any(0), undefined.any(0) & ~undefined.all(0)
    baseline, method, folds = baseline[:, kept], method[:, kept], folds[kept]
    row = {"n": int(kept.sum()), "dropped": int(dropped.sum())}
    means = (_run_means(baseline), _run_means(method))
    names = ("difference", "low", "high", "p", "detectable", "runs_needed", "sd_between_runs", "baseline_sd_between_runs")
    found = dict.fromkeys(names, np.nan)
    change = np.zeros(0)
    if row["n"]:
        effect = compare_runs(baseline, method, folds)
        change = method.mean(0) - baseline.mean(0)  # (n,)
        change = np.where(np.abs(change) < EQUAL, 0, change)
        difference = float(effect.difference)
        found |= {"difference": difference, "low": difference - effect.half_width, "high": difference + effect.half_width}
        found |= {"p": effect.p, "detectable": effect.detectable, "runs_needed": effect.runs_needed()}
        for name, side in (("sd_between_runs", method), ("baseline_sd_between_runs", baseline)):
            found[name] = np.sqrt(np.maximum(run_variance(side, folds), 0))
    better = change > 0 if higher_is_better else change < 0
    wins, ties = int(better.sum()), int((change == 0).sum())
    row |= {"baseline_mean": float(means[0].mean()), "method_mean": float(means[1].mean())}
    row |= {name: float(value) for name, value in found.items()}
    row |= {"wins": wins, "ties": ties, "losses": change.size - wins - ties}
    return row | {"runs": len(method), "baseline_runs": len(baseline), "folds": len(set(folds))}, means


def empty_table(cases: pd.DataFrame) -> pd.DataFrame:
    """Columns method, structure, absent (cases without it in the reference), invented (of these, predicted nevertheless),
    missed (in the reference, nothing predicted), each the mean over runs. Only structures for which absent or missed is not 0
    for some method."""
    absent = cases["TP"] + cases["FN"] == 0
    nothing = cases["TP"] + cases["FP"] == 0
    flags = cases[["method", "run", "structure"]].assign(absent=absent, invented=absent & ~nothing, missed=~absent & nothing)
    of_runs = flags.groupby(["method", "structure", "run"], sort=False).sum()
    table = of_runs.groupby(["method", "structure"], sort=False).mean().reset_index()
    shown = table.groupby("structure")[["absent", "missed"]].transform("sum").sum(axis=1) > 0
    return table[shown].reset_index(drop=True)


def lesion_size_table(inputs: Inputs, scores: Scores) -> pd.DataFrame:
    """Lesion recall in thirds of the reference lesions by size: method, structure, smallest, largest (voxels), lesions,
    recall (mean over runs). Empty if lesions were not scored."""
    rows = []
    for structure in inputs.labels.names:

        def lesions(key: str, method: str, run: int, structure: str = structure) -> np.ndarray:
            found = [scores[method, run, case][structure].get(key, []) for case in inputs.cases]
            return np.concatenate([[], *found])

        sizes = lesions("lesion_sizes", inputs.methods[0].name, 1)
        edges = _thirds(sizes)
        for method in inputs.methods if len(edges) > 1 else []:
            runs = range(1, len(method.runs) + 1)
            bins = [recall_by_size(sizes, lesions("lesion_detected", method.name, run), edges) for run in runs]
            for low, high, *of_runs in zip(edges, edges[1:], *bins, strict=False):
                inside = sizes[(sizes >= low) & (sizes < high)]
                recall = np.mean([recall for _, recall in of_runs])
                rows.append((method.name, structure, int(inside.min()), int(inside.max()), inside.size, recall))
    return pd.DataFrame(rows, columns=["method", "structure", "smallest", "largest", "lesions", "recall"])


def _thirds(sizes: np.ndarray) -> list[float]:
    """Edges of up to three bins, each with at least one lesion; the last edge lies above the largest."""
    if sizes.size == 0:
        return []
    inner = np.quantile(sizes, [1 / 3, 2 / 3], method="higher")
    return sorted({float(sizes.min()), *map(float, inner), float(sizes.max()) + 1})


def _scores(cases: pd.DataFrame, name: str, structures: list[str]) -> np.ndarray:
    """(R, n, S) of one method, cases sorted."""
    wide = cases.pivot(index=["run", "case"], columns="structure", values=name)[structures].sort_index()
    return wide.to_numpy(float).reshape(cases["run"].nunique(), -1, len(structures))


def _mean_where(values: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """Mean over the last axis where defined (n, S), NaN where nothing is: (R, n, S) to (R, n)."""
    count = defined.sum(-1)
    return np.where(count > 0, np.where(defined, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _run_means(scores: np.ndarray) -> np.ndarray:
    """(R, n) to (R,); NaN without cases."""
    return scores.mean(1) if scores.size else np.full(len(scores), np.nan)


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
