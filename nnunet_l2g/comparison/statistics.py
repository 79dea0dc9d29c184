"""Paired statistics of a method against the baseline, over cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
EXACT = 50  # differences for which the distribution of the rank sum is computed, not approximated
EQUAL = 1e-9  # differences below are ties: the rounding of a quotient is no win


@dataclass(frozen=True)
class Paired:
    """Method minus baseline over the cases where both are defined.

    n : such cases; dropped : cases where exactly one of the two is undefined
    baseline, method : their means over these n cases
    difference, low, high : mean difference with its bootstrap interval
    p : two-sided Wilcoxon signed-rank; NaN if n is 0
    wins, ties, losses : cases where the method is better, equal, worse
    """

    n: int
    dropped: int
    baseline: float
    method: float
    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int


def compare_paired(
    baseline: np.ndarray, method: np.ndarray, higher_is_better: bool = True, resamples: int = 10_000, seed: int = 0
) -> Paired:
    """All of `Paired` for one score.

    Parameters
    ----------
    baseline, method : (n,), the same cases in the same order, NaN where undefined
    resamples : of the bootstrap
    seed : of the bootstrap

    Raises
    ------
    ValueError : lengths differ
    """
    baseline, method = np.asarray(baseline, float), np.asarray(method, float)
    if baseline.shape != method.shape or baseline.ndim != 1:
        raise ValueError(f"baseline {baseline.shape}, method {method.shape}: expected one value for each of the same cases")
    undefined = np.isnan(baseline) | np.isnan(method)
    dropped = int(np.count_nonzero(np.isnan(baseline) != np.isnan(method)))
    baseline, method = baseline[~undefined], method[~undefined]
    if baseline.size == 0:
        nan = float("nan")
        return Paired(0, dropped, nan, nan, nan, nan, nan, nan, 0, 0, 0)
    differences = method - baseline
    differences[np.abs(differences) < EQUAL] = 0.0
    low, high = bootstrap_interval(differences, resamples, seed)
    better = differences > 0 if higher_is_better else differences < 0
    ties = int(np.count_nonzero(differences == 0))
    wins = int(np.count_nonzero(better))
    return Paired(
        differences.size,
        dropped,
        float(baseline.mean()),
        float(method.mean()),
        float(differences.mean()),
        low,
        high,
        wilcoxon_p(differences),
        wins,
        ties,
        differences.size - wins - ties,
    )


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile interval of the mean: the central `confidence` of the means of `resamples` draws with replacement.

    values : (n,); a single value has no spread to resample: (NaN, NaN)
    """
    if values.size < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // values.size)  # bounds the memory
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = values[generator.integers(values.size, size=(count, values.size))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; zeros are dropped, all zeros give 1.

    W = sum of the ranks of |d| over d > 0, ties sharing their mean rank. Up to EXACT differences p = P(|W - E| >= |w - E|)
    with each sign a fair coin, exact with ties too; beyond, scipy's normal approximation with tie correction.
    """
    from scipy.stats import rankdata, wilcoxon

    differences = np.round(differences[differences != 0], 12)  # equal up to rounding is a tie of ranks
    if differences.size == 0:
        return 1.0
    if differences.size > EXACT:
        return float(wilcoxon(differences, method="approx").pvalue)
    ranks = np.rint(2 * rankdata(np.abs(differences))).astype(int)  # doubled: mean ranks of ties are halves
    total = int(ranks.sum())
    chance = np.zeros(total + 1)  # of each doubled rank sum
    chance[0] = 1.0
    for rank in ranks:
        chance[rank:] = (chance[rank:] + chance[: total + 1 - rank]) / 2
        chance[:rank] /= 2
    seen = abs(2 * int(ranks[differences > 0].sum()) - total)
    return float(min(1.0, chance[np.abs(2 * np.arange(total + 1) - total) >= seen].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)), with m the number of defined values.

    NaN stays NaN and does not count.
    """
    values = np.asarray(p_values, float)
    corrected = np.full(values.shape, np.nan)
    order = [i for i in np.argsort(values, kind="stable") if not np.isnan(values[i])]
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = largest
    return corrected.tolist()
